"""Exhausted descriptors, threads, memory, disk and accept queue: typed errors, one log entry, and recovery."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from harness_ipc import (
    Busy,
    Client,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    RemoteError,
    ResourceExhausted,
    connect_daemon,
    daemon_alive,
    daemon_status,
    identify,
    log_path,
    ping,
    request,
    stop_daemon,
)
from harness_ipc._registry import records
from harness_ipc._transport import deadline_after, remaining
from tests.integration.test_manager_places import mount, needs_mount, unmount
from tests.support.marks import needs_address_limit, needs_linux, needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, spawn_daemon, spawn_python, stopped, wait_until
from tests.support.wire import FrameConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "scarce"
MIB = 2**20
NEVER = 3600.0
# A pump keeps up to this number of accepting threads.
WARM = 8
# Permitted log entries of one shortage, which may end and begin again a few times.
FEW = 10
# Far above the limit of pending handshakes.
CROWD = 1000
# Peers that exchange frames with the daemon, which takes longer on Windows.
INTRUDERS = 1000 if os.name == "posix" else 100
# Number of failing requests.
FAILURES = 1000
# With stacks this large, a memory limit can prevent another thread and nothing else.
STACK = 64 * MIB
LARGE_THREADS = f"""
import runpy, threading
threading.stack_size({STACK})
runpy.run_module("tests.support.processes", run_name="__main__", alter_sys=True)
"""


def is_served(timeout: float = PATIENCE) -> bool:
    return request(NAME, {"method": "echo", "params": {"n": 1}}, timeout=timeout) == {"result": {"n": 1}}


def becomes_served() -> bool:
    """Return whether a normal client is served now. During a shortage, it gets a typed error."""
    with contextlib.suppress(DaemonTimeout, ConnectionLost, Busy):
        return is_served(5.0)
    return False


class Watched:
    """A daemon whose resource limits can be changed. It has to recover once they are raised again."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.process = psutil.Process(daemon.pid)
        assert is_served()
        self.before = self.held()
        self.threads = self.process.num_threads() + WARM

    def held(self) -> int:
        """Return the number of its descriptors. On Windows, where threads have handles too, that of its connections."""
        if sys.platform == "win32":
            return int(request(NAME, {"meta": "ping"}, timeout=PATIENCE)["connections"])
        return self.process.num_fds()

    @contextlib.contextmanager
    def limited(self, what: str, amount: int) -> Iterator[None]:
        assert sys.platform == "linux"
        kind = getattr(psutil, what)
        soft, hard = self.process.rlimit(kind)
        self.process.rlimit(kind, (amount, hard))
        try:
            yield
        finally:
            self.process.rlimit(kind, (soft, hard))

    def memory(self) -> int:
        return self.process.memory_info().vms

    def has_recovered(self) -> bool:
        return self.held() <= self.before and self.process.num_threads() <= self.threads


def log_lines(*words: str) -> list[str]:
    text = log_path(NAME).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if all(word in line for word in words)]


@contextlib.contextmanager
def watched(*python: str, **options: Any) -> Iterator[Watched]:
    """Yield a daemon. Assert at the end that it serves, without additional descriptors and threads."""
    with contextlib.ExitStack() as stack:
        if python:
            daemon = stack.enter_context(spawn_python(*python, NAME, json.dumps(options)))
            assert daemon.read_line() == "ready"
        else:
            daemon = stack.enter_context(spawn_daemon(NAME, **options))
        seen = Watched(daemon)
        yield seen
        wait_until(becomes_served)
        wait_until(seen.has_recovered)
        assert daemon.process.poll() is None
        assert len(log_lines(" ERROR ")) + len(log_lines(" WARNING ")) <= FEW


@contextlib.contextmanager
def many_open_files() -> Iterator[None]:
    """Raise the limits of this process and its children."""
    if sys.platform == "win32":
        # The number of handles has no such limit.
        yield
        return
    import resource

    needed = 2 * CROWD
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this machine allows a process {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def silent_crowd(count: int) -> Iterator[None]:
    """Connect many times without the key, and send nothing."""
    address = records.load(NAME).address
    deadline = deadline_after(PATIENCE)
    with contextlib.ExitStack() as stack:
        while count:
            try:
                stack.enter_context(FrameConnection(address))
                count -= 1
            except DaemonNotRunning:
                # On some systems, a full queue refuses connections at once.
                remaining(deadline)
        yield


def fate(action: Callable[[], object]) -> str:
    """Return "answered", or the name of the package's error. Any other error fails the test."""
    try:
        action()
    except HarnessIPCError as error:
        return type(error).__name__
    return "answered"


def ask_many(count: int, timeout: float = PATIENCE) -> Counter[str]:
    """Send requests with different tags from eight threads. Count the outcomes, and check each reply's tag."""

    def ask(tag: int) -> str:
        def one() -> None:
            assert request(NAME, {"method": "echo", "params": {"tag": tag}}, timeout=timeout) == {"result": {"tag": tag}}

        return fate(one)

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(ask, range(count)))


