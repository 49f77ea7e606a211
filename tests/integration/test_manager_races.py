"""Many managers at once, and daemons killed at any point: never two daemons, none unreachable, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from harness_ipc import (
    HarnessIPCError,
    StartFailed,
    cleanup_endpoint,
    connect_daemon,
    daemon_alive,
    daemon_status,
    ensure_daemon,
    identify,
    list_daemons,
    request,
    restart_daemon,
    runtime_path,
    stop_daemon,
)
from harness_ipc._registry import records
from tests.support.managed import (
    assert_none_left,
    assert_one_daemon,
    at_once,
    command,
    ensure,
    live_processes,
    spawn_bystander,
    started,
)
from tests.support.processes import PATIENCE, runtime_files, spawn_python, wait_until

# Starting a process takes several times as long on Windows.
CALLERS = 16 if os.name == "posix" else 8
ROUNDS = 5 if os.name == "posix" else 2
KILLS = 15 if os.name == "posix" else 5
STOPS = 10 if os.name == "posix" else 6
# Seconds for this number of interpreters on a loaded machine. A longer run hangs, or is serialized.
STAMPEDE = 90.0


pytestmark = pytest.mark.usefixtures("base")


# Many managers at once.

CALLER = """
import json, sys
import harness_ipc, harness_ipc.manager
print("ready", flush=True)
for line in sys.stdin:
    try:
        status = harness_ipc.ensure_daemon("test", json.loads(line))
        print(json.dumps([status.state, status.pid]), flush=True)
    except harness_ipc.HarnessIPCError as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
"""


@contextlib.contextmanager
def spawn_callers(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Yield processes that call `ensure_daemon` with each command line that they read."""
    with contextlib.ExitStack() as stack:
        callers = []
        for _ in range(count):
            caller = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", CALLER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            stack.enter_context(caller)
            stack.callback(caller.kill)
            callers.append(caller)
        for caller in callers:
            assert caller.stdout is not None
            assert caller.stdout.readline() == "ready\n"
        yield callers


def call_all(callers: list[subprocess.Popen[str]], argv: list[str]) -> list[object]:
    for caller in callers:
        assert caller.stdin is not None
        caller.stdin.write(json.dumps(argv) + "\n")
        caller.stdin.flush()
    return [json.loads(caller.stdout.readline()) for caller in callers if caller.stdout is not None]


def test_many_at_once_make_one_daemon_again_and_again(base: Path) -> None:
    argv = command()
    with spawn_callers(CALLERS) as callers:
        own = {process.pid for process in live_processes()}
        for rounds in range(1, ROUNDS + 1):
            begin = time.monotonic()
            outcomes = call_all(callers, argv)
            assert time.monotonic() - begin < STAMPEDE
            assert outcomes == [["running", identify("test")]] * CALLERS
            # No other daemon was spawned.
            assert len(started(base)) == rounds
            assert started(base)[-1] == identify("test")
            assert {process.pid for process in live_processes()} - own == {identify("test")}
            assert stop_daemon("test") is True
            assert daemon_status("test").state == "absent"
            assert [file for file in runtime_files() if not file.endswith(".start")] == []
    assert not (base / "two at once").exists()


ONCE = "import json, sys, harness_ipc\nprint(harness_ipc.ensure_daemon('test', json.loads(sys.argv[1])).pid)"


def run_at_once(*arguments: str) -> tuple[float, list[str]]:
    """Run many interpreters at once. Return the seconds until the last one has ended, and their outputs."""
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(spawn_python(*arguments)) for _ in range(CALLERS)]
        lines = [process.read_line() for process in processes]
        assert [process.wait() for process in processes] == [0] * CALLERS
    return time.monotonic() - begin, lines


def test_many_clients_at_once_take_little_more_than_imports(base: Path) -> None:
    importing, _ = run_at_once("-c", "import harness_ipc")
    ensuring, pids = run_at_once("-c", ONCE, json.dumps(command()))
    assert pids == [str(identify("test"))] * CALLERS
    assert len(started(base)) == 1
    print(f"{CALLERS} at once: import {importing:.2f} s, ensure_daemon {ensuring:.2f} s, {ensuring / importing:.1f} times that")
    assert ensuring < 10 * importing + STAMPEDE


RACER = """
import json, os, sys, threading, time
import harness_ipc
argv, stops, outcomes, patience = json.loads(sys.argv[1]), int(sys.argv[2]), [], time.monotonic() + 60
directory = os.environ["HARNESS_IPC_RUNTIME_DIR"]

def attempt(action):
    try:
        outcomes.append(action())
    except harness_ipc.StartFailed as error:
        outcomes.append("StartFailed: " + str(error))
    except BaseException as error:
        outcomes.append(f"unexpected: {type(error).__name__}: {error}")

def ensure():
    status = harness_ipc.ensure_daemon("test", argv)
    return "ensured" if status.state == "running" and status.pid else f"unexpected: {status}"

def stop():
    return "stopped" if harness_ipc.stop_daemon("test") else "none"

def is_in(state):
    try:
        with open(os.path.join(directory, "test.json"), "rb") as file:
            return json.load(file)["state"] == state
    except (OSError, ValueError):
        return False

def stop_often():
    for number in range(stops):
        # Stop alternately a running daemon and one that is starting.
        while not is_in("starting" if number % 2 else "ready") and time.monotonic() < patience:
            time.sleep(0.0005)
        attempt(stop)

stopping = threading.Thread(target=stop_often)
stopping.start()
while stopping.is_alive() and time.monotonic() < patience:
    attempt(ensure)
    time.sleep(0.001)
stopping.join()
print(json.dumps(outcomes), flush=True)
"""


