"""Every call ends at its deadline, and its late reply does not go to another call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

import pytest

from harness_ipc import (
    ConnectionLost,
    DaemonTimeout,
    aconnect_daemon,
    connect_daemon,
    identify,
    ping,
    request,
)
from harness_ipc._registry import records
from tests.support import scripted
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Behaviour = Callable[["FakeDaemon", Connection[Any, Any]], None]
    Asking = Callable[[dict[str, Any], float], None]

TIMEOUT = 0.2
# Seconds that a loaded machine may add.
MARGIN = 30.0
# Resolution in seconds of time.monotonic() on Windows up to 3.12.
TICK = 0.016
ECHO = {"method": "echo", "params": {}}


@contextlib.contextmanager
def takes(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert seconds - TICK <= time.monotonic() - begin < seconds + MARGIN


@contextlib.contextmanager
def times_out(seconds: float = TIMEOUT) -> Iterator[None]:
    with takes(seconds), pytest.raises(DaemonTimeout):
        yield


async def aconnect() -> None:
    await aconnect_daemon("test", timeout=TIMEOUT)


CALLS: dict[str, Callable[[], object]] = {
    # Connecting waits for the daemon's proof, which a stopped daemon does not send.
    "connect_daemon": lambda: connect_daemon("test", timeout=TIMEOUT),
    "aconnect_daemon": lambda: asyncio.run(aconnect()),
    "request": lambda: request("test", ECHO, timeout=TIMEOUT),
    "large request": lambda: request("test", {"method": "echo", "params": {"text": "x" * 40_000_000}}, timeout=TIMEOUT),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_stopped_daemon_is_a_timeout_for_a_new_connection(daemon: DaemonProcess, call: Callable[[], object]) -> None:
    with stopped(daemon), takes(TIMEOUT), pytest.raises(DaemonTimeout) as caught:
        call()
    assert re.match(r"timed out after \d+(\.\d+)? s waiting for the daemon 'test' to (answer 'echo'|accept)", str(caught.value))


def test_a_stopped_daemon_does_not_answer_a_ping(daemon: DaemonProcess) -> None:
    with stopped(daemon):
        with takes(TIMEOUT):
            assert not ping("test", timeout=TIMEOUT)
        with takes(TIMEOUT):
            assert identify("test", timeout=TIMEOUT) is None
    assert ping("test", timeout=PATIENCE)


@pytest.mark.parametrize("text", ["", "x" * 40_000_000], ids=["short", "long"])
@pytest.mark.parametrize("used", [True, False])
def test_a_kept_client_ignores_a_late_reply(daemon: DaemonProcess, text: str, used: bool) -> None:
    with connect_daemon("test") as client:
        if used:
            assert client.call("echo", n=0) == {"n": 0}
        with stopped(daemon):
            for n in (1, 2):
                with times_out():
                    client.call("echo", n=n, text=text, timeout=TIMEOUT)
        for n in (3, 4):
            assert client.call("echo", n=n, timeout=PATIENCE) == {"n": n}


def test_a_kept_async_client_ignores_a_late_reply(daemon: DaemonProcess) -> None:
    async def main() -> None:
        async with await aconnect_daemon("test") as client:
            assert await client.call("echo", n=0) == {"n": 0}
            with stopped(daemon):
                with times_out():
                    await client.call("echo", n=1, timeout=TIMEOUT)
                with times_out():
                    await client.call("echo", n=2, timeout=TIMEOUT)
            assert await client.call("echo", n=3, timeout=PATIENCE) == {"n": 3}

    asyncio.run(main())


def test_after_a_timeout_the_next_request_gets_its_own_reply(daemon: DaemonProcess) -> None:
    with connect_daemon("test") as client:
        with times_out():
            client.call("sleep", seconds=2 * TIMEOUT, tag="late", timeout=TIMEOUT)
        assert client.call("echo", n=1) == {"n": 1}
        # The slow request was cancelled: it does not end later.
        time.sleep(2 * TIMEOUT)
        assert client.call("log") == [["begin", "late"]]
    with times_out():
        request("test", {"method": "sleep", "params": {"seconds": 600, "tag": "later"}}, timeout=TIMEOUT)


def test_request_timeout_is_the_default_timeout(daemon: DaemonProcess) -> None:
    with connect_daemon("test", request_timeout=TIMEOUT) as client:
        with times_out():
            client.call("sleep", seconds=600)
        assert client.call("sleep", seconds=TIMEOUT + 0.1, tag="t", timeout=PATIENCE) == "t"
        assert client.call("sleep", seconds=0.1, tag="t", timeout=float("inf")) == "t"


def test_the_first_request_may_come_late(daemon: DaemonProcess) -> None:
    with connect_daemon("test", timeout=1.0) as client:
        time.sleep(1.1)  # longer than the timeout for connecting
        assert client.call("echo", n=1) == {"n": 1}


def fill_queue(address: str) -> list[socket.socket]:
    """Connect until the accept queue is full."""
    connected: list[socket.socket] = []
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError:
            sock.close()
            return connected
        connected.append(sock)


@pytest.fixture
def full_queue(daemon: DaemonProcess) -> Iterator[None]:
    with stopped(daemon), contextlib.ExitStack() as stack:
        for sock in fill_queue(records.load("test").address):
            stack.enter_context(sock)
        yield


# On other systems a full queue refuses connections at once.
@needs_linux
@pytest.mark.usefixtures("full_queue")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_full_accept_queue_is_a_timeout(call: Callable[[], object]) -> None:
    with times_out():
        call()


@pytest.fixture
def many_signals() -> Iterator[None]:
    """Keep interrupting waits of the main thread by a signal with a handler."""
    assert sys.platform != "win32"
    over = threading.Event()
    main = threading.get_ident()

    def interrupt() -> None:
        while not over.wait(TIMEOUT / 10):
            signal.pthread_kill(main, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    thread = threading.Thread(target=interrupt)
    thread.start()
    yield
    over.set()
    thread.join(PATIENCE)
    signal.signal(signal.SIGUSR1, previous)


@needs_linux
@pytest.mark.usefixtures("full_queue", "many_signals")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_signals_do_not_end_the_wait_for_a_full_accept_queue(call: Callable[[], object]) -> None:
    with times_out():
        call()


@needs_posix
@pytest.mark.usefixtures("many_signals")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_signals_do_not_end_the_wait_for_a_stopped_daemon(daemon: DaemonProcess, call: Callable[[], object]) -> None:
    with stopped(daemon), times_out():
        call()


class FakeDaemon:
    """A daemon with scripted connections."""

    def __init__(self, behave: Behaviour) -> None:
        self.over = threading.Event()
        self.generation = scripted.Generation(lambda served: behave(self, served.connection))

    def prove(self, connection: Connection[Any, Any]) -> None:
        answer_challenge(connection, self.generation.keys.daemon)
        deliver_challenge(connection, self.generation.keys.client)

    def trickle(self, connection: Connection[Any, Any], size: int) -> None:
        """Send a frame of `size` bytes, a byte at a time."""
        for byte in struct.pack("!i", size) + bytes(size):
            os.write(connection.fileno(), bytes([byte]))
            if self.over.wait(TIMEOUT / 10):
                break

    def close(self) -> None:
        self.over.set()
        self.generation.close()


def trickle_proof(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    fake.trickle(connection, 200)


def trickle_reply(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    close_after_request(fake, connection)
    fake.trickle(connection, 1000)


def read_a_little_at_a_time(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    fake.prove(connection)
    while not fake.over.wait(TIMEOUT / 10):
        with contextlib.suppress(BlockingIOError):
            os.read(connection.fileno(), 10_000)


def say_nothing(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    fake.over.wait(PATIENCE)


def prove_and_say_nothing(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    fake.prove(connection)
    fake.over.wait(PATIENCE)


def close_at_once(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    pass


def close_in_proof(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    os.write(connection.fileno(), struct.pack("!i", 40) + b"half")


def close_after_proof(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    fake.prove(connection)


def close_after_request(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    fake.prove(connection)
    connection.recv_bytes()


def close_in_header(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    close_after_request(fake, connection)
    os.write(connection.fileno(), b"\0\0")


def close_in_reply(fake: FakeDaemon, connection: Connection[Any, Any]) -> None:
    close_after_request(fake, connection)
    os.write(connection.fileno(), struct.pack("!i", 100) + b'{"result": ')


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeDaemon]:
    with contextlib.closing(FakeDaemon(request.param)) as daemon:
        yield daemon


def ask_once(message: dict[str, Any], timeout: float) -> None:
    request("test", message, timeout=timeout)


def ask_kept(message: dict[str, Any], timeout: float) -> None:
    with connect_daemon("test", timeout=timeout) as client:
        client.request(message, timeout=timeout)


def ask_async(message: dict[str, Any], timeout: float) -> None:
    async def main() -> None:
        async with await aconnect_daemon("test", timeout=timeout) as client:
            await client.request(message, timeout=timeout)

    asyncio.run(main())


ASKING = pytest.mark.parametrize("ask", [ask_once, ask_kept, ask_async])
LARGE = {"text": "x" * 40_000_000}
SLOW = [
    (say_nothing, {}),
    (prove_and_say_nothing, {}),
    (prove_and_say_nothing, LARGE),
    pytest.param(trickle_proof, {}, marks=needs_posix),
    pytest.param(trickle_reply, {}, marks=needs_posix),
    pytest.param(read_a_little_at_a_time, LARGE, marks=needs_posix),
]
BREAKING = [
    (close_at_once, {}),
    (close_after_proof, {}),
    (close_after_proof, LARGE),
    (close_after_request, {}),
    pytest.param(close_in_proof, {}, marks=needs_posix),
    pytest.param(close_in_header, {}, marks=needs_posix),
    pytest.param(close_in_reply, {}, marks=needs_posix),
]


@ASKING
@pytest.mark.parametrize(("fake", "message"), SLOW, indirect=["fake"])
def test_a_daemon_that_takes_its_time_is_a_timeout(fake: FakeDaemon, message: dict[str, Any], ask: Asking) -> None:
    with times_out():
        ask(message, TIMEOUT)


@ASKING
@pytest.mark.parametrize(("fake", "message"), BREAKING, indirect=["fake"])
def test_a_daemon_that_hangs_up_is_a_lost_connection(fake: FakeDaemon, message: dict[str, Any], ask: Asking) -> None:
    with pytest.raises(ConnectionLost):
        ask(message, PATIENCE)


@pytest.mark.parametrize("fake", [say_nothing, prove_and_say_nothing, close_at_once, close_after_request], indirect=True)
def test_no_fault_of_a_daemon_is_an_error_of_ping(fake: FakeDaemon) -> None:
    assert ping("test", timeout=TIMEOUT) is False
    assert identify("test", timeout=TIMEOUT) is None
