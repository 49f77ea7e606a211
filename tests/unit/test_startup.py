"""The ready pipe between a starter and its child."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import startup
from harness_ipc.errors import AlreadyRunning
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, wait_until


@pytest.mark.parametrize("value", ["", "{", "7", "[]", "{}", '{"fd": "x"}', '{"fd": -1, "inode": 1}', '{"fd": 99999}'])
def test_without_a_starter_nothing_is_sent_and_nothing_fails(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.VARIABLE, value)
    with startup.reporting() as pipe:
        pipe.send(state="ready")
        pipe.close()
        pipe.send(state="later")
    assert startup.VARIABLE not in os.environ
    assert "runtime_dir" not in pipe.start


def set_start(monkeypatch: pytest.MonkeyPatch, descriptor: int, **more: Any) -> None:
    start = {"fd": descriptor, "inode": os.fstat(descriptor).st_ino, **more}
    monkeypatch.setenv(startup.VARIABLE, json.dumps(start))


@needs_posix
def test_an_error_in_the_block_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    set_start(monkeypatch, writer)

    def start() -> None:
        with startup.reporting() as pipe:
            assert not os.get_inheritable(writer)
            pipe.send(state="starting")
            raise AlreadyRunning("by another")

    with pytest.raises(AlreadyRunning):
        start()
    with open(reader, "rb") as file:
        messages = [json.loads(line) for line in file]
    failed = {"state": "failed", "type": "AlreadyRunning", "message": "by another", "reason": "by another"}
    assert messages == [{"state": "starting"}, failed]


@needs_posix
def test_a_start_does_not_need_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    set_start(monkeypatch, writer, detached="session", runtime_dir="/run", log_dir="/log")
    with startup.reporting() as pipe:
        pipe.send(state="ready")
        assert [pipe.start[key] for key in ("detached", "runtime_dir", "log_dir")] == ["session", "/run", "/log"]


@needs_posix
def test_a_starter_that_does_not_read_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    set_start(monkeypatch, writer)
    pipe = startup.ReadyPipe(os.environ[startup.VARIABLE], send_timeout=0.05)
    for _ in range(1000):
        pipe.send_progress("x" * 3900)
    pipe.send(state="failed", message="y" * 3900)
    received = os.read(reader, 1 << 20)
    pipe.send(state="ready")
    pipe.close()
    received += os.read(reader, 1 << 20)
    os.close(reader)
    messages = [json.loads(line) for line in received.splitlines()]
    assert messages.pop() == {"state": "ready"}
    assert 0 < len(messages) < 1000
    assert messages == [{"state": "progress", "value": "x" * 3900}] * len(messages)


@needs_posix
@pytest.mark.parametrize("kind", ["file", "another pipe"])
def test_a_reused_descriptor_is_not_touched(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The pipe was closed, and its descriptor reused.
    reader, writer = os.pipe()
    set_start(monkeypatch, writer, runtime_dir="/run", log_dir="/log")
    other = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT) if kind == "file" else os.pipe()[1]
    os.dup2(other, writer)
    with startup.reporting() as pipe:
        pipe.send(state="ready")
        pipe.close()
        # As by a wrapper: the description of the start is known.
        assert (pipe.start["runtime_dir"], pipe.start["log_dir"]) == ("/run", "/log")
    assert os.path.sameopenfile(writer, other)
    assert os.read(reader, 100) == b""
    assert kind != "file" or (tmp_path / "data").read_bytes() == b""
    for descriptor in (reader, writer, other):
        os.close(descriptor)


@needs_posix
def test_a_pipe_closed_during_the_start_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    set_start(monkeypatch, writer)
    with startup.reporting() as pipe:
        os.close(writer)
        assert os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT) == writer
        pipe.send(state="ready")
        pipe.close()
        pipe.send(state="later")
    os.fstat(writer)
    assert (tmp_path / "data").read_bytes() == b""
    os.close(writer)
    os.close(reader)


@contextlib.contextmanager
def child(code: str, log: Path) -> Iterator[startup.Child]:
    with open(log, "ab") as file:
        argv = [sys.executable, "-c", code]
        started = startup.Child(argv, start={}, environment=os.environ, cwd=None, log=file.fileno())
    try:
        yield started
    finally:
        started.close()


def exit_status(started: startup.Child) -> int | None:
    wait_until(lambda: started.process.poll() is not None)
    return started.process.returncode


def test_a_childs_messages_arrive(tmp_path: Path) -> None:
    code = (
        "from harness_ipc import startup\n"
        "with startup.reporting() as pipe:\n"
        "    pipe.send(state='ready', how=pipe.start['detached'])\n"
        "    pipe.send(state='large', text='x' * 200_000)\n"
        "    pipe.close()\n"
        "    import sys; print('told', file=sys.stderr); print(repr(sys.stdin.read()), file=sys.stderr); print('printed')\n"
    )
    with child(code, tmp_path / "log") as started:
        message = started.next_message(PATIENCE)
        assert message is not None
        assert message["state"] == "ready"
        assert message["how"] in (("session",) if os.name == "posix" else ("breakaway", "job"))
        assert started.next_message(PATIENCE) == {"state": "large", "text": "x" * 200_000}
        assert started.next_message(PATIENCE) is None
        assert exit_status(started) == 0
    assert (tmp_path / "log").read_text().split() == ["told", "''", "printed"]


ENDINGS = {"raise SystemExit(3)": 3, "import os; os._exit(200)": 200}
if os.name == "posix":
    ENDINGS |= {f"import os; os.kill(os.getpid(), {number})": -number for number in (9, 15)}


@pytest.mark.parametrize("code", ENDINGS)
def test_the_exit_status_or_signal_of_a_child_is_passed_on(code: str, tmp_path: Path) -> None:
    with child(code, tmp_path / "log") as started:
        assert started.next_message(PATIENCE) is None
        assert exit_status(started) == ENDINGS[code]


def test_waiting_for_a_message_ends_in_time(tmp_path: Path) -> None:
    code = (
        "import threading\n"
        "from harness_ipc import startup\n"
        "with startup.reporting() as pipe:\n"
        "    pipe.send(state='here')\n"
        "    threading.Event().wait()\n"
    )
    with child(code, tmp_path / "log") as started:
        # Not before: Wine does not close the pipe of a process that is killed while it is created.
        assert started.next_message(PATIENCE) == {"state": "here"}
        begin = time.monotonic()
        assert started.next_message(0.05) is None
        assert 0.04 < time.monotonic() - begin < PATIENCE / 2
        # On POSIX it is the launcher, which passes it on.
        started.process.terminate()
        assert started.next_message(PATIENCE) is None
        assert exit_status(started) != 0


@needs_posix
def test_a_released_child_runs_without_launcher_or_zombie(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from harness_ipc import startup\n"
        "with startup.reporting() as pipe:\n"
        "    launcher = os.getppid()\n"
        "    pipe.send(pid=os.getpid())\n"
        "    while os.getppid() == launcher: time.sleep(0.01)\n"
        "    print('alone', flush=True, file=__import__('sys').stderr)\n"
    )
    with child(code, tmp_path / "log") as started:
        message = started.next_message(PATIENCE)
        assert message is not None
        assert message["pid"] != started.process.pid
    with pytest.raises(ChildProcessError):
        os.waitpid(started.process.pid, os.WNOHANG)
    wait_until(lambda: (tmp_path / "log").read_text() == "alone\n")


def test_a_program_that_cannot_be_started_leaves_no_descriptor(tmp_path: Path) -> None:
    before = os.dup(0)
    os.close(before)
    with pytest.raises(OSError), open(tmp_path / "log", "ab") as log:  # noqa: PT011 - it depends on the system which
        startup.Child(["program"], start={}, environment=os.environ, cwd=str(tmp_path / "nothing"), log=log.fileno())
    after = os.dup(0)
    os.close(after)
    assert after == before


@needs_posix
def test_a_program_that_cannot_be_executed_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "log", "ab") as log:
        started = startup.Child([str(tmp_path / "nothing")], start={}, environment={}, cwd=None, log=log.fileno())
    assert started.next_message(PATIENCE) == {"state": "refused", "errno": 2}
    started.close()
