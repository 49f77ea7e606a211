"""Clients start a daemon that is absent or stopping; no request runs twice."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import (
    Client,
    DaemonNotRunning,
    DaemonTimeout,
    IncompatibleDaemon,
    StartFailed,
    aconnect_daemon,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    request,
    stop_daemon,
)
from tests.support.managed import kill_all
from tests.support.processes import PATIENCE, wait_until

PROGRAM = """
import asyncio, os, sys, time
from harness_ipc import run_daemon

class App:
    async def start(self):
        await asyncio.sleep({slow})

    async def handle(self, message):
        await asyncio.sleep(message.get("seconds", 0))
        with open({log!r}, "a") as file:
            file.write(f"{{message['n']}}\\n")
        return {{"result": os.getpid()}}

if __name__ == "__main__":
    run_daemon(App(), "test", idle_timeout={idle}, grace_period={grace}, app_version={version!r})
"""


class Daemon:
    """The command line of a daemon, and the numbers of the requests that its generations have run."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self._log = directory / "ran"
        self._log.touch()
        settings = {"slow": 0.0, "idle": 3600.0, "grace": 5.0, "version": None, **options}
        self.program = PROGRAM.format(log=str(self._log), **settings)
        self.command = [sys.executable, "-c", self.program]

    @property
    def ran(self) -> list[int]:
        return [int(line) for line in self._log.read_text().split()]


@pytest.fixture(autouse=True)
def ended(private_directories: Path) -> Iterator[None]:
    """Stop all daemons at the end of the test."""
    yield
    stop_daemon("test", timeout=5.0)
    kill_all()


def ask_once(start: Any, n: int, **options: Any) -> Any:
    return request("test", {"n": n}, start=start, **options)["result"]


def ask_kept(start: Any, n: int, **options: Any) -> Any:
    with connect_daemon("test", start=start, **options) as client:
        return client.request({"n": n})["result"]


def ask_async(start: Any, n: int, **options: Any) -> Any:
    async def main() -> Any:
        async with await aconnect_daemon("test", start=start, **options) as client:
            return (await client.request({"n": n}))["result"]

    return asyncio.run(main())


CLIENTS = pytest.mark.parametrize("ask", [ask_kept, ask_async])
ALL = pytest.mark.parametrize("ask", [ask_once, ask_kept, ask_async])


@ALL
def test_an_absent_daemon_is_started_and_a_running_one_is_used(ask: Any, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    pid = ask(daemon.command, 1)
    assert ask(daemon.command, 2) == pid
    assert daemon.ran == [1, 2]
    assert stop_daemon("test")
    assert ask(daemon.command, 3) != pid


@ALL
def test_a_daemon_stopped_during_its_start_is_started_again(ask: Any, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    # The first daemon never becomes ready.
    begun = tmp_path / "begun"
    once = f"sleep(0 if os.path.exists({str(begun)!r}) else open({str(begun)!r}, 'w').close() or 3600)"
    slow = daemon.program.replace("sleep(0.0)", once)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask([sys.executable, "-c", slow], 1)))
    asking.start()
    wait_until(begun.exists)
    assert stop_daemon("test")
    asking.join(PATIENCE)
    assert answers == [daemon_status("test").pid]
    assert daemon.ran == [1]


