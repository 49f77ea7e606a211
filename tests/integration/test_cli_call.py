"""`harness-ipc call` and `describe`: stdout, stderr and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness_ipc import Namespace, connect_daemon
from tests.support.commands import run_command
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, spawn_daemon, spawn_python

SERVICE = """
import asyncio
from collections.abc import AsyncIterator
from harness_ipc import RemoteError, Service, method, report, run_daemon

class Words(Service):
    @method
    async def count(self, text: str, times: int = 1) -> int:
        \"\"\"Count the words of a text.

        All of them.
        \"\"\"
        return len(text.split()) * times

    @method
    async def items(self, n: int) -> AsyncIterator[dict]:
        for i in range(n):
            yield {"done": i, "total": n}

    @method
    async def work(self, fail: bool = False) -> str:
        for i in range(3):
            await report({"done": i, "total": 2})
        await report("nearly")
        if fail:
            raise RemoteError("not now", type="Closed")
        return "worked"

    @method
    async def hang(self) -> AsyncIterator[str]:
        yield "begun"
        try:
            await asyncio.Event().wait()
        finally:
            print("cancelled", flush=True)

run_daemon(Words(), "words", app_version="7", on_ready=lambda _: print("ready", flush=True))
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    """The runtime directory of the daemon that the module's tests share."""
    with (
        tempfile.TemporaryDirectory(prefix="hi-", ignore_cleanup_errors=True) as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("HARNESS_IPC_RUNTIME_DIR", directory)
        patch.setenv("HARNESS_IPC_LOG_DIR", directory)
        with spawn_words():
            yield directory


@pytest.fixture
def words(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", directory)


@contextlib.contextmanager
def spawn_words() -> Iterator[DaemonProcess]:
    with spawn_python("-c", SERVICE) as daemon:
        assert daemon.read_line() == "ready"
        yield daemon


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "harness_ipc", *arguments]


def run(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Return the exit status and the lines of stdout and stderr."""
    done = run_command(*arguments)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def call(*arguments: str) -> tuple[int, list[str], list[str]]:
    return run("call", "--name", "words", *arguments)


@pytest.mark.usefixtures("words")
def test_a_result_is_one_line_of_json() -> None:
    assert call("count", "text=a b=c") == (0, ["2"], [])
    assert call("count", "text=", "times:=3") == (0, ["0"], [])
    assert call("count", 'text:="a b"', "times:= 2 ") == (0, ["4"], [])
    # A message is sent unchanged, and its reply is printed unchanged.
    assert call('{"method": "count", "params": {"text": "a"}}') == (0, ['{"result": 1}'], [])


@pytest.mark.usefixtures("words")
def test_a_stream_is_a_line_for_each_item() -> None:
    assert call("items", "n:=2") == (0, ['{"done": 0, "total": 2}', '{"done": 1, "total": 2}'], [])
    assert call("items", "n:=0") == (0, [], [])
    assert call('{"method": "items", "params": {"n": 1}, "more": true}') == (0, ['{"done": 0, "total": 1}'], [])


@pytest.mark.usefixtures("words")
def test_progress_goes_to_stderr() -> None:
    status, out, errors = call("work")
    assert (status, out) == (0, ['"worked"'])
    assert [json.loads(line) for line in errors] == [*({"done": i, "total": 2} for i in range(3)), "nearly"]
    status, out, errors = call("work", "fail:=true")
    assert (status, out, errors[-1]) == (1, [], "harness-ipc: Closed: not now")


@needs_posix
@pytest.mark.usefixtures("words")
def test_progress_on_a_terminal_is_a_bar() -> None:
    import pty

    terminal, end = pty.openpty()
    with subprocess.Popen(command("call", "--name", "words", "work"), stdout=subprocess.PIPE, stderr=end) as process:
        os.close(end)
        shown = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown += chunk
        except OSError:  # Linux raises EIO once the terminal's last writer has closed it
            pass
        finally:
            os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.read() == b'"worked"\n'
    bars = [part.strip() for part in shown.decode().replace("\r\n", "\n").split("\r") if part.strip()]
    assert bars[:2] == [f"[{'':30}]   0%  0 of 2", f"[{'#' * 15:30}]  50%  1 of 2"]
    # The bar is removed before anything else is printed.
    assert bars[2:] == [f"[{'#' * 30}] 100%  2 of 2", '"nearly"']


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["cuont", "text=a"], 1, "MethodNotFound: there is no method 'cuont', did you mean 'count'?"),
        (["count", "txt=a"], 1, "there is no 'txt', did you mean 'text'?"),
        (["count", "text=a", "times=2"], 1, "times: expected int, got str '2' (write KEY:=JSON for a value that is not text)"),
        (["count", "text"], 2, "'text' is not KEY=TEXT or KEY:=JSON"),
        (["count", "=a"], 2, "is not KEY=TEXT"),
        (["count", "times:=x"], 2, "is not valid JSON"),
        (["count", "text=a", "text:=1"], 2, "the parameter 'text' is given twice"),
        (['{"method": "count"}', "text=a"], 2, "a JSON message takes no further arguments"),
        (['{"method": "count", "params": [], "more": true}'], 2, 'a message with "more" needs a "method"'),
        (["--timeout", "0.2", "hang"], 4, "timed out"),
    ],
)
@pytest.mark.usefixtures("words")
def test_errors_are_one_line(arguments: list[str], status: int, text: str) -> None:
    failed = run_command("call", "--name", "words", *arguments)
    assert (failed.returncode, failed.stderr.count("\n")) == (status, 1)
    assert failed.stderr.startswith("harness-ipc: ")
    assert text in failed.stderr


@needs_posix
def test_ctrl_c_cancels_the_method_and_exits_with_130() -> None:
    hang = command("call", "--name", "words", "hang")
    with spawn_words() as words, subprocess.Popen(hang, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b'"begun"\n'
        process.send_signal(signal.SIGINT)
        assert words.read_line() == "cancelled"
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == b""
        assert call("count", "text=a") == (0, ["1"], [])


@pytest.mark.parametrize("app", ["service:Words", "service:words"])
def test_a_service_is_served_by_its_class_or_an_instance(app: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "from harness_ipc import Service, method\nclass Words(Service):\n  @method\n  def double(self, n: int): return n * 2\n"
    )
    (tmp_path / "service.py").write_text(f"{text}words = Words()\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with spawn_python("-m", "harness_ipc", "serve", app, "--name", "words") as daemon:
        assert daemon.read_line().startswith("words: pid ")
        assert call("double", "n:=21") == (0, ["42"], [])
        assert run("stop", "--name", "words")[0] == daemon.wait() == 0


def test_methods_of_a_plain_handler() -> None:
    with spawn_daemon("words", app_version="7"):
        assert call("echo", "a=1") == (0, ['{"a": "1"}'], [])
        assert call("fail health") == (0, ["null"], [])
        assert call("raise", "text=so") == (1, [], ["harness-ipc: ValueError: so"])


# The description of a daemon.


@pytest.mark.usefixtures("words")
def test_describe_shows_methods_and_versions() -> None:
    status, out, errors = run("describe", "--name", "words")
    assert (status, errors) == (0, [])
    assert out[0].startswith("words: app 7, harness_ipc ")
    assert out[1:] == [
        "  count(text: str, times: int = 1) -> int",
        "      Count the words of a text.",
        "  hang() -> collections.abc.AsyncIterator[str]",
        "  items(n: int) -> collections.abc.AsyncIterator[dict]",
        "  work(fail: bool = False) -> str",
    ]
    status, out, _ = run("describe", "--name", "words", "--json")
    with connect_daemon("words") as client:
        assert json.loads(out[0]) == client.describe()


def test_a_plain_handler_has_no_methods() -> None:
    with spawn_daemon("words", app_version="7"), connect_daemon("words") as client:
        described = client.describe()
        assert described["methods"] == []
        assert (described["name"], described["app_version"]) == ("words", "7")


def test_commands_without_a_daemon_create_nothing() -> None:
    for words in (["describe"], ["call", "count"]):
        assert run(words[0], "--name", "words", *words[1:]) == (3, [], ["harness-ipc: " + NOT_RUNNING])
    assert not os.path.exists(Namespace().runtime_dir)


NOT_RUNNING = "no daemon 'words' is running: start it first"
