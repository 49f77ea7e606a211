"""A client's connection over real sockets and pipes: data, deadlines, typed errors, `all_sent`."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection as Stock
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import PeerCredentials, _transport
from harness_ipc._transport import Connection, deadline_after
from harness_ipc.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    ResourceExhausted,
)
from tests.support.marks import needs_linux, needs_posix, needs_root

PATIENCE = 30.0
# A deadline that is meant to expire.
SHORT = 0.1
MIB = 1024 * 1024
FAMILY = "AF_PIPE" if sys.platform == "win32" else "AF_UNIX"


def new_address(directory: Path) -> str:
    return rf"\\.\pipe\harness-ipc-test-{os.urandom(8).hex()}" if FAMILY == "AF_PIPE" else str(directory / "s.sock")


@contextlib.contextmanager
def connected(directory: Path) -> Iterator[tuple[Connection, Stock[Any, Any]]]:
    """Yield the client's end, and the standard library's other end."""
    address = new_address(directory)
    with Listener(address, FAMILY) as listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept)
        client = _transport.connect(address, deadline_after(PATIENCE))
        client.deadline = deadline_after(PATIENCE)
        try:
            with accepted.result(PATIENCE) as peer:
                yield client, peer
        finally:
            client.close()


def receive_frames(client: Connection, count: int, limit: int = 10 * MIB) -> list[bytes]:
    framing = _transport.Framing()
    frames: list[bytes] = []
    while len(frames) < count:
        framing.feed(client.receive(limit))
        while (frame := framing.next_frame(limit)) is not None:
            frames.append(frame)
    return frames


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536, 65537, 5 * MIB])
def test_frames_of_any_size_pass_both_ways(size: int, private_directories: Path) -> None:
    payload = os.urandom(size)
    with connected(private_directories) as (client, peer), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, _transport.Framing.encode([payload, b"next"]))
        assert [peer.recv_bytes(), peer.recv_bytes()] == [payload, b"next"]
        sending.result(PATIENCE)
        assert client.all_sent
        answering = pool.submit(lambda: list(map(peer.send_bytes, (payload, b"next"))))
        assert receive_frames(client, 2) == [payload, b"next"]
        answering.result(PATIENCE)
        assert not client.is_readable()
        peer.send_bytes(b"more")
        assert client.is_readable()


def test_a_deadline_bounds_a_receive_and_a_send(private_directories: Path) -> None:
    with connected(private_directories) as (client, _):
        for block in (lambda: client.receive(100), lambda: client.send([bytes(20 * MIB)])):
            client.deadline = deadline_after(SHORT)
            with pytest.raises(DaemonTimeout):
                block()
            assert client.deadline <= time.monotonic() + 0.02


@needs_posix
def test_the_last_byte_is_not_sent_while_the_peer_does_not_read(private_directories: Path) -> None:
    with connected(private_directories) as (client, peer):
        client.send([b"x"])
        assert client.all_sent
        client.deadline = deadline_after(SHORT)
        with pytest.raises(DaemonTimeout):
            client.send([b"y" * 20 * MIB, b"z"])
        assert not client.all_sent
        peer.close()
        with pytest.raises(ConnectionLost):
            client.send([])
        assert not client.all_sent


@pytest.mark.parametrize("blocked", ["receive", "send"])
def test_abort_interrupts_another_thread(blocked: str, private_directories: Path) -> None:
    with connected(private_directories) as (client, _), ThreadPoolExecutor(1) as pool:
        began = threading.Event()

        def block() -> None:
            began.set()
            client.receive(10) if blocked == "receive" else client.send([bytes(20 * MIB)])

        job = pool.submit(block)
        assert began.wait(PATIENCE)
        client.abort()
        with pytest.raises(ConnectionLost):
            job.result(PATIENCE)
        assert client.is_readable()
        client.abort()


def test_data_is_received_before_a_lost_connection(private_directories: Path) -> None:
    with connected(private_directories) as (client, peer):
        peer.send_bytes(b"last words")
        peer.close()
        with pytest.raises(ConnectionLost):
            client.send([bytes(MIB)] * 100)
        # Data that it sent before can still be read.
        assert receive_frames(client, 1) == [b"last words"]
        assert client.is_readable()
        with pytest.raises(ConnectionLost):
            client.receive(100)
        client.close()
        client.close()


def test_an_address_without_a_listener_is_not_running(private_directories: Path) -> None:
    with pytest.raises(DaemonNotRunning):
        _transport.connect(new_address(private_directories), deadline_after(PATIENCE))


@needs_posix
@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("dead.sock", DaemonNotRunning),
        ("file", DaemonNotRunning),
        ("file/below.sock", DaemonNotRunning),
        ("missing/a.sock", DaemonNotRunning),
        ("d" * 200, HarnessIPCError),
        ("nul \0.sock", HarnessIPCError),
    ],
    ids=ascii,
)
def test_errors_without_a_daemon_are_typed(address: str, kind: type[Exception], private_directories: Path) -> None:
    (private_directories / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(private_directories / "dead.sock"))
    for connect in CONNECTS:
        with pytest.raises(kind):
            connect(f"{private_directories}/{address}")


@needs_linux
def test_a_full_accept_queue_is_a_timeout_and_room_is_used(private_directories: Path) -> None:
    from harness_ipc._transport.dial import connect_now

    address = new_address(private_directories)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(address)
        listener.listen(1)
        while (connection := connect_now(address)) is not None:
            stack.callback(connection.close)
        deadline = deadline_after(SHORT)
        with pytest.raises(DaemonTimeout):
            _transport.connect(address, deadline)
        assert deadline <= time.monotonic() + 0.02
        listener.accept()[0].close()
        _transport.connect(address, deadline_after(PATIENCE)).close()


@needs_linux
def test_no_free_descriptor_is_typed(private_directories: Path) -> None:
    import resource

    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for connect in CONNECTS:
            with pytest.raises(ResourceExhausted, match=os.strerror(errno.EMFILE)):
                connect(new_address(private_directories))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_linux
@needs_root
def test_another_users_daemon_is_refused_despite_open_modes(private_directories: Path) -> None:
    private_directories.chmod(0o777)
    address = new_address(private_directories)
    with socket.socket(socket.AF_UNIX) as listener:
        os.seteuid(12345)
        try:
            listener.bind(address)
            listener.listen(5)
        finally:
            os.seteuid(0)
        for connect in CONNECTS:
            with pytest.raises(AuthenticationFailed, match="12345"):
                connect(address)


@needs_linux
def test_peer_credentials_come_from_the_kernel(private_directories: Path) -> None:
    with connected(private_directories) as (client, _):
        assert (client.peer.pid, client.peer.uid) == (os.getpid(), os.geteuid())


CONNECTS: list[Callable[[str], object]] = [lambda address: _transport.connect(address, deadline_after(PATIENCE))]

if sys.platform != "win32":
    from harness_ipc._transport import dial

    CONNECTS.append(dial.connect_now)

    def test_a_forked_childs_copy_ends_no_connection(private_directories: Path) -> None:
        with connected(private_directories) as (client, peer):
            client.close_inherited()
            # Closed without a shutdown: another copy of the descriptor would still work.
            assert client.fileno() == -1
            peer.close()

    def test_sending_and_receiving_without_waiting(private_directories: Path) -> None:
        with connected(private_directories) as (client, peer):
            assert client.receive_now(100) is None
            assert client.send_now([b"\0\0\0\1x"])
            assert peer.recv_bytes() == b"x"
            assert not client.send_now([bytes(20 * MIB)])
            assert not client.all_sent

    def test_a_socket_of_darwin_does_not_signal(monkeypatch: pytest.MonkeyPatch) -> None:
        options = []

        class DarwinSocket(socket.socket):
            def setsockopt(self, *arguments: Any) -> None:
                options.append(arguments)

        monkeypatch.setattr(sys, "platform", "darwin")
        left, right = socket.socketpair()
        with right:
            dial.Connection(DarwinSocket(fileno=left.detach()), PeerCredentials(None, None)).close()
        # sys/socket.h: SOL_SOCKET is 0xffff there, SO_NOSIGPIPE 0x1022.
        assert options == [(socket.SOL_SOCKET, 0x1022, 1)]