# Descriptors.


def fill_up(stack: contextlib.ExitStack) -> list[Client]:
    """Connect clients until the daemon has no descriptor left, and return them. `stack` closes them."""
    inside: list[Client] = []
    for _ in range(100):
        client = stack.enter_context(connect_daemon(NAME, request_timeout=PATIENCE))
        if fate(lambda: client.call("echo", n=1)) != "answered":  # noqa: B023
            return inside
        inside.append(client)
    raise AssertionError("the limit was not reached")


@needs_linux
def test_more_clients_than_descriptors_get_busy() -> None:
    with watched() as daemon, daemon.limited("RLIMIT_NOFILE", 64):
        with contextlib.ExitStack() as stack:
            inside = fill_up(stack)
            assert 20 < len(inside) < 64
            for n in range(5):
                with pytest.raises(Busy, match=r"no free file descriptor: limit 64 \(ulimit -n\)") as caught:
                    is_served()
                assert not caught.value.maybe_executed
                assert ping(NAME, PATIENCE)
                status = daemon_status(NAME, timeout=PATIENCE)
                assert (status.state, status.connections) == ("running", len(inside))
                assert status.problem is not None
                assert "limit 64 (ulimit -n)" in status.problem
                assert inside[n].call("echo", n=n) == {"n": n}
            assert len(log_lines("can't accept connections for now", "limit 64 (ulimit -n)")) == 1
        wait_until(becomes_served)
        assert daemon_status(NAME, timeout=PATIENCE).problem is None
        # All later requests are answered at the same limit: it applies to simultaneous connections.
        assert ask_many(200) == {"answered": 200}


@needs_linux
def test_a_daemon_without_descriptors_can_be_stopped() -> None:
    with spawn_daemon(NAME) as daemon, contextlib.ExitStack() as stack:
        psutil.Process(daemon.pid).rlimit(psutil.RLIMIT_NOFILE, (64, 64))
        fill_up(stack)
        assert request(NAME, {"meta": "shutdown"}, timeout=PATIENCE) == {"shutdown": True}
        assert daemon.wait() == 0


@needs_linux
def test_silent_clients_with_all_descriptors_block_nobody() -> None:
    with watched(handshake_timeout=NEVER) as daemon, connect_daemon(NAME) as inside:
        assert inside.call("echo", n=1) == {"n": 1}
        with daemon.limited("RLIMIT_NOFILE", 64):
            with silent_crowd(100):
                wait_until(lambda: bool(log_lines("can't accept connections for now")))
                assert inside.call("echo", n=2) == {"n": 2}
                assert fate(is_served) in ("answered", "Busy", "ConnectionLost")
                assert inside.call("echo", n=3) == {"n": 3}
            wait_until(becomes_served)


@needs_linux
def test_descriptor_limit_does_not_flood_the_log() -> None:
    with watched() as daemon, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connect_daemon(NAME)) for _ in range(40)]
        assert all(client.call("echo", n=1) == {"n": 1} for client in kept)
        # Two descriptors for eight clients: they reach the limit again and again.
        with daemon.limited("RLIMIT_NOFILE", daemon.process.num_fds() + 2):
            outcomes = ask_many(200)
            # A handshake of more than a second, on a busy machine, makes room for another one.
            assert set(outcomes) <= {"answered", "Busy", "ConnectionLost"}
            assert outcomes["answered"] > 0
            assert all(client.call("echo", n=2) == {"n": 2} for client in kept)
        assert len(log_lines("can't accept connections")) <= FEW


@contextlib.contextmanager
def without_descriptors() -> Iterator[None]:
    """Keep this process from opening descriptors."""
    if sys.platform == "win32":
        raise AssertionError("for POSIX")
    import resource

    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_linux
