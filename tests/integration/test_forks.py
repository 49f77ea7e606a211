"""Forked children of an app hold no resources of the daemon."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness_ipc import (
    ConnectionLost,
    DaemonNotRunning,
    cleanup_endpoint,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    log_path,
    request,
    runtime_dir,
    stop_daemon,
)
from tests.support.managed import at_once, kill_all
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, lives, wait_until

pytestmark = needs_posix

# Its methods fork children in several ways; "ask" replies while they run.
PROGRAM = """
import asyncio, multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from harness_ipc import run_daemon

def sleep(running):
    running.set()
    time.sleep(3600)

def work():
    return os.getpid()

class App:
    async def start(self):
        self.children = []
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))

    async def handle(self, message):
        loop = asyncio.get_running_loop()
        match message["method"]:
            case "pool":
                return {"result": await loop.run_in_executor(self.pool, work)}
            case "process":
                context = multiprocessing.get_context("fork")
                running = context.Event()
                child = context.Process(target=sleep, args=(running,))
                child.start()
                running.wait()
                self.children.append(child)
                return {"result": child.pid}
            case "fork":
                pid = os.fork()
                if pid == 0:
                    time.sleep(3600)
                return {"result": pid}
            case "leave":
                pid = os.fork()
                if pid == 0:
                    print("a child says this", end="")
                    how = message["how"]
                    if how == "return":
                        return {"result": "the child's"}
                    raise ValueError("the child's") if how == "raise" else SystemExit(how)
                return {"result": (await loop.run_in_executor(None, os.waitpid, pid, 0))[1]}
            case "terminate":
                self.children[-1].terminate()
                self.children[-1].join()
                return {"result": self.children[-1].exitcode}
        return {"result": os.getpid()}

    async def stop(self):
        for child in self.children:
            child.kill()
        self.pool.shutdown()

run_daemon(App(), "test")
"""
COMMAND = [sys.executable, "-c", PROGRAM]


@pytest.fixture
def daemon(private_directories: Path) -> Iterator[int]:
    """The pid of a daemon. At the end, it and all its children are killed."""
    pid = ensure_daemon("test", COMMAND).pid
    assert pid is not None
    try:
        yield pid
    finally:
        stop_daemon("test", timeout=5.0)
        kill_all()


@pytest.mark.parametrize("way", ["pool", "process", "fork"])
def test_name_of_a_killed_daemon_is_free_while_its_workers_live(daemon: int, way: str) -> None:
    with connect_daemon("test") as kept:
        worker = request("test", {"method": way})["result"]
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: not lives(daemon))
        assert lives(worker)
        with at_once():
            with pytest.raises((ConnectionLost, DaemonNotRunning)):
                kept.call("ask", timeout=PATIENCE)
            # Other threads of the killed process may hold its socket a little longer than the main thread.
            with pytest.raises((ConnectionLost, DaemonNotRunning)):
                request("test", {"method": "ask"}, timeout=PATIENCE)
            assert daemon_status("test").state == "stale"
            assert ensure_daemon("test", COMMAND).state == "running"
            assert request("test", {"method": "ask"})["result"] != daemon


@pytest.mark.parametrize("way", ["process", "fork"])
def test_end_of_a_worker_disturbs_neither_clients_nor_the_name(daemon: int, way: str) -> None:
    with connect_daemon("test") as kept:
        os.kill(kept.call(way), signal.SIGINT)
        assert kept.call("ask") == daemon
        assert not cleanup_endpoint("test")
        assert [file.suffix for file in runtime_dir().iterdir() if file.suffix == ".sock"] == [".sock"]
        assert request("test", {"method": "ask"})["result"] == daemon


def test_worker_is_ended_by_the_signal_that_drains_the_daemon(daemon: int) -> None:
    request("test", {"method": "process"})
    assert request("test", {"method": "terminate"}, timeout=PATIENCE)["result"] == -signal.SIGTERM
    assert request("test", {"method": "ask"})["result"] == daemon


@needs_linux
def test_worker_has_no_socket_and_no_lock(daemon: int) -> None:
    with connect_daemon("test") as kept:
        folder = Path(f"/proc/{kept.call('fork')}/fd")

        def has_ours() -> bool:
            try:
                files = [os.readlink(link) for link in folder.iterdir()]
            except FileNotFoundError:  # the child is closing descriptors
                return True
            sockets = [file for file in files if file.startswith("socket:")]
            # Up to two socket pairs are asyncio's own, which wake the child's copies of the event loops.
            return len(sockets) > 4 or any(file.startswith(str(runtime_dir())) for file in files)

        wait_until(lambda: not has_ours())


@pytest.mark.parametrize(("how", "status"), [("return", 0), (None, 0), (3, 3), ("a text", 1), ("raise", 1)])
def test_a_child_that_leaves_its_handler_ends(daemon: int, how: object, status: int) -> None:
    reply = request("test", {"method": "leave", "how": how}, timeout=PATIENCE)
    assert os.waitstatus_to_exitcode(reply["result"]) == status
    assert request("test", {"method": "ask"}) == {"result": daemon}
    log = log_path("test").read_text(encoding="utf-8")
    assert "a child says this" in log
    assert ("Traceback" in log) is (how == "raise")
    # The threads of the daemon can still wake its loop.
    with at_once():
        assert stop_daemon("test")
