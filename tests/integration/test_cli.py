"""The command `harness-ipc`: its output and exit status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness_ipc import __version__, identify, request
from harness_ipc._registry import records
from tests.support.commands import run_command
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, spawn_daemon, spawn_python, stopped

_SERVICE = """
async def handle(message):
    return {"result": message["params"]["x"] * 2}

class App:
    async def start(self): self.factor = 3
    async def handle(self, message): return {"result": message["params"]["x"] * self.factor}
    async def stop(self): pass
"""


def _run(*arguments: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "harness_ipc", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
        cwd=cwd,
    )


@contextlib.contextmanager
def _serve(tmp_path: Path, app: str, *options: str) -> Iterator[DaemonProcess]:
    (tmp_path / "service.py").write_text(_SERVICE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with spawn_python("-m", "harness_ipc", "serve", app, *options) as daemon:
            yield daemon


@pytest.mark.parametrize(("app", "result"), [("service:handle", 42), ("service:App", 63)])
def test_serve_and_call(tmp_path: Path, app: str, result: int) -> None:
    with _serve(tmp_path, app, "--name", "svc") as daemon:
        record_line = daemon.read_line()
        assert record_line == f"svc: pid {daemon.pid} serves at {records.load('svc').address}"
        called = _run("call", "--name", "svc", '{"params": {"x": 21}}')
        assert (called.returncode, json.loads(called.stdout), called.stderr) == (0, {"result": result}, "")
        text = '{"params": {"x": "\\ud800 é 😀"}}'
        piped = _run("call", "--name", "svc", "-", stdin=text)
        assert json.loads(piped.stdout)["result"].startswith("\ud800 é 😀")
        assert request("svc", {"meta": "shutdown"}) == {"shutdown": True}
        assert daemon.wait() == 0


def test_serve_tells_its_endpoint_as_json_without_the_key(tmp_path: Path) -> None:
    with _serve(tmp_path, "service:handle", "--json") as daemon:
        printed = json.loads(daemon.read_line())
        assert printed["pid"] == identify("default") == daemon.pid
        assert sorted(printed) == ["address", "family", "generation", "name", "pid"]


def test_serve_ends_when_idle(tmp_path: Path) -> None:
    with _serve(tmp_path, "service:handle", "--idle-timeout", "0.2") as daemon:
        assert daemon.wait() == 0


@needs_posix
def test_interrupting_serve_is_a_clean_end(tmp_path: Path) -> None:
    with _serve(tmp_path, "service:handle") as daemon:
        daemon.read_line()
        daemon.signal(signal.SIGINT)
        assert daemon.wait() == 0
    assert identify("default") is None


def test_ping_prints_the_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    with spawn_daemon("pinged") as daemon:
        monkeypatch.setenv("HARNESS_IPC_NAME", "pinged")
        shown = _run("ping")
        assert shown.returncode == 0
        assert shown.stdout.startswith(f"pinged: pid {daemon.pid} answered in ")
        printed = json.loads(_run("ping", "--json").stdout)
        assert (printed["name"], printed["pid"], printed["pong"], printed["responsive"]) == ("pinged", daemon.pid, True, True)
        assert printed["round_trip_ms"] > 0


def test_an_error_reply_is_printed_and_exits_with_1() -> None:
    with spawn_daemon("failing"):
        called = _run("call", "--name", "failing", '{"method": "raise", "params": {"text": "so"}}')
    assert (called.returncode, json.loads(called.stdout)) == (1, {"error": {"type": "ValueError", "message": "so"}})


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["call", "{nonsense"], 2, "the message is invalid"),
        (["call", "[1]"], 2, "a JSON object, not list"),
        (["call", '{"x": NaN}'], 2, "NaN is not valid JSON"),
        (["call", "--timeout", "-1", "{}"], 2, "--timeout"),
        (["call", "--timeout", "nan", "{}"], 2, "--timeout"),
        (["ping", "--name", "a/b"], 2, "is not a daemon name"),
        ([], 2, "COMMAND"),
        (["call", "{}"], 3, "no daemon 'default' is running"),
        (["ping"], 3, "no daemon 'default' is running"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments: list[str], status: int, words: str) -> None:
    failed = run_command(*arguments)
    assert (failed.returncode, failed.stdout) == (status, "")
    assert words in failed.stderr
    if not failed.stderr.startswith("usage:"):
        assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("app", "status", "words"),
    [
        ("os", 2, "is not MODULE:APP"),
        ("nosuchmodule:app", 6, "nosuchmodule"),
        ("os:nosuchapp", 6, "nosuchapp"),
        ("os:sep", 6, "app must be an async function or an object with an async handle(), not str"),
    ],
)
def test_apps_that_can_not_be_served_are_one_line_and_a_status(app: str, status: int, words: str) -> None:
    result = _run("serve", app)
    assert (result.returncode, result.stdout) == (status, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    if not result.stderr.startswith("usage:"):
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def app(message): return message", "app is not async: write `async def app(...)`"),
        ("import harness_ipc\nharness_ipc.run_daemon(print, 'x')\napp = 1", "print is not async"),
        (
            "import harness_ipc\nasync def app(message): return {}\nharness_ipc.run_daemon(app, 'x')",
            "RuntimeError: run_daemon was called while `harness-ipc serve` imports this module: write it below `if __name__ ==",
        ),
    ],
)
def test_serve_refuses_a_module_that_calls_run_daemon(private_directories: Path, text: str, words: str) -> None:
    (private_directories / "svc.py").write_text(text)
    result = _run("serve", "svc:app", cwd=private_directories)
    assert (result.returncode, result.stdout) == (6, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@needs_posix
def test_exit_statuses_of_a_timeout_and_an_unsafe_directory(private_directories: Path) -> None:
    with spawn_daemon("default") as daemon:
        with stopped(daemon):
            assert _run("ping", "--timeout", "0.3").returncode == 4
        os.chmod(private_directories / "run", 0o755)
        refused = _run("ping")
        assert refused.returncode == 5
        assert f"chmod 700 {private_directories / 'run'}" in refused.stderr
        os.chmod(private_directories / "run", 0o700)
        assert _run("ping").returncode == 0


def test_a_second_daemon_of_a_name_exits_with_6(tmp_path: Path) -> None:
    with spawn_daemon("taken") as daemon:
        (tmp_path / "service.py").write_text(_SERVICE, encoding="utf-8")
        second = _run("serve", "service:handle", "--name", "taken", cwd=tmp_path)
        assert second.returncode == 6
        assert f"pid {daemon.pid}" in second.stderr
        assert identify("taken") == daemon.pid


@needs_posix
def test_a_closed_reader_is_no_error() -> None:
    with spawn_daemon("default"):
        command = [sys.executable, "-m", "harness_ipc", "call", '{"method": "fill", "params": {"size": 1000000}}']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        with process.stderr:
            assert process.stderr.read() == b""
        process.wait(PATIENCE)


def test_version_and_module() -> None:
    assert _run("--version").stdout == f"harness-ipc {__version__}\n"
