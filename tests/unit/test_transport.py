"""Connections over real sockets and pipes: whole frames, limits, deadlines that hold, typed errors when they break."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from harness_ipc import Namespace, transport
from harness_ipc._registry import files, records
from harness_ipc.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    MessageTooLarge,
    ResourceExhausted,
    StartFailed,
)
from tests.marks import needs_linux, needs_posix, needs_root

T = TypeVar("T")

# Far above what anything here takes: it ends a hang.
PATIENCE = 30.0
# A deadline that is meant to pass.
SHORT = 0.05
MIB = 1024 * 1024
SIZES = [0, 1, 4091, 4092, 4093, 4095, 4096, 4097, 16383, 16384, 16385, 65535, 65536, 65537, MIB, 5 * MIB + 1]


@contextlib.contextmanager
def listening() -> Iterator[transport.Listener]:
    directory = Namespace().runtime_dir
    files.create_private_dir(directory)
    listener = transport.Listener(transport.new_address(directory, records.new_generation_id()))
    try:
        yield listener
    finally:
        listener.close()


@contextlib.contextmanager
def connected() -> Iterator[tuple[transport.Connection, transport.Connection]]:
    """Yield the client's and the daemon's end of a connection; nothing on either blocks for ever."""
    deadline = time.monotonic() + PATIENCE
    with listening() as listener, transport.dial(listener.address, deadline) as client, listener.accept() as daemon:
        client.deadline = daemon.deadline = deadline
        yield client, daemon


@contextlib.contextmanager
def raw_peer() -> Iterator[tuple[socket.socket, transport.Connection]]:
    """Yield a socket that may send anything, and the daemon's end of its connection."""
    with listening() as listener, socket.socket(socket.AF_UNIX) as raw:
        raw.connect(listener.address)
        raw.settimeout(PATIENCE)
        with listener.accept() as daemon:
            daemon.deadline = time.monotonic() + PATIENCE
            yield raw, daemon


@contextlib.contextmanager
def in_thread(call: Callable[..., T], *arguments: Any) -> Iterator[Future[T]]:
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(call, *arguments)


def send_all(connection: transport.Connection, *frames: bytes) -> None:
    for frame in frames:
        transport.send(connection, frame)


def header(size: int) -> bytes:
    return struct.pack("!i", size)


def raw_frame(payload: bytes) -> bytes:
    return header(len(payload)) + payload


# Frames.


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_of_any_size_arrives_whole_and_alone(size: int) -> None:
    payload = os.urandom(size)
    with connected() as (client, daemon):
        for sender, receiver in ((client, daemon), (daemon, client)):
            with in_thread(send_all, sender, payload, b"next"):
                assert transport.receive(receiver, size) == payload
                assert transport.receive(receiver, 4) == b"next"
            assert not receiver.readable_now()


@pytest.mark.parametrize("size", SIZES)
def test_what_is_held_goes_first_and_is_not_forgotten(size: int) -> None:
    payload = os.urandom(size)
    with connected() as (client, daemon):
        client.hold(b"first")
        client.hold(b"second")
        with in_thread(transport.send, client, payload):
            assert [transport.receive(daemon, MIB * 6) for _ in range(3)] == [b"first", b"second", payload]
        # A receive that has to wait sends it too: else both sides would wait.
        client.hold(b"question")
        with in_thread(transport.receive, client, 10) as answer:
            assert transport.receive(daemon, 10) == b"question"
            transport.send(daemon, b"answer")
            assert answer.result() == b"answer"
        client.hold(b"last")
        transport.flush(client)
        assert transport.receive(daemon, 10) == b"last"


@pytest.mark.parametrize("size", SIZES)
def test_what_was_sent_without_waiting_arrives_whole(size: int) -> None:
    payload = os.urandom(size)

    def send_as_far_as_it_goes(connection: transport.Connection) -> None:
        for _ in range(5):
            if connection.try_send(payload):
                transport.flush(connection)
            else:
                transport.send(connection, payload)

    with connected() as (client, daemon), in_thread(send_as_far_as_it_goes, daemon) as sent:
        for _ in range(5):
            assert transport.receive(client, size) == payload
        sent.result()


