"""Hostile, misbehaving and killed peers: the daemon drops them, frees their resources, and still serves."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from harness_ipc import AuthenticationFailed, ConnectionLost, log_path, request
from harness_ipc._protocol.handshake import Keys, role_key
from harness_ipc._registry import records
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, spawn_daemon, wait_until
from tests.support.wire import FrameConnection, dial_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Handshake timeout in seconds: longer than any test, so no peer is dropped for being slow.
NEVER = 3600.0
HONEST = {"method": "echo", "params": {"n": 1}}
HONEST_FRAME = json.dumps(HONEST).encode()


def serves(name: str, timeout: float = 5.0) -> bool:
    return request(name, HONEST, timeout=timeout) == {"result": {"n": 1}}


@contextlib.contextmanager
def attacked_daemon(**options: Any) -> Iterator[DaemonProcess]:
    """Yield a daemon. Assert at the end that it serves, without a key or an unexpected exception in its log."""
    with spawn_daemon("victim", **options) as daemon:
        assert serves("victim")
        yield daemon
        assert serves("victim")
        log = log_path("victim").read_text(encoding="utf-8")
        assert "starting victim" in log
        assert records.load("victim").authkey.hex() not in log
        assert "Traceback" not in log


@pytest.fixture
def victim() -> Iterator[DaemonProcess]:
    with attacked_daemon(handshake_timeout=NEVER) as daemon:
        yield daemon


def held_by(daemon: DaemonProcess) -> int:
    """Return the number of the daemon's descriptors. On Windows, where threads have handles too, that of its connections."""
    if sys.platform == "win32":
        return int(request("victim", {"meta": "ping"}, timeout=PATIENCE)["connections"])
    return psutil.Process(daemon.pid).num_fds()


def raw_socket(data: bytes = b"") -> socket.socket:
    """Connect without the key, and send `data`."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(records.load("victim").address)
    sock.settimeout(PATIENCE)
    sock.sendall(data)
    return sock


def read_to_eof(sock: socket.socket) -> bytes:
    """Return all that the daemon sends until it disconnects."""
    data = b""
    with contextlib.suppress(ConnectionResetError):  # the daemon closed the connection with unread data
        while piece := sock.recv(4096):
            data += piece
    return data


@contextlib.contextmanager
def dialled() -> Iterator[FrameConnection]:
    with FrameConnection(records.load("victim").address) as connection:
        yield connection


def is_dropped(connection: FrameConnection) -> bool:
    """Return whether the daemon disconnects without sending anything."""
    with pytest.raises(ConnectionLost):
        connection.recv_bytes(1 << 20)
    return True


def frame(content: bytes) -> bytes:
    return struct.pack("!i", len(content)) + content


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "text": b"hello, is anybody there?\n" * 10,
    "2 GiB": struct.pack("!i", 2**31 - 1),
    "2 GiB, long": struct.pack("!iQ", -1, 2**31),
    "8 EiB, long": struct.pack("!iQ", -1, 2**63),
    "16 EiB, long": struct.pack("!iQ", -1, 2**64 - 1),
    "negative": struct.pack("!i", -2),
    "most negative": struct.pack("!i", -(2**31)),
    "257 bytes": struct.pack("!i", 257),
    "empty frame": frame(b""),
    "request": frame(HONEST_FRAME),
    "welcome": frame(b"#WELCOME#") * 3,
}


@needs_posix
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_an_invalid_challenge_is_dropped_at_once(victim: DaemonProcess, data: bytes) -> None:
    with raw_socket(data) as sock:
        assert b"#WELCOME#" not in read_to_eof(sock)


@needs_posix
@pytest.mark.parametrize("data", [b"", b"\0\0", struct.pack("!i", 40), frame(b"#CHALLENGE#" + bytes(29))[:30]])
def test_silent_peers_are_dropped_and_block_nobody(data: bytes) -> None:
    with attacked_daemon(handshake_timeout=0.5), raw_socket(data) as sock:
        assert serves("victim")
        assert read_to_eof(sock) == b""


class Bomb:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(victim: DaemonProcess, private_directories: Path) -> None:
    data = pickle.dumps(Bomb(private_directories / "boom"))
    assert len(data) <= 256  # the maximum size of a challenge: the daemon reads it
    with dialled() as connection:
        connection.send_bytes(data)
        assert is_dropped(connection)
    with dial_daemon("victim") as connection:
        connection.send_bytes(data)
        assert json.loads(connection.recv_bytes(1 << 20))["error"]["type"] == "ProtocolError"
    assert not (private_directories / "boom").exists()
    pickle.loads(data)
    assert (private_directories / "boom").exists()


class Recorder:
    """A connection for the standard library's functions that records frames, and replaces some."""

    def __init__(self, connection: FrameConnection, lie: Callable[[bytes], bytes] = bytes) -> None:
        self.connection = connection
        self.lie = lie
        self.received: list[bytes] = []

    def send_bytes(self, data: bytes) -> None:
        self.connection.send_bytes(self.lie(data))

    def recv_bytes(self, limit: int) -> bytes:
        self.received.append(self.connection.recv_bytes(limit))
        return self.received[-1]


