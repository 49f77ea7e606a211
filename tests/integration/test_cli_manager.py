"""The commands that start, show and stop daemons: their output and exit status."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import (
    StartFailed,
    _status,
    daemon_alive,
    daemon_status,
    identify,
    list_daemons,
    log_path,
    manager,
    request,
    runtime_dir,
    runtime_path,
    stop_daemon,
)
from harness_ipc._cli.arguments import parse_arguments
from tests.support.commands import run_command
from tests.support.marks import needs_posix, needs_root
from tests.support.processes import PATIENCE, lives, wait_until

# A directory that always exists.
ROOT = os.environ["SYSTEMROOT"] if sys.platform == "win32" else "/"

# Requests, starts and stops wait until the test creates the file `gate`.
_SERVICE = f"""
import asyncio, os, time
from pathlib import Path
from harness_ipc import report

HERE = Path(__file__).parent

async def opened(gate):
    deadline = time.monotonic() + {PATIENCE}
    while not gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the test did not open the gate")
        await asyncio.sleep(0.01)

async def handle(message):
    if message.get("method") == "wait":
        (HERE / "waiting").touch()
        await opened(HERE / "gate")
    return {{"result": message["params"]["x"] * 2, "pid": os.getpid(), "cwd": os.getcwd()}}

class Healthy:
    async def start(self): pass
    async def handle(self, message): return {{"error": {{"type": "KeyError", "message": "as always"}}}}
    async def stop(self): pass
    async def health(self): return {{"upstream": "fine"}}

class Slow(Healthy):
    async def start(self):
        await report({{"loaded": 3, "of": 7}})
        await opened(HERE / "gate")

class Sick(Healthy):
    async def start(self): raise LookupError("no such model: \\x1b[31mred")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to the directory of the module "service"; at the end, stop all daemons."""
    (tmp_path / "service.py").write_text(_SERVICE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # The output is read as UTF-8 even if the system's encoding is another.
    monkeypatch.setenv("PYTHONUTF8", "1")
    yield tmp_path
    if (private_directories / "run").exists():
        (private_directories / "run").chmod(0o700)
    for status in list_daemons():
        stop_daemon(status.name, timeout=0.0)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "harness_ipc", *arguments]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process. tests/integration/test_current_directory.py runs each in its own."""
    return _without_delay(run_command(*arguments))


def _run_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        _command(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
        **options,
    )
    return _without_delay(done)