def test_a_kept_client_starts_it_again(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    with connect_daemon("test", start=daemon.command) as client:
        first = client.request({"n": 1})["result"]
        assert stop_daemon("test")
        assert client.request({"n": 2})["result"] == client.pid != first
    assert daemon.ran == [1, 2]


@ALL
def test_an_app_is_started_by_its_name(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(tmp_path)
    (tmp_path / "service.py").write_text(daemon.program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pid = ask("service:App", 1)
    assert ask("service:App", 2) == pid == ensure_daemon("test", "service:App").pid
    assert daemon.ran == [1, 2]
    assert stop_daemon("test")
    with pytest.raises(StartFailed, match="service:Missing can't be loaded"):
        ask("service:Missing", 3)


@ALL
def test_a_function_starts_the_daemon(ask: Any, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    calls: list[int] = []

    def start() -> None:
        calls.append(1)
        ensure_daemon("test", daemon.command)

    pid = ask(start, 1)
    assert ask(start, 2) == pid
    assert stop_daemon("test")
    assert ask(start, 3) != pid
    assert (len(calls), daemon.ran) == (2, [1, 2, 3])


@ALL
def test_errors_of_a_start_function(ask: Any) -> None:
    async def start() -> None: ...

    def fail() -> None:
        raise OSError("no such unit")

    with pytest.raises(TypeError, match="returned coroutine"):
        ask(start, 1)
    with pytest.raises(OSError, match="no such unit"):
        ask(fail, 1)
    with pytest.raises(DaemonNotRunning, match="the start function has returned, but no daemon 'test' is running") as caught:
        ask(lambda: None, 1)
    assert not caught.value.maybe_executed


def function_starting(daemon: Daemon) -> Any:
    return lambda: ensure_daemon("test", daemon.command)


@CLIENTS
@pytest.mark.parametrize("form", [lambda daemon: daemon.command, function_starting])
def test_another_version_is_an_error_or_replaced(ask: Any, form: Any, tmp_path: Path) -> None:
    old, new = form(Daemon(tmp_path, version="1")), form(Daemon(tmp_path, version="2"))
    pid = ask(old, 1, version="1")
    for start in (None, new):
        with pytest.raises(IncompatibleDaemon, match="the running daemon 'test' has version 1, not 2") as caught:
            ask(start, 2, version="2")
        assert not caught.value.maybe_executed
    second = ask(new, 3, version="2", on_mismatch="restart")
    assert second != pid
    assert ask(new, 4, version="2", on_mismatch="restart") == second
    # The command line starts yet another version.
    with pytest.raises(IncompatibleDaemon, match="has version 1, not 3"):
        ask(old, 5, version="3", on_mismatch="restart")
    assert Daemon(tmp_path).ran == [1, 3, 4]


def test_a_daemon_without_a_version_has_to_be_given_one(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    ensure_daemon("test", daemon.command)
    for use in (lambda: connect_daemon("test", version="2"), lambda: ensure_daemon("test", daemon.command, version="2")):
        with pytest.raises(IncompatibleDaemon, match="its run_daemon has no app_version"):
            use()


def test_a_client_that_may_restart_needs_a_start() -> None:
    with pytest.raises(ValueError, match="needs `start`"):
        connect_daemon("test", version="1", on_mismatch="restart")


def test_a_kept_client_does_not_ask_another_version(tmp_path: Path) -> None:
    old, new = Daemon(tmp_path, version="1"), Daemon(tmp_path, version="2")
    with connect_daemon("test", start=old.command, version="1") as client:
        client.request({"n": 1})
        assert stop_daemon("test")
        ensure_daemon("test", new.command)
        with pytest.raises(IncompatibleDaemon, match="has version 2, not 1"):
            client.request({"n": 2})
    assert old.ran == [1]


def test_without_a_start_command_nothing_is_started(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning):
        request("test", {"n": 1})
    with pytest.raises(DaemonNotRunning):
        connect_daemon("test")


def test_a_start_has_its_own_timeout(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, slow=2.0)
    assert ask_once(daemon.command, 1, timeout=1.5) > 0
    assert stop_daemon("test")
    with pytest.raises(DaemonTimeout, match="starting") as caught:
        ask_once(daemon.command, 2, start_timeout=0.3)
    assert not caught.value.maybe_executed
    assert daemon.ran == [1]


def test_a_failed_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="boom") as caught:
        ask_once([sys.executable, "-c", "raise SystemExit('boom')"], 1)
    assert not caught.value.maybe_executed
    commands: list[Any] = ["python service.py", []]
    for command in commands:
        with pytest.raises((TypeError, ValueError)):
            request("test", {"n": 1}, start=command)


def test_the_deadline_includes_a_draining_predecessor(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, grace=PATIENCE)
    pid = ask_once(daemon.command, 1)
    client = Client("test", timeout=PATIENCE)
    running = threading.Thread(target=client.request, args=[{"n": 2, "seconds": 2}])
    running.start()
    wait_until(lambda: request("test", {"meta": "ping"})["connections"] == 2)
    assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
    wait_until(lambda: daemon_status("test").state == "absent")
    with pytest.raises(DaemonTimeout, match=f"pid {pid}, was still stopping") as caught:
        ask_once(daemon.command, 3, timeout=0.3)
    assert not caught.value.maybe_executed
    assert ask_once(daemon.command, 4, timeout=PATIENCE) != pid
    running.join(PATIENCE)
    client.close()
    assert daemon.ran == [1, 2, 4]


def test_the_loop_turns_while_a_daemon_starts(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, slow=0.5)

    async def main() -> int:
        turns = 0
        connecting = asyncio.create_task(aconnect_daemon("test", start=daemon.command))
        while not connecting.done():
            await asyncio.sleep(0.01)
            turns += 1
        await connecting.result().close()
        return turns

    assert asyncio.run(main()) > 10


def test_threads_that_find_no_daemon_start_one(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    pids: list[int] = []
    with contextlib.closing(Client("test", start=daemon.command)) as client:
        threads = [threading.Thread(target=lambda n=n: pids.append(client.request({"n": n})["result"])) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(pids) == 8
    assert len(set(pids)) == 1
    assert sorted(daemon.ran) == [*range(8)]