@needs_posix
def test_sending_without_waiting_keeps_what_a_peer_does_not_read_for_the_flush() -> None:
    frames = [os.urandom(60_000) for _ in range(20)]
    with connected() as (client, daemon):
        assert all(daemon.try_send(frame) for frame in frames)
        with in_thread(transport.flush, daemon) as flushed:
            for frame in frames:
                assert transport.receive(client, 60_000) == frame
            flushed.result()
        assert all(daemon.try_send(frame) for frame in frames)
        daemon.deadline = time.monotonic() + SHORT
        with pytest.raises(DaemonTimeout):
            transport.flush(daemon)


def test_a_frame_at_the_limit_is_received_and_one_above_it_is_too_large() -> None:
    with connected() as (client, daemon):
        transport.send(client, b"x" * 1000)
        assert len(transport.receive(daemon, 1000)) == 1000
        transport.send(client, b"x" * 1001)
        with pytest.raises(MessageTooLarge) as caught:
            transport.receive(daemon, 1000)
        if sys.platform != "win32":
            assert (caught.value.size, caught.value.limit) == (1001, 1000)


@needs_posix
@pytest.mark.parametrize(
    "size", [header(2**31 - 1), header(-1) + struct.pack("!Q", 2**63), header(-1) + struct.pack("!Q", 1001)]
)
def test_an_announcement_above_the_limit_is_refused_before_anything_is_read(size: bytes) -> None:
    with raw_peer() as (raw, daemon):
        raw.sendall(size)
        with pytest.raises(MessageTooLarge) as caught:
            transport.receive(daemon, 1000)
    assert caught.value.size is not None
    assert caught.value.size > 1000


@needs_posix
def test_frames_that_arrive_in_one_piece_are_received_one_by_one() -> None:
    with raw_peer() as (raw, daemon):
        raw.sendall(
            raw_frame(b"one") + raw_frame(b"") + raw_frame(b"two") + header(-1) + struct.pack("!Q", 2) + b"xy" + header(3)
        )
        assert transport.receive(daemon, 10) == b"one"
        assert daemon.readable_now()
        assert [transport.receive(daemon, 10) for _ in range(3)] == [b"", b"two", b"xy"]
        raw.sendall(b"end")
        assert transport.receive(daemon, 10) == b"end"
        assert not daemon.readable_now()


# Deadlines.


def test_a_deadline_bounds_a_receive_and_a_send() -> None:
    with connected() as (client, _):
        for block in (lambda: transport.receive(client, 10), lambda: transport.send(client, bytes(20 * MIB))):
            client.deadline = time.monotonic() + SHORT
            with pytest.raises(DaemonTimeout):
                block()
            assert client.deadline <= time.monotonic() < client.deadline + PATIENCE / 2


