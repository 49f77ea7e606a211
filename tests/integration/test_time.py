"""Clock changes, suspended processes and blocked loops: only monotonic time counts, and everything recovers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from harness_ipc import (
    ConnectionLost,
    DaemonTimeout,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    identify,
    log_path,
    ping,
    request,
    runtime_path,
)
from tests.support.managed import (
    AT_ONCE,
    assert_none_left,
    assert_one_daemon,
    at_once,
    command,
    ensure,
    spawn_bystander,
    started,
)
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, lives, spawn_daemon, spawn_python, stopped, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

YEAR = 366 * 86400
# Seconds: a deadline that passes.
SHORT = 0.2

# Run first in a process: each read of its wall clock sets it forward by a year, or back again.
JUMPING = f"""
import random, time
jumps, wall, wall_ns = random.Random(1), time.time, time.time_ns
jump = lambda: jumps.choice([0, {YEAR}, -{YEAR}])
time.time = lambda: wall() + jump()
time.time_ns = lambda: wall_ns() + jump() * 10**9
"""
# The daemon checks more often whether it is idle, so a clock change is more likely to be noticed.
OFTEN = "import harness_ipc.daemon\nharness_ipc.daemon._LOOK_INTERVAL = 0.02\n"
RUN = '\nimport runpy\nrunpy.run_module("tests.support.processes", run_name="__main__", alter_sys=True)\n'


@contextlib.contextmanager
def jumping_daemon(**options: Any) -> Iterator[DaemonProcess]:
    with spawn_python("-c", JUMPING + OFTEN + RUN, "test", json.dumps(options)) as daemon:
        assert daemon.read_line() == "ready"
        yield daemon


def run_client(first: str, program: str, *arguments: str) -> Any:
    """Run `first` and `program` in a process, and return the JSON that it prints."""
    with spawn_python("-c", f"{first}\nimport json, sys\nfrom harness_ipc import *\n{program}", *arguments) as client:
        line = client.read_line()
        assert client.wait() == 0
    return json.loads(line)


# Clock changes.

CLIENT = """
client = connect_daemon("test", timeout=60)
answers = [client.call("echo", n=n, timeout=60) for n in range(100)]
answers += [request("test", {"method": "echo", "params": {"n": n}}, timeout=60)["result"] for n in range(100, 120)]
client.call("sleep", seconds=0.3, tag="long", timeout=60)
begin = time.monotonic()
try:
    client.call("sleep", seconds=3600, tag="given up", timeout=0.2)
except DaemonTimeout:
    late = time.monotonic() - begin
again = client.call("echo", n=120, timeout=60)
status = daemon_status("test")
print(json.dumps([[*(answer["n"] for answer in answers), again["n"]], late, status.state, status.pid, status.uptime >= 0]))
"""


def test_a_clock_that_is_set_again_and_again_moves_no_deadline() -> None:
    with jumping_daemon(idle_timeout=3600.0, grace_period=SHORT) as daemon:
        numbers, late, *status = run_client(JUMPING, CLIENT)
        assert numbers == list(range(121))
        assert 0.19 <= late < AT_ONCE
        assert status == ["running", daemon.pid if sys.platform != "win32" else identify("test"), True]
        with at_once():
            assert run_client(JUMPING, 'print(json.dumps(stop_daemon("test")))') is True
            assert daemon.wait() == 0


def test_clock_changes_do_not_affect_the_idle_timeout() -> None:
    with jumping_daemon(idle_timeout=1.5) as daemon, connect_daemon("test") as client:
        served = 0
        over = threading.Event()
        timer = threading.Timer(2.0, over.set)
        timer.start()
        while not over.wait(0.05):
            assert client.call("echo", n=served) == {"n": served}
            served += 1
        timer.join()
        assert daemon.process.poll() is None
        # It still ends by its idle timeout.
        assert daemon.wait() == 0
    assert "idle for 1.5 s" in log_path("test").read_text(encoding="utf-8")


# Some systems derive creation times from the boot time, which moves with the clock.
SET = """
import time, psutil
wall = time.time
time.time = lambda: wall() + ({seconds})
platform = psutil._psplatform
if hasattr(platform, "boot_time"):
    boot_time = platform.boot_time
    platform.boot_time = lambda: boot_time() + ({seconds})