def test_a_client_with_another_key_refuses_the_daemon(victim: DaemonProcess) -> None:
    with dialled() as connection, pytest.raises(AuthenticationFailed) as caught:
        connection.prove(Keys(bytes(32), records.load("victim").address))
    assert records.load("victim").authkey.hex() not in str(caught.value)


def test_the_right_key_at_another_address_is_refused(victim: DaemonProcess) -> None:
    with dialled() as connection, pytest.raises(AuthenticationFailed):
        connection.prove(Keys(records.load("victim").authkey, "another address"))


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "of a wrong key": bytes,
    "of zeros": lambda answer: b"\0" * len(answer),
    "empty": lambda answer: b"",
    "welcome instead": lambda answer: b"#WELCOME#",
    "request instead": lambda answer: HONEST_FRAME,
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_client_with_a_wrong_answer_is_refused(victim: DaemonProcess, answer: Callable[[bytes], bytes]) -> None:
    with dialled() as connection:
        # A valid challenge; the daemon's answer to it is not checked.
        connection.send_bytes(b"#CHALLENGE#{sha256}" + os.urandom(32))
        assert connection.recv_bytes(256)
        connection.send_bytes(b"#WELCOME#")
        recorder: Any = Recorder(connection, answer)
        with pytest.raises(AuthenticationError):
            answer_challenge(recorder, bytes(32))
        assert recorder.received[0].startswith(b"#CHALLENGE#")
        assert recorder.received[1:] == [b"#FAILURE#"]
        assert is_dropped(connection)


def test_the_daemons_own_answer_does_not_prove_a_client(victim: DaemonProcess) -> None:
    """A reflection attack: the daemon's challenge on one connection is sent to it on another."""
    with dialled() as one, dialled() as other:
        one.send_bytes(b"#CHALLENGE#{sha256}" + os.urandom(32))
        one.recv_bytes(256)
        one.send_bytes(b"#WELCOME#")
        challenge = one.recv_bytes(256)
        other.send_bytes(challenge)
        one.send_bytes(other.recv_bytes(256))
        assert one.recv_bytes(256) == b"#FAILURE#"
        assert is_dropped(one)


def test_a_client_that_refuses_the_daemons_proof_is_dropped(victim: DaemonProcess) -> None:
    record = records.load("victim")
    with dialled() as connection:
        recorder: Any = Recorder(connection)
        with pytest.raises(AuthenticationError):
            deliver_challenge(recorder, role_key(record.authkey, "client", record.address))
        # The daemon has sent its own challenge together with its answer.
        assert connection.recv_bytes(256).startswith(b"#CHALLENGE#")
        assert is_dropped(connection)


INVALID = {
    "no JSON": b"{nonsense",
    "no UTF-8": b'{"a": "\xff"}',
    "list": b"[1, 2]",
    "string": b'"shutdown"',
    "null": b"null",
    "empty": b"",
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "deep": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID)
def test_an_invalid_message_is_answered_with_an_error(victim: DaemonProcess, data: bytes) -> None:
    with dial_daemon("victim") as connection:
        for _ in range(2):
            connection.send_bytes(data)
            error = json.loads(connection.recv_bytes(1 << 20))["error"]
            assert error["type"] == "ProtocolError"
            assert len(error["message"]) < 500
            connection.send_bytes(HONEST_FRAME)
            assert json.loads(connection.recv_bytes(1 << 20)) == {"result": {"n": 1}}


