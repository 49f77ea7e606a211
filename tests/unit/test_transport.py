"""Connections over real sockets and pipes: deadlines, typed errors, and the peer's user."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from harness_ipc import Namespace
from harness_ipc._registry import files, records
from harness_ipc._transport import Connection, connect, deadline_after, listen, remaining
from harness_ipc.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    StartFailed,
)
from tests.support.marks import needs_linux, needs_posix, needs_root

T = TypeVar("T")

# Seconds, far above the time of anything here.
PATIENCE = 30.0
# A deadline that is meant to expire.
SHORT = 0.05
MIB = 1024 * 1024


@contextlib.contextmanager
def listening() -> Iterator[listen.Listener]:
    directory = Namespace().runtime_dir
    files.create_private_dir(directory)
    listener = listen.Listener(listen.new_address(directory, records.new_generation_id()))
    try:
        yield listener
    finally:
        listener.close()


@contextlib.contextmanager
def connected() -> Iterator[tuple[Connection, listen.Port]]:
    """Yield the client's and the daemon's end of a connection, with deadlines."""
    with listening() as listener, ThreadPoolExecutor(1) as executor:
        accepted = executor.submit(listener.accept_port)
        with contextlib.closing(connect(listener.address, deadline_after(PATIENCE))) as client:
            client.deadline = deadline_after(PATIENCE)
            with contextlib.closing(accepted.result(PATIENCE)) as port:
                yield client, port


@contextlib.contextmanager
def in_thread(call: Callable[..., T], *arguments: Any) -> Iterator[Future[T]]:
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(call, *arguments)


def write(port: listen.Port, data: bytes) -> None:
    port.begin_write(data)
    while port.is_writing:
        assert port.wait(deadline_after(PATIENCE), reading=False, limit=0) is None


def read(port: listen.Port, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = port.wait(deadline_after(PATIENCE), reading=True, limit=size)
        assert piece
        data += piece
    return data


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65535, 65536, 65537, MIB, 5 * MIB + 1])
def test_data_arrives_in_both_directions(size: int) -> None:
    data = os.urandom(size)
    with connected() as (client, port):
        with in_thread(client.send, [data]) as sent:
            assert read(port, size) == data
            sent.result()
        assert client.all_sent
        with in_thread(write, port, data) as written:
            received = b""
            while len(received) < size:
                received += client.receive(size)
            assert received == data
            written.result()
        assert not client.is_readable()


def test_a_wait_ends_when_it_is_woken_and_at_its_deadline() -> None:
    with connected() as (_, port):
        port.wake()
        assert port.wait(deadline_after(PATIENCE), reading=True, limit=10) is None
        deadline = deadline_after(SHORT)
        assert port.wait(deadline, reading=True, limit=10) is None
        assert time.monotonic() >= deadline - 0.001


# Deadlines.


def test_a_deadline_bounds_a_receive_and_a_send() -> None:
    with connected() as (client, _):
        for block in (lambda: client.receive(10), lambda: client.send([bytes(20 * MIB)])):
            client.deadline = time.monotonic() + SHORT
            with pytest.raises(DaemonTimeout):
                block()
            assert client.deadline <= time.monotonic() < client.deadline + PATIENCE / 2
        # In a pipe, a cancelled write may have arrived.
        assert client.all_sent is (sys.platform == "win32")


@pytest.mark.parametrize("timeout", [-1.0, -0.001, float("nan"), float("-inf")])
def test_a_timeout_is_a_number_of_seconds_from_zero_on(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        deadline_after(timeout)


def test_the_deadline_is_kept_in_monotonic_time() -> None:
    before = time.monotonic()
    assert before + 10 <= deadline_after(10) <= time.monotonic() + 10
    assert 0 < remaining(before + PATIENCE) <= PATIENCE
    assert remaining(float("inf")) == float("inf")
    with pytest.raises(DaemonTimeout):
        remaining(before)


# Broken connections.


def test_a_closed_peer_is_a_lost_connection_in_both_directions() -> None:
    with connected() as (client, port):
        write(port, b"last words")
        port.close()
        port.close()
        assert client.receive(100) == b"last words"
        assert client.is_readable()
        with pytest.raises(ConnectionLost):
            client.receive(100)
        for data in (b"short", bytes(MIB)):
            with pytest.raises(ConnectionLost):
                client.send([data])


def test_a_disconnected_client_ends_the_session() -> None:
    with connected() as (client, port):
        client.send([b"last words"])
        client.close()
        client.close()
        assert read(port, 10) == b"last words"
        assert port.wait(deadline_after(PATIENCE), reading=True, limit=10) == b""


@pytest.mark.parametrize("blocked", ["receive", "send"])
def test_abort_interrupts_another_thread(blocked: str) -> None:
    with connected() as (client, _):
        block = (client.receive, 10) if blocked == "receive" else (client.send, [bytes(20 * MIB)])
        with in_thread(*block) as result:
            client.abort()
            with pytest.raises(ConnectionLost):
                result.result()
        client.abort()


# Dial and listen.


def test_connecting_without_a_listener_is_not_running(private_directories: Path) -> None:
    with listening() as listener:
        pass
    with pytest.raises(DaemonNotRunning):
        connect(listener.address, time.monotonic() + PATIENCE)


def test_connecting_after_the_deadline_is_a_timeout() -> None:
    with listening() as listener, pytest.raises(DaemonTimeout):
        connect(listener.address, time.monotonic() - 1)


@needs_linux
def test_connecting_to_a_full_accept_queue_ends_at_the_deadline() -> None:
    with listening() as listener, contextlib.ExitStack() as stack:
        while True:
            raw = stack.enter_context(socket.socket(socket.AF_UNIX))
            raw.setblocking(False)
            if raw.connect_ex(listener.address) == errno.EAGAIN:
                break
        deadline = time.monotonic() + SHORT
        with pytest.raises(DaemonTimeout):
            connect(listener.address, deadline)
        assert deadline <= time.monotonic() + 0.01
        # Room again: it serves again.
        listener.accept_port().close()
        connect(listener.address, time.monotonic() + PATIENCE).close()


@pytest.mark.parametrize("accepting", [1, 3])
def test_wake_ends_all_accepts_and_close_removes_the_address(accepting: int) -> None:
    def accept(listener: listen.Listener) -> None:
        with contextlib.suppress(OSError):
            listener.accept_port().close()

    with listening() as listener:
        with ThreadPoolExecutor(accepting) as executor:
            accepts = [executor.submit(accept, listener) for _ in range(accepting)]
            # One wake-up may end only one of them, and only a pending one.
            while wait(accepts, SHORT).not_done:
                listener.wake()
        listener.close()
        listener.close()
        with pytest.raises(DaemonNotRunning):
            connect(listener.address, time.monotonic() + PATIENCE)
        if listen.FAMILY == "AF_UNIX":
            assert not os.path.exists(listener.address)


@needs_posix
def test_the_socket_is_private_under_any_umask() -> None:
    for mask in (0, 0o777):
        previous = os.umask(mask)
        try:
            with listening() as listener:
                assert stat.S_IMODE(os.stat(listener.address).st_mode) == 0o600
                connect(listener.address, time.monotonic() + PATIENCE).close()
        finally:
            os.umask(previous)


@needs_posix
def test_an_address_that_cannot_be_bound_is_a_failed_start(private_directories: Path) -> None:
    with listening() as listener:
        for address in (listener.address, str(private_directories / "missing" / "a.sock"), "d" * 200):
            with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR"):
                listen.Listener(address)
        # The existing listener is not affected.
        connect(listener.address, time.monotonic() + PATIENCE).close()


# Peer credentials.


@needs_linux
def test_peer_credentials_come_from_the_kernel() -> None:
    with connected() as (client, port):
        for peer in (client.peer, port.peer):
            assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())


@needs_linux
@needs_root
@pytest.mark.parametrize("stranger", ["client", "daemon"])
def test_another_users_peer_is_refused_despite_open_modes(stranger: str, private_directories: Path) -> None:
    private_directories.chmod(0o777)
    address = str(private_directories / "open.sock")
    with contextlib.ExitStack() as stack:
        if stranger == "daemon":
            os.seteuid(12345)
        try:
            listener = listen.Listener(address)
        finally:
            os.seteuid(0)
        stack.callback(listener.close)
        os.chmod(address, 0o666)
        if stranger == "daemon":
            with pytest.raises(AuthenticationFailed, match="12345"):
                connect(address, time.monotonic() + PATIENCE)
        else:
            raw = stack.enter_context(socket.socket(socket.AF_UNIX))
            os.seteuid(12345)
            try:
                raw.connect(address)
            finally:
                os.seteuid(0)
            with pytest.raises(AuthenticationFailed, match="12345"):
                listener.accept_port()
            # The next one is served.
            connect(address, time.monotonic() + PATIENCE).close()
            listener.accept_port().close()


if sys.platform != "win32":
    from harness_ipc._transport import dial

    def test_peer_credentials_of_darwin(monkeypatch: pytest.MonkeyPatch) -> None:
        class DarwinSocket:
            def getsockopt(self, level: int, option: int, size: int) -> bytes:
                # sys/un.h and sys/ucred.h: struct xucred is version, uid, a short number of groups, and sixteen groups.
                xucred = struct.pack("@IIh16I", 0, 501, 2, 20, 12, *[0] * 14)
                answer = {(0, 1): xucred, (0, 2): struct.pack("@i", 4242)}[level, option]
                assert size == len(answer)
                return answer

        monkeypatch.setattr(sys, "platform", "darwin")
        assert dial.peer_credentials(cast(socket.socket, DarwinSocket())) == (4242, 501)

    def test_a_socket_of_darwin_does_not_signal(monkeypatch: pytest.MonkeyPatch) -> None:
        options = []

        class DarwinSocket(socket.socket):
            def setsockopt(self, *arguments: Any) -> None:
                options.append(arguments)

        monkeypatch.setattr(sys, "platform", "darwin")
        left, right = socket.socketpair()
        with right, DarwinSocket(fileno=left.detach()) as sock:
            dial.prepare(sock)
            # sys/socket.h: SOL_SOCKET is 0xffff there, SO_NOSIGPIPE 0x1022.
            assert options == [(socket.SOL_SOCKET, 0x1022, 1)]