def _without_delay(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    # On a loaded machine, a command may take more than a second and report that.
    done.stderr = re.sub(r"harness-ipc: still \w+ing \S.*\n", "", done.stderr)
    return done


@contextlib.contextmanager
def _running(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run the command in the background. It is killed at the end of the block if it still runs."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(_command(*arguments), stdin=subprocess.DEVNULL, text=True, encoding="utf-8", **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _start(name: str, app: str = "service:handle", *options: str) -> int:
    """Start a daemon and return its pid."""
    started = _run("start", app, "--name", name, *options)
    assert (started.returncode, started.stderr) == (0, "")
    match = re.fullmatch(rf"{name}: pid (\d+) is running\n", started.stdout)
    assert match is not None, started.stdout
    return int(match[1])


def _state(name: str, *options: str) -> tuple[int, str]:
    """Return the exit status of `status` and the state that it shows."""
    shown = _run("status", "--name", name, *options)
    assert shown.stderr == ""
    assert shown.stdout.splitlines()[-1] == f"  log       {log_path(name)}"
    as_json = _run("status", "--name", name, "--json", *options)
    assert (as_json.returncode, as_json.stderr) == (shown.returncode, "")
    state = json.loads(as_json.stdout)["state"]
    assert shown.stdout.startswith(f"{name}: {state}")
    return shown.returncode, state


# start


def test_a_second_start_keeps_the_first_daemon(here: Path) -> None:
    pid = _start("twice")
    again = _run("start", "service:Healthy", "--name", "twice")
    assert (again.returncode, again.stdout) == (0, f"twice: pid {pid} is running\n")
    assert "was started differently: its command line is" in again.stderr
    reply = request("twice", {"params": {"x": 21}})
    assert (reply["result"], reply["pid"]) == (42, pid)
    # The status has the directory of the start; the daemon itself has left it.
    assert (daemon_status("twice").cwd, reply["cwd"]) == (os.path.realpath(here), ROOT)
    log = log_path("twice").read_text(encoding="utf-8")
    # A console handler would log the line twice.
    assert log.count("ready at") == 1


def test_start_tells_the_status_as_json() -> None:
    started = _run("start", "service:handle", "--name", "told", "--json")
    assert (started.returncode, started.stderr) == (0, "")
    status = json.loads(started.stdout)
    assert (status["name"], status["state"], status["pid"]) == ("told", "running", identify("told"))
    assert list(status) == list(daemon_status("told").to_json())


def test_a_daemon_with_an_idle_timeout_ends_by_itself() -> None:
    _start("idle", "service:handle", "--idle-timeout", "0.2")
    wait_until(lambda: not daemon_alive("idle"))
    assert _state("idle") == (3, "absent")


def test_a_name_that_looks_like_an_option() -> None:
    started = _run("start", "service:handle", "--name=-x")
    assert (started.returncode, started.stderr) == (0, "")
    assert identify("-x") is not None


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("nosuchmodule:app", "No module named 'nosuchmodule'"),
        ("service:nosuchapp", "no attribute 'nosuchapp'"),
        ("service:Sick", "no such model"),
        ("service:os", "app must be an async function or an object with an async handle(), not module"),
    ],
)
def test_a_failed_start_shows_the_end_of_the_log(app: str, words: str) -> None:
    failed = _run("start", app, "--name", "failing")
    assert (failed.returncode, failed.stdout) == (6, "")
    first, *tail = failed.stderr.splitlines()
    assert first.startswith("harness-ipc: the daemon 'failing' did not start: ")
    assert words in first
    assert str(log_path("failing")) in first
    assert tail
    assert all(line.startswith("    ") for line in tail)
    assert words in "\n".join(tail)
    assert "\x1b" not in failed.stderr
    assert _state("failing") == (3, "absent")


def test_an_invalid_app_is_not_started(private_directories: Path) -> None:
    wrong = _run("start", "service", "--name", "usage")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "is not MODULE:APP" in wrong.stderr
    assert list(private_directories.iterdir()) == []


def test_a_long_start_is_reported_once(here: Path) -> None:
    with _running("start", "service:Slow", "--name", "slow") as start:
        assert start.stderr is not None
        assert start.stderr.readline() == f"harness-ipc: still starting slow; its log is {log_path('slow')}\n"
        # The daemon's first record may come later than the report, which comes after a second.
        wait_until(lambda: _run("status", "--name", "slow").stdout.startswith("slow: starting"))
        assert _state("slow") == (3, "starting")
        wait_until(lambda: daemon_status("slow").progress is not None)
        shown = _run("status", "--name", "slow").stdout
        assert re.search(r"^  since     \d+\.\d s ago$", shown, re.MULTILINE)
        assert '\n  progress  {"loaded": 3, "of": 7}\n' in shown
        (here / "gate").touch()
        out, err = start.communicate(timeout=PATIENCE)
    assert (start.returncode, out, err) == (0, f"slow: pid {identify('slow')} is running\n", "")


def test_a_start_continues_after_its_timeout(here: Path) -> None:
    # Long enough to spawn the daemon on a loaded machine.
    late = _run("start", "service:Slow", "--name", "late", "--timeout", "2" if os.name == "posix" else "8")
    assert (late.returncode, late.stdout) == (4, "")
    assert late.stderr.count("\n") == 1
    (here / "gate").touch()
    wait_until(lambda: daemon_alive("late"))


@needs_posix
def test_on_a_terminal_the_progress_is_one_line_that_goes_away(here: Path) -> None:
    terminal, its_end = os.openpty()
    try:
        with _running("start", "service:Slow", "--name", "slow", stderr=its_end) as start:
            os.close(its_end)
            shown = b""
            while shown.count(b" s") < 2 or b"loaded" not in shown:
                shown += os.read(terminal, 1024)
            (here / "gate").touch()
            assert start.wait(PATIENCE) == 0
            # After the last writer has closed it, Linux raises EIO; other systems report EOF.
            with contextlib.suppress(OSError):
                while data := os.read(terminal, 1024):
                    shown += data
    finally:
        os.close(terminal)
    assert b"\n" not in shown
    assert re.fullmatch(rb'(\rstarting slow: \d+ s(, \{"loaded": 3, "of": 7\})?)+\r +\r', shown)