@needs_posix
@pytest.mark.parametrize("start", [header(MIB), header(-1) + struct.pack("!Q", MIB)], ids=["header", "long header"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_peer_that_trickles_does_not_extend_the_deadline(start: bytes, at_once: bool) -> None:
    ended = threading.Event()

    def trickle(raw: socket.socket) -> None:
        if at_once:
            raw.sendall(start)
        # It ends, so that a deadline which is extended shows as another error and not as a hang.
        for byte in (b"" if at_once else start) + b"x" * 50:
            if ended.wait(SHORT):
                return
            raw.sendall(bytes([byte]))
        raw.shutdown(socket.SHUT_WR)

    with raw_peer() as (raw, daemon), in_thread(trickle, raw):
        daemon.deadline = time.monotonic() + 6 * SHORT
        try:
            with pytest.raises(DaemonTimeout):
                transport.receive(daemon, MIB)
        finally:
            ended.set()


@pytest.mark.parametrize("timeout", [-1.0, -0.001, float("nan"), float("-inf")])
def test_a_timeout_is_a_number_of_seconds_from_zero_on(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        transport.deadline_after(timeout)


def test_the_deadline_is_kept_in_monotonic_time() -> None:
    before = time.monotonic()
    assert before + 10 <= transport.deadline_after(10) <= time.monotonic() + 10
    assert 0 < transport.remaining(before + PATIENCE) <= PATIENCE
    assert transport.remaining(float("inf")) == float("inf")
    with pytest.raises(DaemonTimeout):
        transport.remaining(before)


# The ways to break.


@needs_posix
@pytest.mark.parametrize(
    "sent",
    [b"", header(5)[:1], header(5)[:3], header(5), raw_frame(b"hello")[:-1], header(-1), header(-1) + b"\0" * 7,
     header(-2), header(-(2**31))],
    ids=lambda sent: sent.hex(),
)  # fmt: skip
def test_a_stream_that_ends_or_makes_no_sense_is_a_lost_connection(sent: bytes) -> None:
    with raw_peer() as (raw, daemon):
        raw.sendall(sent)
        if not sent.startswith(b"\x80") and sent != header(-2):
            raw.close()
        with pytest.raises(ConnectionLost):
            transport.receive(daemon, 100)


def test_a_peer_that_has_gone_is_a_lost_connection_for_both_directions() -> None:
    with connected() as (client, daemon):
        transport.send(daemon, b"last words")
        daemon.close()
        daemon.close()
        assert transport.receive(client, 100) == b"last words"
        assert client.readable_now()
        with pytest.raises(ConnectionLost):
            transport.receive(client, 100)
        for payload in (b"short", bytes(MIB)):
            with pytest.raises(ConnectionLost):
                transport.send(client, payload)


@pytest.mark.parametrize("blocked", ["receive", "send"])
def test_aborting_ends_what_another_thread_is_blocked_in(blocked: str) -> None:
    with connected() as (client, _):
        block = (transport.receive, client, 10) if blocked == "receive" else (transport.send, client, bytes(20 * MIB))
        with in_thread(*block) as result:
            client.abort()
            with pytest.raises(ConnectionLost):
                result.result()
        client.abort()


def test_finishing_still_delivers_what_has_arrived() -> None:
    with connected() as (client, daemon):
        for frame in (b"one", b"two" * 1000):
            transport.send(client, frame)
        daemon.finish_receiving()
        assert transport.receive(daemon, MIB) == b"one"
        # In the middle, too, replies can be sent.
        transport.send(daemon, b"reply")
        assert transport.receive(client, 10) == b"reply"
        assert transport.receive(daemon, MIB) == b"two" * 1000
        with pytest.raises(ConnectionLost):
            transport.receive(daemon, MIB)


def test_finishing_ends_a_receive_in_another_thread() -> None:
    with connected() as (_, daemon), in_thread(transport.receive, daemon, 10) as result:
        daemon.finish_receiving()
        with pytest.raises(ConnectionLost):
            result.result()


# Dial and listen.


def test_dialing_nobody_is_no_daemon(private_directories: Path) -> None:
    with listening() as listener:
        pass
    with pytest.raises(DaemonNotRunning):
        transport.dial(listener.address, time.monotonic() + PATIENCE)


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
def test_dialing_what_is_no_daemon_is_typed(address: str, kind: type[Exception], private_directories: Path) -> None:
    (private_directories / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(private_directories / "dead.sock"))
    with pytest.raises(kind):
        transport.dial(f"{private_directories}/{address}", time.monotonic() + PATIENCE)


def test_dialing_keeps_a_deadline_that_has_passed() -> None:
    with listening() as listener, pytest.raises(DaemonTimeout):
        transport.dial(listener.address, time.monotonic() - 1)


@needs_linux
def test_dialing_a_full_accept_queue_ends_at_the_deadline() -> None:
    with listening() as listener, contextlib.ExitStack() as stack:
        while True:
            raw = stack.enter_context(socket.socket(socket.AF_UNIX))
            raw.setblocking(False)
            if raw.connect_ex(listener.address) == errno.EAGAIN:
                break
        deadline = time.monotonic() + SHORT
        with pytest.raises(DaemonTimeout):
            transport.dial(listener.address, deadline)
        assert deadline <= time.monotonic() + 0.01
        # Room again: it serves again.
        listener.accept().close()
        transport.dial(listener.address, time.monotonic() + PATIENCE).close()


@needs_linux
def test_dialing_without_a_free_descriptor_is_typed() -> None:
    import resource

    with listening() as listener:
        free = os.dup(0)
        os.close(free)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(ResourceExhausted, match=os.strerror(errno.EMFILE)):
                transport.dial(listener.address, time.monotonic() + PATIENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("accepting", [1, 3])
def test_waking_ends_every_accept_and_closing_removes_the_address(accepting: int) -> None:
    def accept(listener: transport.Listener) -> None:
        with contextlib.suppress(OSError):
            listener.accept().close()

    with listening() as listener:
        with ThreadPoolExecutor(accepting) as executor:
            accepts = [executor.submit(accept, listener) for _ in range(accepting)]
            # One wake-up may end just one of them.
            for _ in accepts:
                listener.wake()
            for ended in accepts:
                ended.result(PATIENCE)
        listener.close()
        listener.close()
        with pytest.raises(DaemonNotRunning):
            transport.dial(listener.address, time.monotonic() + PATIENCE)
        if transport.FAMILY == "AF_UNIX":
            assert not os.path.exists(listener.address)


@needs_posix
def test_the_socket_is_private_under_any_umask() -> None:
    for mask in (0, 0o777):
        previous = os.umask(mask)
        try:
            with listening() as listener:
                assert stat.S_IMODE(os.stat(listener.address).st_mode) == 0o600
                transport.dial(listener.address, time.monotonic() + PATIENCE).close()
        finally:
            os.umask(previous)


@needs_posix
def test_an_address_that_cannot_be_bound_is_a_failed_start(private_directories: Path) -> None:
    with listening() as listener:
        for address in (listener.address, str(private_directories / "missing" / "a.sock"), "d" * 200):
            with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR"):
                transport.Listener(address)
        # The one that was there is not disturbed.
        transport.dial(listener.address, time.monotonic() + PATIENCE).close()


# Who is there.


@needs_linux
def test_the_kernel_says_who_is_at_the_other_end() -> None:
    with connected() as (client, daemon):
        for peer in (client.peer, daemon.peer):
            assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())


@needs_linux
@needs_root
@pytest.mark.parametrize("stranger", ["client", "daemon"])
def test_another_users_end_is_refused_even_where_modes_let_it_through(stranger: str, private_directories: Path) -> None:
    private_directories.chmod(0o777)
    address = str(private_directories / "open.sock")
    with contextlib.ExitStack() as stack:
        if stranger == "daemon":
            os.seteuid(12345)
        try:
            listener = transport.Listener(address)
        finally:
            os.seteuid(0)
        stack.callback(listener.close)
        os.chmod(address, 0o666)
        if stranger == "daemon":
            with pytest.raises(AuthenticationFailed, match="12345"):
                transport.dial(address, time.monotonic() + PATIENCE)
        else:
            raw = stack.enter_context(socket.socket(socket.AF_UNIX))
            os.seteuid(12345)
            try:
                raw.connect(address)
            finally:
                os.seteuid(0)
            with pytest.raises(AuthenticationFailed, match="12345"):
                listener.accept()
            # The next one is served.
            transport.dial(address, time.monotonic() + PATIENCE).close()
            listener.accept().close()


if sys.platform != "win32":
    from harness_ipc import _posix

    def test_the_credentials_of_darwin_are_read_where_its_headers_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
        class DarwinSocket:
            def getsockopt(self, level: int, option: int, size: int) -> bytes:
                # sys/un.h and sys/ucred.h: struct xucred is version, uid, a short number of groups, and sixteen groups.
                xucred = struct.pack("@IIh16I", 0, 501, 2, 20, 12, *[0] * 14)
                answer = {(0, 1): xucred, (0, 2): struct.pack("@i", 4242)}[level, option]
                assert size == len(answer)
                return answer

        monkeypatch.setattr(sys, "platform", "darwin")
        assert _posix._credentials(cast(socket.socket, DarwinSocket())) == (4242, 501)

    def test_a_socket_of_darwin_is_told_not_to_signal(monkeypatch: pytest.MonkeyPatch) -> None:
        told = []

        class DarwinSocket(socket.socket):
            def setsockopt(self, *arguments: Any) -> None:
                told.append(arguments)

        monkeypatch.setattr(sys, "platform", "darwin")
        left, right = socket.socketpair()
        with right, _posix.Connection(DarwinSocket(fileno=left.detach()), transport.PeerCredentials(None, None)):
            # sys/socket.h: SOL_SOCKET is 0xffff there, SO_NOSIGPIPE 0x1022.
            assert told == [(socket.SOL_SOCKET, 0x1022, 1)]
