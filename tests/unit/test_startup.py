"""The pipe between a starter and its child: what is said arrives, and nobody is disturbed when nobody listens."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from harness_ipc import startup
from harness_ipc.errors import AlreadyRunning
from tests.marks import needs_posix
from tests.processes import PATIENCE


@pytest.mark.parametrize("value", ["", "{", "7", "[]", "{}", '{"fd": "x"}', '{"fd": -1}', '{"fd": 99999}'])
def test_without_a_starter_nothing_is_said_and_nothing_fails(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.VARIABLE, value)
    with startup.reporting() as report:
        report.send(state="ready")
        report.close()
        report.send(state="later")
    assert startup.VARIABLE not in os.environ
    assert report.detached is None


@needs_posix
def test_what_ends_the_block_is_told_and_the_pipe_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(
        startup.VARIABLE, json.dumps({"fd": writer, "detached": "session", "runtime_dir": "/run", "log_dir": "/log"})
    )

    def start() -> None:
        with startup.reporting() as report:
            assert not os.get_inheritable(writer)
            report.send(state="starting")
            raise AlreadyRunning("by another")

    with pytest.raises(AlreadyRunning):
        start()
    with open(reader, "rb") as pipe:
        words = [json.loads(line) for line in pipe]
    assert words == [{"state": "starting"}, {"state": "failed", "type": "AlreadyRunning", "message": "by another"}]


@needs_posix
def test_a_starter_that_has_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setenv(
        startup.VARIABLE, json.dumps({"fd": writer, "detached": "session", "runtime_dir": "/run", "log_dir": "/log"})
    )
    with startup.reporting() as report:
        report.send(state="ready")
        assert report.detached == "session"
        assert report.places == {"runtime_dir": "/run", "log_dir": "/log"}


def child(code: str, log: Path) -> startup.Child:
    with open(log, "ab") as file:
        return startup.Child([sys.executable, "-c", code], places={}, environment=os.environ, cwd=None, stderr=file.fileno())


def test_a_childs_words_arrive_and_its_end_is_no_zombie(tmp_path: Path) -> None:
    code = (
        "from harness_ipc import startup\n"
        "with startup.reporting() as report:\n"
        "    report.send(state='ready', how=report.detached)\n"
        "    report.close()\n"
        "    import sys; print('told', file=sys.stderr); print(repr(sys.stdin.read()), file=sys.stderr); print('nowhere')\n"
    )
    started = child(code, tmp_path / "log")
    word = started.next_word(PATIENCE)
    assert word is not None
    assert word["state"] == "ready"
    assert word["how"] in (("session",) if os.name == "posix" else ("breakaway", "job"))
    assert started.next_word(PATIENCE) is None
    assert started.process.wait(PATIENCE) == 0
    assert (tmp_path / "log").read_text().split() == ["told", "''"]


def test_a_child_that_dies_says_nothing_more(tmp_path: Path) -> None:
    started = child("raise SystemExit(3)", tmp_path / "log")
    assert started.next_word(PATIENCE) is None
    assert started.process.wait(PATIENCE) == 3


def test_waiting_for_a_word_ends_in_time(tmp_path: Path) -> None:
    code = (
        "import threading\n"
        "from harness_ipc import startup\n"
        "with startup.reporting() as report:\n"
        "    report.send(state='here')\n"
        "    threading.Event().wait()\n"
    )
    started = child(code, tmp_path / "log")
    try:
        # Not before: Wine does not close the pipe of a process that is killed while it comes into being.
        assert started.next_word(PATIENCE) == {"state": "here"}
        with pytest.raises(TimeoutError):
            started.next_word(0.05)
    finally:
        started.process.kill()
    assert started.next_word(PATIENCE) is None


def test_what_cannot_be_started_leaves_no_descriptor(tmp_path: Path) -> None:
    before = os.dup(0)
    os.close(before)
    with pytest.raises(OSError), open(tmp_path / "log", "ab") as log:  # noqa: PT011 - it depends on the system which
        startup.Child([str(tmp_path / "nothing")], places={}, environment=os.environ, cwd=None, stderr=log.fileno())
    after = os.dup(0)
    os.close(after)
    assert after == before