# status


def test_the_status_of_a_name_that_never_ran_leaves_no_trace(private_directories: Path) -> None:
    assert _state("nobody") == (3, "absent")
    assert _run("list").returncode == 0
    assert list(private_directories.iterdir()) == []


def test_the_status_of_a_running_daemon() -> None:
    pid = _start("healthy", "service:Healthy")
    request("healthy", {"method": "any"})
    assert _state("healthy") == (0, "running")
    shown = _run("status", "--name", "healthy").stdout
    lines = shown.splitlines()
    assert lines[0] == f"healthy: running, pid {pid}"
    assert [line.split()[0] for line in lines[1:]] == [
        *("uptime", "version", "requests", "loop", "health", "command", "directory", "log")
    ]
    # All texts are aligned in one column.
    assert all(re.match(r"  \w[\w ]{8} \S", line) for line in lines[1:])
    assert '  health    healthy: {"upstream": "fine"}' in lines
    assert "  requests  1 answered, 1 with an error; connections: 1" in lines


def test_the_status_after_a_crash_is_stale_until_the_next_start() -> None:
    pid = _start("crashed")
    psutil.Process(pid).kill()
    wait_until(lambda: not daemon_alive("crashed"))
    assert _state("crashed") == (3, "stale")
    problem = "the daemon 'crashed' ended without removing its record: start it again"
    assert f"  problem   {problem}\n" in _run("status", "--name", "crashed").stdout
    assert _start("crashed") != pid
    assert _state("crashed") == (0, "running")


@needs_posix
def test_a_daemon_that_does_not_answer_is_unresponsive() -> None:
    pid = _start("frozen")
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        assert _state("frozen", "--timeout", "0.3") == (4, "unresponsive")
        # A daemon that is alive is neither replaced nor killed.
        started = _run("start", "service:handle", "--name", "frozen", "--timeout", "10")
        assert (started.returncode, started.stdout) == (0, f"frozen: pid {pid} is running\n")
        assert started.stderr.splitlines()[-1].startswith(f"harness-ipc: pid {pid} is alive but does not answer")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: daemon_status("frozen").state == "running")


@needs_posix
def test_a_directory_that_others_can_read_is_forbidden() -> None:
    pid = _start("open")
    directory = runtime_dir()
    directory.chmod(0o755)
    try:
        assert _state("open") == (5, "forbidden")
        for command in (["list"], ["list", "--json"], ["stop", "--name", "open"], ["restart", "--name", "open"]):
            refused = _run(*command)
            assert (refused.returncode, refused.stdout) == (5, "")
            assert f"chmod 700 {directory}" in refused.stderr
    finally:
        directory.chmod(0o700)
    assert identify("open") == pid


def test_a_record_of_a_later_version_is_incompatible() -> None:
    pid = _start("later")
    record = runtime_path("later", "json")
    known = record.read_text(encoding="utf-8")
    try:
        record.write_text(json.dumps({**json.loads(known), "schema": 99}), encoding="utf-8")
        assert _state("later") == (1, "incompatible")
    finally:
        record.write_text(known, encoding="utf-8")
    assert identify("later") == pid


def test_the_defaults_in_the_help_are_the_managers_own() -> None:
    assert parse_arguments(["start", "module:app"]).timeout == manager.START_TIMEOUT
    assert parse_arguments(["restart"]).timeout == manager.START_TIMEOUT
    assert parse_arguments(["stop"]).timeout == manager.STOP_TIMEOUT
    assert parse_arguments(["status"]).timeout == _status.STATUS_TIMEOUT


# list


def test_an_empty_list() -> None:
    shown = _run("list")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "harness-ipc: no daemon is running\n")
    as_json = _run("list", "--json")
    assert (as_json.returncode, as_json.stdout, as_json.stderr) == (0, "[]\n", "")


