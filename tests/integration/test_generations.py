"""Generations of one name: stale files are removed, those of a running daemon are not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import (
    AlreadyRunning,
    Client,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    IncompatibleDaemon,
    cleanup_endpoint,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    identify,
    ping,
    request,
    run_daemon,
    runtime_path,
    stop_daemon,
)
from harness_ipc._registry import records
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import (
    PATIENCE,
    App,
    DaemonProcess,
    run_python,
    runtime_files,
    serves,
    spawn_daemon,
    stopped,
    wait_until,
)

NEVER = 3600.0
# On Windows a pipe has no file.
SOCKETS = 1 if os.name == "posix" else 0


def log() -> Any:
    return request("test", {"method": "log"})["result"]


def kill(daemon: DaemonProcess) -> None:
    daemon.process.kill()
    daemon.wait()


def leave_dead_generation(name: str = "test") -> None:
    with spawn_daemon(name) as daemon:
        assert serves(name)
        kill(daemon)


def assert_one_generation() -> None:
    """Assert that all files belong to the running daemon, and that it serves."""
    assert runtime_files(".json") == ["test.json"]
    assert runtime_files(".tmp") == []
    assert len(runtime_files(".sock")) == SOCKETS
    assert serves()


def test_a_start_removes_files_of_a_killed_daemon() -> None:
    leave_dead_generation()
    assert len(runtime_files()) == 1 + SOCKETS
    dead = records.load("test")
    for attempt in (lambda: connect_daemon("test"), lambda: request("test", {})):
        with pytest.raises(DaemonNotRunning):
            attempt()
    assert ping("test") is False
    assert identify("test") is None
    # Clients do not remove stale files.
    assert len(runtime_files()) == 1 + SOCKETS
    with spawn_daemon("test") as daemon:
        living = records.load("test")
        assert identify("test") == living.pid == daemon.pid
        for key in ("generation", "address", "authkey"):
            assert getattr(living, key) != getattr(dead, key)
        assert_one_generation()


DIES_BEFORE_IT_PUBLISHES = """
import os, sys
from harness_ipc._server.server import acquire_name
from harness_ipc._transport.listen import Listener
listener = Listener(acquire_name(sys.argv[1]).record.address)
os._exit(0)
"""


def test_death_before_publishing_leaves_nothing() -> None:
    for name in ("test", "test-2"):
        assert run_python("-c", DIES_BEFORE_IT_PUBLISHES, name).returncode == 0
    assert runtime_files(".json") == ["test-2.json", "test.json"]
    assert len(runtime_files(".sock")) == 2 * SOCKETS
    assert not ping("test")
    assert daemon_status("test").state == "stale"
    with spawn_daemon("test"):
        # Files of another name are not removed.
        assert runtime_files(".json") == ["test-2.json", "test.json"]
        assert len(runtime_files(".sock")) == 2 * SOCKETS
        assert cleanup_endpoint("test-2")
        assert_one_generation()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"schema": 2, "pid": true}', b'{"schema": 99}'])
def test_a_damaged_record_is_replaced(content: bytes) -> None:
    leave_dead_generation()
    runtime_path("test", "json").write_bytes(content)
    if b"99" in content:
        # The daemon may be running: only a version that knows the schema can tell.
        with pytest.raises(IncompatibleDaemon):
            ping("test")
    else:
        assert not ping("test")
    with spawn_daemon("test"):
        assert runtime_files(".json") == ["test.json"]
        assert serves()


@needs_posix
@pytest.mark.parametrize("swept", [["lock"], ["json"], ["lock", "json"]], ids="+".join)
def test_a_daemon_whose_files_are_removed_keeps_its_name(swept: list[str]) -> None:
    with spawn_daemon("test") as daemon, connect_daemon("test") as client:
        for ext in swept:
            runtime_path("test", ext).unlink()
        wait_until(lambda: all(runtime_path("test", ext).exists() for ext in swept))
        with pytest.raises(AlreadyRunning) as caught:
            run_daemon(App(), "test")
        assert caught.value.pid == daemon.pid
        assert cleanup_endpoint("test") is False
        assert client.call("echo", n=1) == {"n": 1}
        assert_one_generation()


@needs_posix
@pytest.mark.parametrize("schema", [1, 3])
def test_another_schema_can_only_be_pinged_and_stopped(schema: int) -> None:
    with spawn_daemon("test") as daemon:
        path = runtime_path("test", "json")
        fields = json.loads(path.read_bytes())
        lasting = ("name", "generation", "address", "authkey", "pid", "create_time", "start_ticks", "boot_id")
        path.write_text(json.dumps({"schema": schema} | {key: fields[key] for key in lasting if key in fields}))
        assert ping("test") is True
        assert identify("test") == daemon.pid
        for use in (lambda: request("test", {}), lambda: connect_daemon("test"), lambda: ensure_daemon("test", ["none"])):
            with pytest.raises(IncompatibleDaemon, match=f"schema {schema}"):
                use()
        status = daemon_status("test")
        assert (status.state, status.pid) == ("incompatible", daemon.pid)
        assert stop_daemon("test") is True
        assert daemon.wait() == 0
        assert runtime_files() == []


@needs_linux
def test_unidentified_daemon_is_not_signalled() -> None:
    with spawn_daemon("test") as daemon:
        path = runtime_path("test", "json")
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "pid_namespace": "pid:[1]"}))
        with stopped(daemon):
            status = daemon_status("test", timeout=0.2)
            assert status.state == "unresponsive"
            assert "another PID namespace" in (status.problem or "")
            with pytest.raises(DaemonTimeout, match="another PID namespace"):
                stop_daemon("test", timeout=0.2)
            assert cleanup_endpoint("test") is False
            assert daemon.process.poll() is None
        assert stop_daemon("test") is True
        assert daemon.wait() == 0


@needs_posix
def test_a_daemon_whose_record_was_just_removed_is_stopped() -> None:
    with spawn_daemon("test") as daemon:
        runtime_path("test", "json").unlink()
        assert stop_daemon("test", timeout=0.1) is True
        daemon.wait()
        assert runtime_files() == []


@needs_posix
def test_a_removed_lock_is_not_taken_from_a_living_daemon() -> None:
    with spawn_daemon("test") as daemon:
        for _ in range(20):
            runtime_path("test", "lock").unlink(missing_ok=True)
            assert cleanup_endpoint("test") is False
            with pytest.raises(AlreadyRunning) as caught:
                run_daemon(App(), "test")
            assert caught.value.pid == daemon.pid
        assert_one_generation()


@needs_posix
def test_an_older_daemon_yields_to_the_record() -> None:
    with spawn_daemon("test") as old, stopped(old):
        address = records.load("test").address
        for ext in ("json", "lock"):
            runtime_path("test", ext).unlink()
        with spawn_daemon("test") as new:
            old.signal(signal.SIGCONT)
            assert old.wait() == 0
            assert not os.path.exists(address)
            assert identify("test") == new.pid
            assert_one_generation()


@contextlib.contextmanager
def connect_after_start() -> Iterator[tuple[DaemonProcess, Client]]:
    with spawn_daemon("test") as daemon, connect_daemon("test") as client:
        yield daemon, client


@pytest.mark.parametrize("ended", ["killed", "stopped"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_kept_client_uses_the_successor(asked: bool, ended: str) -> None:
    with connect_after_start() as (old, client):
        before = client.generation
        if asked:
            assert client.call("sleep", seconds=0, tag="old") == "old"
        if ended == "killed":
            old.process.kill()
        else:
            request("test", {"meta": "shutdown"})
        old.wait()
        with pytest.raises(DaemonNotRunning):
            client.call("echo")
        with spawn_daemon("test") as new:
            assert client.call("sleep", seconds=0, tag="new") == "new"
            assert client.pid == new.pid
            assert client.generation != before
            assert log() == [["begin", "new"], ["end", "new"]]


@pytest.mark.parametrize("asked", [True, False])
def test_a_kept_client_works_after_a_restart(asked: bool) -> None:
    with connect_after_start() as (old, client):
        if asked:
            assert client.call("echo") == {}
        kill(old)
        with spawn_daemon("test") as new:
            assert client.call("echo", n=1) == {"n": 1}
            assert client.pid == new.pid


@contextlib.contextmanager
def in_flight(client: Client) -> Iterator[Future[Any]]:
    """Send a request that does not end. Yield its future once it has begun."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(client.call, "sleep", seconds=NEVER, tag="once", timeout=NEVER)
        wait_until(lambda: log() == [["begin", "once"]])
        yield job


def test_a_request_of_a_killed_daemon_is_not_repeated() -> None:
    with connect_after_start() as (old, client), in_flight(client) as job:
        kill(old)
        assert isinstance(job.exception(PATIENCE), ConnectionLost)
        with spawn_daemon("test"):
            assert log() == []
            assert client.call("echo", n=2) == {"n": 2}
            assert log() == []


def test_cleaning_up_spares_the_living() -> None:
    assert cleanup_endpoint("test") is True
    with spawn_daemon("test") as daemon:
        before = runtime_files()
        assert cleanup_endpoint("test") is False
        assert runtime_files() == before
        assert serves()
        kill(daemon)
        assert runtime_files() == before
        assert cleanup_endpoint("test") is True
        assert runtime_files() == []
        assert cleanup_endpoint("test") is True
    with spawn_daemon("test"):
        assert serves()