def test_a_client_without_descriptors_gets_resource_exhausted() -> None:
    with watched(), connect_daemon(NAME) as inside:
        calls: list[Callable[[], object]] = [
            lambda: connect_daemon(NAME),
            lambda: request(NAME, {}),
            lambda: ping(NAME),
            lambda: identify(NAME),
            lambda: daemon_status(NAME),
            lambda: daemon_alive(NAME),
            lambda: stop_daemon(NAME),
        ]
        with without_descriptors():
            for call in calls:
                with pytest.raises(ResourceExhausted, match=os.strerror(errno.EMFILE)) as caught:
                    call()
                assert not caught.value.maybe_executed
            # A connected client needs no further descriptor.
            assert inside.call("echo", n=1) == {"n": 1}


# Threads.


@needs_address_limit
def test_without_another_thread_all_short_requests_are_answered() -> None:
    with watched("-c", LARGE_THREADS, handshake_timeout=NEVER) as daemon, connect_daemon(NAME) as inside:
        assert inside.call("echo", n=1) == {"n": 1}
        with daemon.limited("RLIMIT_AS", daemon.memory() + STACK // 2), silent_crowd(20):
            assert ask_many(CROWD) == {"answered": CROWD}
            assert inside.call("echo", n=2) == {"n": 2}
            assert is_served()


@needs_address_limit
def test_long_request_without_a_thread_fails_alone() -> None:
    with watched("-c", LARGE_THREADS, handshake_timeout=NEVER) as daemon, connect_daemon(NAME) as inside:
        text = "x" * 200_000
        assert inside.call("echo", text=text) == {"text": text}
        with daemon.limited("RLIMIT_AS", daemon.memory() + STACK // 2):
            for n in range(20):
                outcome = fate(lambda: inside.call("echo", text=text, timeout=10.0))
                assert outcome in ("answered", "ConnectionLost", "Busy", "RemoteError")
                wait_until(lambda n=n: fate(lambda: inside.call("echo", n=n)) == "answered")  # type: ignore[misc]
            assert len(log_lines("no thread can be started")) <= FEW
        assert inside.call("echo", text=text) == {"text": text}


# Memory.


# Available memory in sizes of the message: too little to receive, to decode or to answer it.
@needs_address_limit
@pytest.mark.parametrize("room", [1.5, 2.5, 3.5])
def test_out_of_memory_is_a_typed_error(room: float) -> None:
    with watched() as daemon, connect_daemon(NAME) as client:
        text = "x" * (40 * MIB)
        failed: set[str] = set()
        for method, params in (("echo", {"text": text}), ("fill", {"size": len(text)})):
            with daemon.limited("RLIMIT_AS", daemon.memory() + int(room * len(text))):
                outcomes = {fate(lambda: client.call(method, timeout=PATIENCE, **params)) for _ in range(2)}  # noqa: B023
                # Thread stacks reserve memory in larger pieces than the message, so the largest room may be enough.
                may_be_answered = method == "fill" or room > 3
                assert outcomes <= {"ConnectionLost", "RemoteError"} | ({"answered"} if may_be_answered else set()), outcomes
                failed |= outcomes - {"answered"}
                assert client.call("echo", n=1) == {"n": 1}
                assert is_served()
        assert not failed or log_lines("MemoryError") or log_lines("the reply can't be sent")
        # With enough memory, the same request is answered.
        assert client.call("echo", text=text, timeout=PATIENCE) == {"text": text}


# Disk.


@contextlib.contextmanager
def full_disk(base: Path, daemon: Watched) -> Iterator[None]:
    filler = base / "log" / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def no_larger_file(base: Path, daemon: Watched) -> Iterator[None]:
    with daemon.limited("RLIMIT_FSIZE", log_path(NAME).stat().st_size + 100):
        yield


@pytest.fixture
def small_log(private_directories: Path) -> Iterator[None]:
    (private_directories / "log").mkdir(mode=0o700)
    assert mount(private_directories / "log", "size=256k")
    try:
        yield
    finally:
        unmount(private_directories / "log")


def write_no_log(base: Path, shortage: Callable[[Path, Watched], contextlib.AbstractContextManager[None]]) -> None:
    with spawn_daemon(NAME) as process, connect_daemon(NAME) as client:
        daemon = Watched(process)
        with shortage(base, daemon):
            for _ in range(100):
                client.call("log this", text="x" * 1000)
            assert is_served()
            assert not log_lines("x" * 1000) or log_path(NAME).stat().st_size < 100_000
        # With free space, the same log file is written again.
        client.call("log this", text="afterwards")
        assert log_lines("ERROR tests.app: afterwards")
        assert is_served()
        client.close()
        wait_until(daemon.has_recovered)


@needs_mount
@pytest.mark.usefixtures("small_log")
def test_a_full_disk_affects_only_the_log(private_directories: Path) -> None:
    write_no_log(private_directories, full_disk)


@needs_linux
def test_a_log_that_cannot_grow_affects_nothing_else(private_directories: Path) -> None:
    write_no_log(private_directories, no_larger_file)


# The accept queue.


@needs_posix
def test_stopped_daemon_times_out_200_clients_and_recovers() -> None:
    with many_open_files(), watched() as daemon, ThreadPoolExecutor(200) as pool:
        ask = {"method": "sleep", "params": {"seconds": 0, "tag": "given up"}}
        with stopped(daemon.daemon):
            jobs = [pool.submit(fate, lambda: request(NAME, ask, timeout=1.0)) for _ in range(200)]
            fates = Counter(job.result(PATIENCE) for job in jobs)
        # A system that refuses connections at a full queue makes the daemon look absent.
        assert set(fates) <= ({"DaemonTimeout"} if sys.platform == "linux" else {"DaemonTimeout", "DaemonNotRunning"})
        wait_until(becomes_served)
        # No handshake was complete, so no request ran.
        assert request(NAME, {"method": "log"}, timeout=PATIENCE) == {"result": []}


# Many connections of the same user, without the key.


@needs_posix
def test_a_thousand_silent_connections_block_nobody() -> None:
    with many_open_files(), watched(handshake_timeout=NEVER) as daemon, connect_daemon(NAME) as inside:
        assert inside.call("echo", n=1) == {"n": 1}
        with silent_crowd(CROWD):
            assert is_served()
            assert inside.call("echo", n=2) == {"n": 2}
            # Pending handshakes are bounded.
            assert daemon.held() < daemon.before + CROWD // 2
            assert daemon.process.num_threads() < CROWD // 2


def give_a_wrong_key(address: str) -> None:
    with FrameConnection(address) as connection:
        # The daemon's proof is not checked.
        connection.send_bytes(b"#CHALLENGE#{sha256}" + os.urandom(32))
        connection.recv_bytes(256)
        connection.send_bytes(b"#WELCOME#")
        connection.recv_bytes(256)
        connection.send_bytes(bytes(32))
        assert connection.recv_bytes(256) == b"#FAILURE#"


def test_a_crowd_with_a_wrong_key_does_not_fill_the_log() -> None:
    with watched(), ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(give_a_wrong_key, records.load(NAME).address) for _ in range(INTRUDERS)]:
            job.result(PATIENCE)
        assert log_lines("refused the client with pid", str(os.getpid()))


def test_failing_requests_do_not_fill_the_log() -> None:
    """Regression: tracebacks pushed everything else out of the log within seconds."""
    with watched(), connect_daemon(NAME) as client:
        for number in range(FAILURES):
            with pytest.raises(RemoteError):
                client.call("raise", text=f"failure {number}")
            with pytest.raises(RemoteError):
                client.call("return", what="nan")
            with pytest.raises(RemoteError):
                client.call("return", what="list")
        # Each kind of error is in the log, with a traceback, and so are earlier entries.
        assert log_lines("starting ")
        assert log_lines("ValueError: failure 0")
        assert log_lines("the reply can't be sent")
        assert log_lines("TypeError: the handler returned list")
        # Each kind is logged once in ten seconds, and a loaded machine takes longer.
        assert len(log_lines("the handler failed")) < FAILURES // 10
        assert len(log_lines("the reply can't be sent")) < FAILURES // 10
        assert log_path(NAME).stat().st_size < 100_000


def test_a_health_check_that_fails_does_not_fill_the_log() -> None:
    with spawn_daemon(NAME), connect_daemon(NAME) as client:
        client.call("fail health")
        for _ in range(FAILURES):
            assert client.request({"meta": "health"})["error"]["message"] == "not well"
        assert 1 <= len(log_lines("health check failed: LookupError: not well")) < FAILURES // 10
        assert is_served()


def test_a_crowd_that_is_turned_away_does_not_fill_the_log() -> None:
    with watched(max_connections=1), contextlib.closing(connect_daemon(NAME)) as inside:
        wait_until(lambda: fate(lambda: inside.call("echo", n=1)) == "answered")
        assert ask_many(INTRUDERS) == {"Busy": INTRUDERS}
        assert inside.call("echo", n=2) == {"n": 2}
        assert log_lines("connections are taken")