def test_the_list_is_a_table_and_the_statuses_as_json() -> None:
    healthy, crashed = _start("b-healthy", "service:Healthy"), _start("a")
    psutil.Process(crashed).kill()
    wait_until(lambda: not daemon_alive("a"))
    shown = _run("list")
    assert (shown.returncode, shown.stderr) == (0, "")
    head, *rows = shown.stdout.splitlines()
    assert re.split(r"  +", head) == [
        *("NAME", "STATE", "PID", "UPTIME", "REQUESTS", "ERRORS", "VERSION", "APP", "HEALTH OR PROBLEM")
    ]
    assert [row.split()[:2] for row in rows] == [["a", "stale"], ["b-healthy", "running"]]
    # Numbers are right-aligned, texts left-aligned.
    assert rows[1][: head.index("PID") + 3].endswith(str(healthy))
    for title in ("STATE", "VERSION", "HEALTH"):
        column = head.index(title)
        assert all(row[column - 1] == " " and row[column] != " " for row in rows)
    assert rows[1].endswith('{"upstream": "fine"}')

    as_json = json.loads(_run("list", "--json").stdout)
    assert [(status["name"], status["state"]) for status in as_json] == [("a", "stale"), ("b-healthy", "running")]
    assert {tuple(status) for status in as_json} == {tuple(daemon_status("a").to_json())}


@needs_posix
def test_on_a_terminal_the_table_is_as_wide_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    _start("healthy", "service:Healthy")
    monkeypatch.setenv("COLUMNS", "60")
    terminal, its_end = os.openpty()
    try:
        with _running("list", stdout=its_end) as process:
            assert process.wait(PATIENCE) == 0
        os.close(its_end)
        shown = os.read(terminal, 10000).decode().splitlines()
    finally:
        os.close(terminal)
    assert [len(line) for line in shown] == [60, 60]


# stop and restart


def test_stop_prints_whether_there_was_a_daemon() -> None:
    pid = _start("ends")
    stopped = _run("stop", "--name", "ends")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "ends: stopped\n", "")
    assert not lives(pid)
    assert not runtime_path("ends", "json").exists()
    again = _run("stop", "--name", "ends")
    assert (again.returncode, again.stdout, again.stderr) == (0, "ends: was not running\n", "")
    assert json.loads(_run("stop", "--name", "ends", "--json").stdout) == {"name": "ends", "stopped": False}
    _start("ends")
    assert json.loads(_run("stop", "--name", "ends", "--json").stdout) == {"name": "ends", "stopped": True}


def test_a_long_stop_is_reported(here: Path) -> None:
    pid = _start("drains")
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(request, "drains", {"method": "wait", "params": {"x": 1}}, timeout=PATIENCE)
        wait_until((here / "waiting").exists)
        with _running("stop", "--name", "drains") as stop:
            assert stop.stderr is not None
            assert stop.stderr.readline() == f"harness-ipc: still stopping drains; its log is {log_path('drains')}\n"
            (here / "gate").touch()
            assert stop.communicate(timeout=PATIENCE) == ("drains: stopped\n", "")
        assert stop.returncode == 0
        assert reply.result()["pid"] == pid


def test_restart_keeps_app_and_directory(here: Path, tmp_path_factory: Any) -> None:
    pid = _start("again")
    restarted = _run_process("restart", "--name", "again", cwd=tmp_path_factory.mktemp("elsewhere"))
    new = identify("again")
    assert (restarted.returncode, restarted.stdout, restarted.stderr) == (0, f"again: pid {new} is running\n", "")
    assert new != pid
    assert request("again", {"params": {"x": 4}}) == {"result": 8, "pid": new, "cwd": ROOT}
    assert daemon_status("again").cwd == os.path.realpath(here)
    as_json = json.loads(_run("restart", "--name", "again", "--json").stdout)
    assert (as_json["state"], as_json["pid"]) == ("running", identify("again"))
    assert as_json["pid"] != new


