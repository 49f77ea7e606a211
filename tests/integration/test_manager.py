"""The manager with one daemon: start, state, health, versions, stop."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from harness_ipc import (
    ConnectionLost,
    DaemonNotRunning,
    DaemonStatus,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    StartFailed,
    __version__,
    daemon_alive,
    daemon_status,
    ensure_daemon,
    identify,
    list_daemons,
    log_path,
    request,
    restart_daemon,
    runtime_dir,
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
    in_thread,
    started,
    the_log,
    waits_for_go,
)
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, serves, spawn_daemon, stopped, wait_until

pytestmark = pytest.mark.usefixtures("base")


# State.


def test_queries_on_a_fresh_machine_create_nothing(base: Path) -> None:
    status = daemon_status("test")
    assert (status.state, status.pid, status.alive) == ("absent", None, False)
    assert status.log_path == str(log_path("test"))
    assert status.problem is not None
    assert "\n" not in status.problem
    assert not daemon_alive("test")
    assert list_daemons() == []
    assert stop_daemon("test") is False
    assert list(base.iterdir()) == []
    for look in (daemon_status, daemon_alive, stop_daemon):
        with pytest.raises(InvalidName):
            look("../test")


def test_a_running_daemon_tells_all_about_itself() -> None:
    before = time.time()
    assert ensure(options="app_version='7'").state == "running"
    record = records.load("test")
    with pytest.raises(HarnessIPCError):
        raise HarnessIPCError(request("test", {"method": "raise"})["error"]["type"])
    assert serves()
    status = daemon_status("test")
    assert (status.state, status.alive, status.problem) == ("running", True, None)
    assert (status.name, status.pid, status.generation) == ("test", record.pid, record.generation)
    assert (status.version, status.app_version) == (__version__, "7")
    assert status.python == ".".join(map(str, sys.version_info[:3]))
    assert status.since is not None
    assert before - 1 <= status.since <= time.time() + 1
    assert (status.requests, status.errors) == (2, 1)
    assert (status.health, status.healthy) == ({"well": True}, True)
    for number in (status.uptime, status.loop_lag, status.idle, status.connections):
        assert number is not None
        assert 0 <= number < PATIENCE
    assert list(status.to_json()) == list(DaemonStatus.__dataclass_fields__)
    assert record.authkey.hex() not in json.dumps(status.to_json()) + repr(status) + the_log()
    assert list_daemons()[0].pid == status.pid
    assert_one_daemon()


@pytest.mark.parametrize(
    ("health", "answer", "healthy"),
    [
        ("raise LookupError('no upstream')", {"error": {"type": "LookupError", "message": "no upstream"}}, False),
        ("return {'error': 'no upstream', 'words': 3}", {"error": "no upstream", "words": 3}, False),
        ("return {}", {}, True),
        ("pass", {}, True),
        (
            "return False",
            {"error": {"type": "TypeError", "message": "health returned bool: return a dict, or raise an error"}},
            False,
        ),
    ],
)
def test_health_does_not_change_the_state(health: str, answer: Any, healthy: bool | None) -> None:
    ensure(then=f"async def health(self): {health}\nApp.health = health")
    status = daemon_status("test")
    assert (status.state, status.health, status.healthy) == ("running", answer, healthy)
    assert_one_daemon()


def test_without_an_answer_nothing_is_known_of_the_health() -> None:
    ensure(then="async def hang(self): await asyncio.Event().wait()\nApp.health = hang")
    status = daemon_status("test", timeout=0.3)
    assert (status.state, status.healthy) == ("running", None)
    assert status.health is not None
    assert status.health["error"]["type"] == "DaemonTimeout"
    assert daemon_status("absent").healthy is None
    stop_daemon("test")
    ensure(then="del App.health")
    status = daemon_status("test")
    assert (status.state, status.health, status.healthy) == ("running", None, None)


def test_a_daemon_started_by_hand_is_found_and_stopped() -> None:
    with spawn_daemon("test") as daemon:
        status = ensure()
        assert (status.pid, status.detached) == (daemon.pid, None)
        assert stop_daemon("test") is True
        assert daemon.wait() == 0
    assert_none_left()


def test_list_of_daemons_in_several_states(base: Path) -> None:
    killed, running = ensure("killed"), ensure("running")
    assert killed.pid is not None
    psutil.Process(killed.pid).kill()
    runtime_path("later", "json").write_text('{"schema": 99}')
    runtime_path("later", "json").chmod(0o600)
    runtime_path("torn", "json").write_text('{"schema": 1,')
    runtime_path("torn", "json").chmod(0o600)
    slow = command("starting", then=waits_for_go())
    with spawn_daemon("asleep") as asleep, stopped(asleep), in_thread(ensure_daemon, "starting", slow) as starting:
        try:
            wait_until(lambda: daemon_status("starting").state == "starting")
            before = sorted(os.listdir(runtime_dir()))
            found = {status.name: status.state for status in list_daemons(timeout=0.5)}
            assert list(found) == sorted(found)
            assert found == {
                "asleep": "unresponsive",
                "killed": "stale",
                "later": "incompatible",
                "running": "running",
                "starting": "starting",
                "torn": "stale",
            }
            alive = [name for name in found if daemon_alive(name)]
            assert alive == ["asleep", "running"]
            assert sorted(os.listdir(runtime_dir())) == before
        finally:
            (base / "go").touch()
        assert starting.result(PATIENCE).pid == identify("starting")
    assert identify("running") == running.pid
    with pytest.raises(IncompatibleDaemon):
        ensure("later")
    runtime_path("later", "json").unlink()
    assert [stop_daemon(name) for name in ("killed", "running", "starting", "torn")] == [False, True, True, False]


# Unresponsive daemons.


def block(base: Path, method: str, file: str) -> None:
    """Block the daemon's event loop with a request."""
    with contextlib.suppress(DaemonTimeout):
        request("test", {"method": method}, timeout=0.1)
    wait_until((base / file).exists)