"""
LOOK = """
argv = json.loads(sys.argv[1])
seen = [daemon_status("test").state, ensure_daemon("test", argv, timeout=5).pid, daemon_alive("test"), cleanup_endpoint("test")]
seen.append([status.state for status in list_daemons()])
print(json.dumps(seen))
"""
STOP = """
try:
    print(json.dumps(stop_daemon("test", timeout=0.2)))
except HarnessIPCError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("seconds", [YEAR, -YEAR, 3600])
def test_a_daemon_is_the_same_after_the_clock_was_set(base: Path, seconds: int) -> None:
    pid = ensure().pid
    changed = SET.format(seconds=seconds)
    assert run_client(changed, LOOK, json.dumps(command())) == ["running", pid, True, False, ["running"]]
    assert_one_daemon()
    assert started(base) == [pid]
    assert run_client(changed, 'print(json.dumps(stop_daemon("test")))') is True
    assert_none_left()


@needs_linux
@pytest.mark.parametrize("verb", ["look", "stop"])
def test_an_unresponsive_daemon_survives_a_clock_change(base: Path, verb: str) -> None:
    pid = ensure().pid
    assert pid is not None
    process = psutil.Process(pid)
    process.suspend()
    try:
        changed = SET.format(seconds=YEAR)
        if verb == "look":
            assert run_client(changed, 'print(json.dumps(daemon_status("test", timeout=0.2).state))') == "unresponsive"
        else:
            assert run_client(changed, STOP) is True
            assert not lives(pid)
            ensure()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    assert_one_daemon()


# Processes are visible, but other files of /proc are not readable.
CLOSED = """
import builtins
really_open = builtins.open
def open_the_rest(file, *arguments, **options):
    if str(file).startswith("/proc/sys/"):
        raise PermissionError(13, "closed")
    return really_open(file, *arguments, **options)
builtins.open = open_the_rest
"""


@needs_linux
def test_with_a_partial_proc_no_other_process_is_signalled(base: Path) -> None:
    pid = ensure().pid
    assert pid is not None
    psutil.Process(pid).kill()
    wait_until(lambda: daemon_status("test").state == "stale")
    with spawn_bystander() as bystander:
        path = runtime_path("test", "json")
        record = json.loads(path.read_bytes())
        path.write_text(json.dumps({**record, "pid": bystander.pid, "create_time": record["create_time"] - 60}))
        assert run_client(CLOSED, 'print(json.dumps(daemon_status("test").state))') == "stale"
        assert run_client(CLOSED, 'print(json.dumps(stop_daemon("test", timeout=0.1)))') is False
        assert bystander.process.poll() is None
    ensure()
    assert_one_daemon()


# Suspended daemons.


class Asker:
    """A client in a thread that keeps sending different requests, and checks that each gets its own reply."""

    def __init__(self, tag: str, kept: bool) -> None:
        self.tag = tag
        self.kept = kept
        self.answered = 0
        self.late = 0

    def ask(self, number: int, client: Any) -> None:
        params = {"seconds": 0, "tag": f"{self.tag} {number}"}
        try:
            if client is not None:
                answer = client.call("sleep", timeout=SHORT, **params)
            else:
                answer = request("test", {"method": "sleep", "params": params}, timeout=SHORT)["result"]
        except DaemonTimeout:
            self.late += 1
        except ConnectionLost:
            # The daemon's timeout for the handshake expired first.
            pass
        else:
            assert answer == params["tag"]
            self.answered += 1

    def run(self, over: threading.Event) -> None:
        client = connect_daemon("test", timeout=PATIENCE) if self.kept else None
        with client or contextlib.nullcontext():
            number = 0
            while not over.is_set():
                self.ask(number, client)
                number += 1


def test_a_resumed_daemon_answers_each_request() -> None:
    askers = [Asker(f"{number}", kept=number % 2 == 0) for number in range(8)]
    over = threading.Event()
    # The timeout for handshakes expires meanwhile as well.
    with spawn_daemon("test", handshake_timeout=SHORT, idle_timeout=3600.0) as daemon, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(asker.run, over) for asker in askers]
        try:
            wait_until(lambda: all(asker.answered > 3 for asker in askers) or any(job.done() for job in jobs))
            with stopped(daemon):
                late = [asker.late for asker in askers]
                wait_until(lambda: all(now.late > then + 1 for now, then in zip(askers, late, strict=True)))
            answered = [asker.answered for asker in askers]
            wait_until(
                lambda: (
                    all(now.answered > then + 10 for now, then in zip(askers, answered, strict=True))
                    or any(job.done() for job in jobs)
                )
            )
        finally:
            over.set()
        for job in jobs:
            job.result(PATIENCE)
        assert daemon_status("test").state == "running"
        log = request("test", {"method": "log"}, timeout=PATIENCE)["result"]
        # Requests that timed out ran at most once.
        begun = [tag for what, tag in log if what == "begin"]
        assert len(begun) == len(set(begun)) >= sum(asker.answered for asker in askers)