def test_restart_without_a_record() -> None:
    restarted = _run("restart", "--name", "nobody")
    assert (restarted.returncode, restarted.stdout) == (3, "")
    assert restarted.stderr.startswith("harness-ipc: no daemon 'nobody' is running")
    assert restarted.stderr.count("\n") == 1


# logs


def _log(name: str, data: bytes) -> Path:
    path = log_path(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


def test_logs_shows_the_last_lines() -> None:
    path = _log("long", b"".join(b"line %d\n" % number for number in range(100)))
    for options, first in ([], 50), (["-n", "3"], 97), (["-n", "1000"], 0), (["-n", "0"], 100):
        shown = _run("logs", "--name", "long", *options)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout == "".join(f"line {number}\n" for number in range(first, 100))
    path.write_bytes(b"torn\xc3")
    assert _run("logs", "--name", "long").stdout == "torn\\xc3"
    assert _run("logs", "--name", "long", "-n", "-1").returncode == 2


def test_the_log_of_a_daemon_that_was_started() -> None:
    pid = _start("started")
    shown = _run("logs", "--name", "started")
    assert f"starting started: pid {pid}" in shown.stdout
    assert shown.stdout.splitlines()[0].startswith("--- ")


@pytest.mark.parametrize("option", [[], ["-f"]])
def test_a_log_that_is_not_there(option: list[str], private_directories: Path) -> None:
    missing = _run("logs", "--name", "nobody", *option)
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (3, "", 1)
    assert str(log_path("nobody")) in missing.stderr
    assert list(private_directories.iterdir()) == []


def _assert_log_refused(name: str) -> None:
    for option in [], ["-f"]:
        refused = _run("logs", "--name", name, *option)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (5, "", 1), refused.stderr
        assert str(log_path(name)) in refused.stderr


def test_a_log_that_is_something_else() -> None:
    log_path("odd").mkdir(parents=True, mode=0o700)
    _assert_log_refused("odd")


@needs_posix
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "open to others", "in an open directory"])
def test_a_log_that_is_not_private_is_refused(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("what is elsewhere\n", encoding="utf-8")
    path = _log("odd", b"planted\n")
    if kind == "FIFO" or kind.endswith("link"):
        path.unlink()
    if kind == "FIFO":
        os.mkfifo(path, 0o600)
    elif kind.endswith("link"):
        path.symlink_to(secret if kind == "link" else tmp_path / "nothing")
    elif kind == "open to others":
        path.chmod(0o644)
    else:
        path.parent.chmod(0o777)
    if kind == "in an open directory":
        refused = _run("logs", "--name", "odd")
        assert (refused.returncode, refused.stdout) == (5, "")
        assert f"chmod 700 {path.parent}" in refused.stderr
    else:
        _assert_log_refused("odd")


@needs_root
def test_a_log_of_another_user_is_refused() -> None:
    os.chown(_log("odd", b"planted\n"), 65534, 65534)
    _assert_log_refused("odd")


@needs_posix
def test_a_log_that_is_replaced_by_a_link_ends_the_following(tmp_path: Path) -> None:
    path = _log("odd", b"first\n")
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("what is elsewhere\n", encoding="utf-8")
    with _running("logs", "--name", "odd", "-f") as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == "first\n"
        path.unlink()
        path.symlink_to(secret)
        out, err = logs.communicate(timeout=PATIENCE)
        assert (logs.returncode, out) == (5, "")
        assert f"{path} is a symbolic link" in err


@needs_posix
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_a_failed_start_shows_nothing_of_a_replaced_log(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("what is elsewhere\n", encoding="utf-8")
    replace = f"os.symlink({str(secret)!r}, log)" if kind == "link" else "os.mkfifo(log, 0o600)"
    source = f"import os; log = {str(log_path('odd'))!r}; os.unlink(log); {replace}; os._exit(3)"
    with pytest.raises(StartFailed) as caught:
        manager.ensure_daemon("odd", [sys.executable, "-c", source], timeout=PATIENCE)
    assert "status 3" in str(caught.value)
    assert (caught.value.log_tail, "elsewhere" in str(caught.value)) == ("", False)


def test_control_characters_in_a_log_are_escaped() -> None:
    hostile = "red \x1b[31m title \x1b]0;x\x07 back\x08\r one byte \u009b2J reversed \u202e line \u2028 tab\tüé😀\r\n"
    _log("hostile", hostile.encode() + b"bytes \xff\xfe\n")
    shown = _run("logs", "--name", "hostile").stdout
    assert shown == (
        "red \\x1b[31m title \\x1b]0;x\\x07 back\\x08\\r one byte \\x9b2J reversed \\u202e line \\u2028 tab\tüé😀\n"
        "bytes \\xff\\xfe\n"
    )
    ascii_only = _run_process("logs", "--name", "hostile", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0
    assert "tab\t\\xfc\\xe9\\U0001f600\n" in ascii_only.stdout


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(data)


def test_following_a_log_through_its_rotation() -> None:
    path = _log("followed", b"one\ntwo\nthree\n")
    with _running("logs", "--name", "followed", "-n", "2", "-f") as logs:
        assert logs.stdout is not None
        assert [logs.stdout.readline() for _ in range(2)] == ["two\n", "three\n"]
        _append(path, b"four \xc3")
        _append(path, b"\xbc\n")
        assert logs.stdout.readline() == "four ü\n"
        # Rotate the log as a daemon does.
        _append(path, b"the last of the old\n")
        _append(path.with_name("followed.log.1"), path.read_bytes())
        os.truncate(path, 0)
        _append(path, b"the first of the new\n")
        assert logs.stdout.readline() == "the last of the old\n"
        assert logs.stdout.readline() == "the first of the new\n"
        path.write_bytes(b"cut\n")
        assert logs.stdout.readline() == "cut\n"
        _append(path, b"\x1b[2J\n")
        assert logs.stdout.readline() == "\\x1b[2J\n"
        if sys.platform != "win32":
            logs.send_signal(signal.SIGINT)
            assert logs.communicate(timeout=PATIENCE) == ("", "")
            assert logs.returncode == 130


def test_following_the_log_of_a_daemon() -> None:
    _start("lively")
    with _running("logs", "--name", "lively", "-n", "1", "-f") as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() != ""
        _run("stop", "--name", "lively")
        _start("lively")
        assert any("ready at" in line for line in iter(logs.stdout.readline, ""))


@needs_posix
def test_following_ends_silently_with_its_reader() -> None:
    path = _log("piped", b"one\n")
    with _running("logs", "--name", "piped", "-f") as logs:
        assert logs.stdout is not None
        assert logs.stderr is not None
        assert logs.stdout.readline() == "one\n"
        logs.stdout.close()
        _append(path, b"two\n")
        assert logs.stderr.read() == ""
        assert logs.wait(PATIENCE) == 1


# doctor and the rest


def test_doctor_reports_for_people_and_for_programs(private_directories: Path) -> None:
    shown, as_json = _run("doctor"), _run("doctor", "--json")
    report = json.loads(as_json.stdout)
    assert shown.returncode == as_json.returncode == (0 if report["ok"] else 1)
    assert len(shown.stdout.splitlines()) == len(report["findings"])
    assert shown.stderr == as_json.stderr == ""
    assert list(private_directories.iterdir()) == []


@needs_posix
def test_doctor_finds_a_directory_that_others_can_read() -> None:
    pid = _start("open")
    directory = runtime_dir()
    directory.chmod(0o755)
    try:
        found = _run("doctor")
    finally:
        directory.chmod(0o700)
    assert found.returncode == 1
    assert f"chmod 700 {directory}" in found.stdout
    assert identify("open") == pid


def test_frequent_commands_import_nothing_heavy() -> None:
    _start("light")
    heavy = ("asyncio", "filelock", "psutil", "harness_ipc.manager", "harness_ipc.daemon", "logging")
    for command in (
        ["ping", "--name", "light"],
        ["call", "--name", "light", '{"params": {"x": 1}}'],
        ["call", "--name", "light", "m", "x:=1"],
    ):
        source = (
            "import sys\nfrom harness_ipc import cli\n"
            f"assert cli.main({command!r}) == 0\n"
            f"print([name for name in {heavy!r} if name in sys.modules])"
        )
        run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == "[]", command