def test_a_start_may_wait_for_ever() -> None:
    assert ensure_daemon("test", command(), timeout=float("inf")).pid == identify("test")


def test_wedged_daemon_is_unresponsive_and_can_be_stopped(base: Path) -> None:
    pid = ensure().pid
    before = time.time()
    block(base, "wedge", "wedged")
    after = time.time()
    begin = time.monotonic()
    wait_until(lambda: daemon_status("test").state == "unresponsive")
    assert time.monotonic() - begin < 4.0
    status = daemon_status("test")
    assert (status.state, status.pid, status.alive, status.health) == ("unresponsive", pid, True, None)
    assert status.problem is not None
    # The daemon itself knows since when its loop is blocked. Allow half a second for the message.
    assert status.since is not None
    assert before <= status.since <= after + 0.5
    # An unresponsive daemon is neither killed nor replaced.
    assert ensure().pid == pid == identify("test")
    with at_once():
        assert stop_daemon("test", timeout=0.2) is True
    assert daemon_status("test").state == "absent"
    assert_none_left()
    ensure()
    assert_one_daemon()


@needs_posix
def test_a_daemon_after_sigstop_is_unresponsive() -> None:
    pid = ensure().pid
    assert pid is not None
    process = psutil.Process(pid)
    process.suspend()
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
    begin = time.monotonic()
    status = daemon_status("test")
    assert time.monotonic() - begin < 4.0
    assert (status.state, status.pid, status.alive) == ("unresponsive", pid, True)
    assert identify("test", timeout=0.2) is None
    with at_once():
        assert stop_daemon("test", timeout=0.2) is True
    assert_none_left()


# Health.

ILL = """
async def health(self):
    if (folder / "hang").exists():
        await asyncio.Event().wait()
    if (folder / "ill").exists():
        raise LookupError("no upstream")
App.health = health
"""


def test_an_unhealthy_daemon_is_accepted_or_restarted_once(base: Path) -> None:
    argv = command(then=ILL)
    first = ensure_daemon("test", argv, on_unhealthy="restart")
    assert ensure_daemon("test", argv, on_unhealthy="restart").healthy is True
    (base / "ill").touch()
    assert ensure_daemon("test", argv).pid == first.pid
    second = ensure_daemon("test", argv, on_unhealthy="restart")
    # The new daemon is unhealthy as well, but is not restarted again.
    assert started(base) == [first.pid, second.pid]
    assert daemon_status("test").healthy is False
    assert_one_daemon()


def test_an_unhealthy_daemon_that_cannot_restart_is_not_stopped(base: Path) -> None:
    pid = ensure(then=ILL).pid
    (base / "ill").touch()
    with pytest.raises(StartFailed, match="was not stopped"):
        ensure_daemon("test", [str(base / "missing")], on_unhealthy="restart")
    assert identify("test") == pid