@needs_posix
@pytest.mark.parametrize("size", [64 * 2**20 + 1, 2**31 - 1, 2**31, 2**63, 2**64 - 1])
def test_an_authenticated_oversized_frame_is_dropped(victim: DaemonProcess, size: int) -> None:
    with dial_daemon("victim") as connection:
        os.write(connection.fileno(), struct.pack("!i", size) if size < 2**31 else struct.pack("!iQ", -1, size))
        error = json.loads(connection.recv_bytes(1 << 20))["error"]
        assert (error["type"], error["executed"]) == ("MessageTooLarge", False)
        assert is_dropped(connection)
    log = log_path("victim").read_text(encoding="utf-8")
    assert f"a message of {size} bytes is above the limit of {64 * 2**20} bytes" in log


@needs_posix
def test_a_client_killed_at_any_byte_of_a_frame_leaves_nothing(victim: DaemonProcess) -> None:
    data = frame(HONEST_FRAME)
    assert len(data) > 40
    process = psutil.Process(victim.pid)
    before = process.num_fds()
    for length in range(41):
        with dial_daemon("victim") as connection:
            os.write(connection.fileno(), data[:length])
    assert serves("victim")
    wait_until(lambda: process.num_fds() <= before)


def test_a_client_that_dies_before_its_reply_leaves_nothing(victim: DaemonProcess) -> None:
    before = held_by(victim)
    for method, params in [("echo", {}), ("fill", {"size": 10_000_000}), ("sleep", {"seconds": 0.2})] * 3:
        with dial_daemon("victim") as connection:
            connection.send_bytes(json.dumps({"method": method, "params": params}).encode())
    assert serves("victim")
    wait_until(lambda: held_by(victim) <= before)


def bad_connection(number: int) -> Any:
    """Open a bad connection of a kind that depends on `number`, and return it."""
    match number % 6:
        case 0:
            return raw_socket()
        case 1:
            return raw_socket(b"\0\0")
        case 2:
            return raw_socket(list(GARBAGE.values())[number % len(GARBAGE)])
        case 3:
            return raw_socket(frame(b"#CHALLENGE#{sha256}" + bytes(32)) + frame(b"#WELCOME#") + frame(bytes(40)))
        case 4:
            connection = dial_daemon("victim")
            connection.send_bytes(list(INVALID.values())[number % len(INVALID)])
            return connection
        case _:
            connection = dial_daemon("victim")
            os.write(connection.fileno(), frame(HONEST_FRAME)[: number % 40])
            return connection


@contextlib.contextmanager
def many_open_files() -> Iterator[None]:
    """Allow this process and its children 1024 descriptors. The default is 256 on macOS."""
    if sys.platform == "win32":
        # The number of handles has no such limit.
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 1024), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@needs_posix
def test_two_hundred_hostile_clients_block_no_honest_one() -> None:
    with many_open_files(), attacked_daemon(handshake_timeout=NEVER) as daemon, ThreadPoolExecutor(4) as pool:
        process = psutil.Process(daemon.pid)
        before = process.num_fds()
        over = threading.Event()

        def be_honest() -> int:
            served = 0
            while not over.is_set() or not served:
                assert serves("victim")
                served += 1
            return served

        honest = [pool.submit(be_honest) for _ in range(4)]
        with contextlib.ExitStack() as stack:
            stack.callback(over.set)
            for number in range(200):
                stack.enter_context(bad_connection(number))
            # Silent peers, those with half a frame, and those with the key are still connected.
            assert process.num_fds() >= before + 100
            assert all(serves("victim") for _ in range(50))
        assert all(job.result(PATIENCE) for job in honest)
        wait_until(lambda: process.num_fds() <= before)


def test_silent_clients_above_the_bound_block_no_honest_one() -> None:
    with many_open_files(), attacked_daemon(handshake_timeout=NEVER) as daemon, contextlib.ExitStack() as stack:
        before = held_by(daemon)
        silent = [stack.enter_context(dialled()) for _ in range(300)]
        for _ in range(3):
            assert serves("victim", timeout=30.0)
        # The number is bounded: the oldest connection was dropped.
        assert held_by(daemon) < before + 300
        assert is_dropped(silent[0])
        assert not silent[-1].is_readable()
        stack.close()
        wait_until(lambda: held_by(daemon) <= before)