# Suspended clients.

HANDSHAKE = """
import os, signal
from harness_ipc._protocol.handshake import Keys
from harness_ipc._registry import records
from tests.support.wire import FrameConnection
record = records.load("test")
connection = FrameConnection(record.address)
proof = connection.check_daemon(Keys(record.authkey, record.address))
print("in the middle", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
try:
    connection.send_all(proof)
    connection.confirm()
    print("welcome", flush=True)
except HarnessIPCError as error:
    print(type(error).__name__, flush=True)
connection.close()
try:
    client = connect_daemon("test", timeout=60)
    print("hanging", flush=True)
    client.call("sleep", seconds=0.1, tag="own", timeout=0.3)
except HarnessIPCError as error:
    print(type(error).__name__, flush=True)
else:
    print("answered", flush=True)
print(client.call("echo", n=1, timeout=60) == {"n": 1}, flush=True)
"""


@needs_posix
def test_a_suspended_client_delays_nobody() -> None:
    with spawn_daemon("test", handshake_timeout=0.5):
        before = request("test", {"meta": "ping"}, timeout=PATIENCE)["connections"]
        with spawn_python("-c", f"import json, sys\nfrom harness_ipc import *\n{HANDSHAKE}") as client:
            assert client.read_line() == "in the middle"
            os.waitpid(client.pid, os.WUNTRACED)
            for n in range(50):
                assert request("test", {"method": "echo", "params": {"n": n}}, timeout=PATIENCE) == {"result": {"n": n}}
            # Longer than the handshake timeout.
            time.sleep(1.0)
            psutil.Process(client.pid).resume()
            assert client.read_line() in ("ConnectionLost", "AuthenticationFailed")
            # Suspend it in the middle of a request.
            assert client.read_line() == "hanging"
            with stopped(client):
                assert request("test", {"method": "echo", "params": {"n": 0}}, timeout=PATIENCE) == {"result": {"n": 0}}
                time.sleep(2 * SHORT)
            assert client.read_line() in ("DaemonTimeout", "answered")
            assert client.read_line() == "True"
            assert client.wait() == 0
        wait_until(lambda: request("test", {"meta": "ping"}, timeout=PATIENCE)["connections"] <= before)


# Blocked loops.

BLOCKING = """
class App(App):
    async def handle(self, message):
        if message.get("method") == "block":
            (folder / "blocked").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
            return {"result": "went on"}
        return await super().handle(message)
"""


def test_after_a_blocked_loop_replies_go_to_their_requests(base: Path) -> None:
    argv = command(then=BLOCKING)
    pid = ensure_daemon("test", argv).pid
    with connect_daemon("test") as kept, ThreadPoolExecutor(1) as pool:
        assert kept.call("echo", n=0) == {"n": 0}
        job = pool.submit(request, "test", {"method": "block"}, timeout=PATIENCE)
        try:
            wait_until((base / "blocked").exists)
            wait_until(lambda: daemon_status("test").state == "unresponsive")
            assert ping("test", timeout=PATIENCE)
            for n in range(1, 4):
                with pytest.raises(DaemonTimeout):
                    kept.call("echo", n=n, timeout=SHORT)
                with pytest.raises(DaemonTimeout):
                    request("test", {"method": "echo", "params": {"n": -n}}, timeout=SHORT)
            # The manager does not take it for dead.
            assert ensure_daemon("test", argv).pid == pid == identify("test")
            assert daemon_status("test").state == "unresponsive"
        finally:
            (base / "go").touch()
        assert job.result(PATIENCE) == {"result": "went on"}
        assert kept.call("echo", n=4, timeout=PATIENCE) == {"n": 4}
    wait_until(lambda: daemon_status("test").state == "running")
    assert_one_daemon()