def test_a_daemon_that_does_not_answer_is_not_unhealthy(base: Path) -> None:
    argv = command(then=ILL)
    pid = ensure_daemon("test", argv).pid
    (base / "hang").touch()
    status = ensure_daemon("test", argv, on_unhealthy="restart")
    assert (status.pid, status.healthy) == (pid, None)
    block(base, "block", "blocked")
    wait_until(lambda: daemon_status("test").state == "unresponsive")
    assert ensure_daemon("test", argv, on_unhealthy="restart").pid == pid == identify("test")
    with at_once():
        assert stop_daemon("test", timeout=0.2) is True


# Versions and restarts.


def test_another_app_version_is_refused_replaced_or_accepted(base: Path) -> None:
    def with_version(version: str, on_mismatch: Literal["error", "restart", "accept"] = "error") -> DaemonStatus:
        argv = command(options=f"app_version={version!r}")
        return ensure_daemon("test", argv, version=version, on_mismatch=on_mismatch)

    first = with_version("1")
    assert first.app_version == "1"
    assert with_version("1").pid == with_version("2", "accept").pid == with_version("1", "restart").pid == first.pid
    with pytest.raises(IncompatibleDaemon, match="1") as caught:
        with_version("2")
    assert "\n" not in str(caught.value)
    assert identify("test") == first.pid
    second = with_version("2", "restart")
    assert second.pid != first.pid
    assert (second.app_version, second.pid) == ("2", identify("test"))
    assert started(base) == [first.pid, second.pid]
    # It restarts only once: this command line always starts version 1.
    with pytest.raises(IncompatibleDaemon, match="has version 1, not 3"):
        ensure_daemon("test", command(options="app_version='1'"), version="3", on_mismatch="restart")
    assert len(started(base)) == 3
    assert_one_daemon()


def test_a_restart_keeps_command_line_directory_and_environment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DaemonNotRunning):
        restart_daemon("test")
    place = base / "größer place"
    place.mkdir()
    first = ensure_daemon("test", command("test", "a word", "--größer"), cwd=str(place), env={"COLOUR": "green"})
    where = request("test", {"method": "where"})["result"]
    assert where == [str(place), ["-c", "test", "a word", "--größer"], "green"]
    monkeypatch.chdir(base)
    second = restart_daemon("test")
    assert second.state == "running"
    assert second.pid == identify("test") != first.pid
    assert second.generation != first.generation
    assert request("test", {"method": "where"})["result"] == where
    assert (second.argv, second.cwd, second.environment) == (first.argv, str(place), ["COLOUR"])
    assert_one_daemon()
    # The same after a kill.
    psutil.Process(second.pid).kill()
    wait_until(lambda: daemon_status("test").state == "stale")
    stale = daemon_status("test")
    assert (stale.argv, stale.cwd, stale.pid) == (second.argv, second.cwd, None)
    assert restart_daemon("test").pid == identify("test") != second.pid
    assert_one_daemon()
    assert stop_daemon("test") is True
    assert stop_daemon("test") is False
    with pytest.raises(DaemonNotRunning):
        restart_daemon("test")


# Stop.


@contextlib.contextmanager
def in_flight(base: Path) -> Iterator[Future[Any]]:
    """Send a request that does not end. Yield its future once it has begun."""
    with in_thread(request, "test", {"method": "hang"}, timeout=PATIENCE) as job:
        wait_until((base / "hanging").exists)
        yield job


def test_a_stop_ends_a_request_that_does_not_end(base: Path) -> None:
    ensure(options="grace_period=3600")
    with in_flight(base) as job:
        with at_once():
            assert stop_daemon("test", timeout=0.2) is True
        assert isinstance(job.exception(PATIENCE), ConnectionLost)
    assert_none_left()


def test_a_daemon_that_drains_already_for_long_can_be_stopped(base: Path) -> None:
    pid = ensure(options="grace_period=3600").pid
    with in_flight(base) as job:
        assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
        wait_until(lambda: records.read("test").state == "draining")
        with at_once():
            with pytest.raises(DaemonTimeout, match=rf"pid {pid}, its predecessor, is still stopping"):
                ensure_daemon("test", command(), timeout=0.5)
            stop_daemon("test", timeout=0.2)
        assert isinstance(job.exception(PATIENCE), ConnectionLost)
    assert_none_left()
    ensure()
    assert_one_daemon()


def test_a_daemon_is_still_asked_to_stop_after_the_clock_was_set() -> None:
    """Creation times depend on the current clock, so the process looks like another one."""
    pid = ensure().pid
    path = runtime_path("test", "json")
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "create_time": record["create_time"] - 3600}))
    assert daemon_status("test").state == "running"
    assert ensure().pid == pid
    with at_once():
        assert stop_daemon("test", timeout=5.0) is True
    assert_none_left()