def test_racing_stops_and_starts_leave_at_most_one_daemon(base: Path) -> None:
    slow = "class App(App):\n    async def start(self):\n        await super().start()\n        await asyncio.sleep(0.05)"
    argv = json.dumps(command(then=slow))
    racer = ("-c", RACER, argv, str(STOPS))
    with spawn_python(*racer) as one, spawn_python(*racer) as two:
        outcomes = json.loads(one.read_line()) + json.loads(two.read_line())
        assert (one.wait(), two.wait()) == (0, 0)
    assert [outcome for outcome in outcomes if outcome.startswith("unexpected")] == []
    # Only starts that a concurrent stop ended have failed.
    failed = [outcome for outcome in outcomes if outcome.startswith("StartFailed")]
    ensured, stopped, none = (outcomes.count(outcome) for outcome in ("ensured", "stopped", "none"))
    print(f"{len(started(base))} daemons, {ensured} ensured, {len(failed)} failed, {stopped} stops, {none} of nothing")
    print("\n".join(sorted(set(failed))))
    assert stopped + none == 2 * STOPS
    assert len(outcomes) > 2 * STOPS
    # The numbers depend on timing.
    assert min(stopped, len(started(base))) >= 2
    assert not (base / "two at once").exists()
    # The process that is left is that of the record.
    found = [identify("test")] if daemon_status("test").state == "running" else []
    wait_until(lambda: [process.pid for process in live_processes()] == found)
    ensure()
    assert_one_daemon()
    assert stop_daemon("test") is True
    assert_none_left()


# Killed daemons.

DIE = "\nimport psutil; psutil.Process().kill()\n"
UNPUBLISHED = """
import psutil
from harness_ipc._registry.lifetime import Registration
Registration.publish = lambda *_, **__: psutil.Process().kill()
"""
DEATHS = {
    "before the lock": {"first": DIE},
    "in start": {"then": "async def start(self): psutil.Process().kill()\nApp.start = start\nimport psutil"},
    "before it publishes": {"then": UNPUBLISHED},
    "while serving": {},
    "while draining": {"options": "grace_period=3600"},
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_daemon_blocks_no_successor(base: Path, death: str) -> None:
    argv = command(**DEATHS[death])
    for _ in range(2):
        if death.startswith("while"):
            pid = ensure_daemon("test", argv).pid
            assert pid is not None
            if death == "while draining":
                with connect_daemon("test") as client, ThreadPoolExecutor(1) as pool:
                    job = pool.submit(client.call, "hang", timeout=PATIENCE)
                    wait_until((base / "hanging").exists)
                    assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
                    wait_until(lambda: records.read("test").state == "draining")
                    psutil.Process(pid).kill()
                    assert isinstance(job.exception(PATIENCE), HarnessIPCError)
                (base / "hanging").unlink()
            else:
                psutil.Process(pid).kill()
                wait_until(lambda: daemon_status("test").state == "stale")
        else:
            with at_once(), pytest.raises(StartFailed) as caught:
                ensure_daemon("test", argv)
            assert "\n" not in str(caught.value)
    assert not daemon_status("test").alive
    with at_once():
        status = ensure()
    assert status.pid == identify("test")
    assert_one_daemon()
    assert stop_daemon("test") is True
    assert_none_left()


def test_a_daemon_killed_a_moment_ago_is_stale(base: Path) -> None:
    """The system closes the sockets of a killed process before its pid is gone."""
    pids = []
    for _ in range(KILLS):
        status = ensure()
        assert (status.state, status.problem) == ("running", None)
        assert status.pid is not None
        pids.append(status.pid)
        psutil.Process(status.pid).kill()
    assert started(base) == pids
    ensure()
    assert_one_daemon()


@pytest.mark.parametrize("verb", ["stop", "ensure", "restart", "clean up", "look"])
def test_a_reused_pid_is_never_signalled(verb: str) -> None:
    pid = ensure().pid
    assert pid is not None
    psutil.Process(pid).kill()
    wait_until(lambda: daemon_status("test").state == "stale")
    with spawn_bystander() as bystander:
        path = runtime_path("test", "json")
        record = json.loads(path.read_bytes())
        # The process was created at another time than the record says.
        record.update(pid=bystander.pid, create_time=psutil.Process(bystander.pid).create_time() - 60)
        path.write_text(json.dumps(record))
        assert daemon_status("test").state == "stale"
        assert not daemon_alive("test")
        with at_once():
            if verb == "stop":
                assert stop_daemon("test", timeout=0.1) is False
                assert daemon_status("test").state == "absent"
            elif verb == "ensure":
                assert ensure().pid not in (pid, bystander.pid)
            elif verb == "restart":
                assert restart_daemon("test").pid not in (pid, bystander.pid)
            elif verb == "clean up":
                assert cleanup_endpoint("test") is True
            else:
                assert [status.state for status in list_daemons()] == ["stale"]
        assert bystander.process.poll() is None
        assert psutil.Process(bystander.pid).status() in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)
        assert stop_daemon("test") is (verb in ("ensure", "restart"))
        assert bystander.process.poll() is None
