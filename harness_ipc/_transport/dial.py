"""A client's connection over AF_UNIX: checks the uid of the peer, and waits with deadlines.

An event loop uses the non-blocking `connect_now`, `send_now` and `receive_now`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
import sys
from math import ceil, inf

from .._descriptors import close_in_child
from ..errors import (
    EXHAUSTED,
    AuthenticationFailed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    ResourceExhausted,
)
from .base import PeerCredentials, connection_lost, remaining

try:
    # `socket` imports `selectors` and creates enums: 2 ms of the 30 that a client's process takes.
    import _socket as socket
except ImportError:
    import socket  # type: ignore[no-redef]

# Bytes of a read. Below the mmap threshold of malloc (mallopt(3), 128 KiB): with a mapping for each read, 16 MiB took three
# times as long.
MAX_READ = 64 * 1024
# The end of a daemon must not kill a program that has restored the default of SIGPIPE. macOS has a socket option instead
# (SO_NOSIGPIPE in sys/socket.h; Python has no constant).
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_SO_NOSIGPIPE = 0x1022
_UNKNOWN = PeerCredentials(None, None)

if sys.platform != "win32":

    class Connection:
        """A connected socket. Not thread-safe, except `abort`.

        `deadline` is the monotonic time at which a blocked send or receive raises `DaemonTimeout`; infinity by default. `peer`
        is the process at the other end, according to the kernel. `all_sent` is whether the system has accepted the last byte of
        the last send; if not, the peer can't have received all of it. A forked child closes its copy.
        """

        __slots__ = ("__weakref__", "_may_have_more", "_readable", "_socket", "_unsent", "all_sent", "deadline", "peer")

        def __init__(self, sock: socket.socket, peer: PeerCredentials = _UNKNOWN) -> None:
            self._socket = sock
            self.peer = peer
            self.deadline = inf
            self.all_sent = False
            self._unsent: list[bytes | memoryview] = []
            # Whether the last read filled its buffer.
            self._may_have_more = False
            prepare(sock)
            self._readable = _poll(sock, select.POLLIN)
            close_in_child(self)

        def __del__(self) -> None:
            # Without a ResourceWarning: a client may be kept until its process ends.
            self._socket.close()

        def close(self) -> None:
            """Shut the connection down, even if a forked child has a copy, and close it. Idempotent."""
            self.abort()
            self._socket.close()

        def close_inherited(self) -> None:
            """Close a forked child's copy of the socket."""
            self._socket.close()

        def abort(self) -> None:
            """Interrupt a blocked send or receive, from any thread."""
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

        def fileno(self) -> int:
            """Return the socket's descriptor, for an event loop."""
            return self._socket.fileno()

        def is_readable(self) -> bool:
            """Whether a receive would not block: there is data, or the peer has closed."""
            return bool(self._readable.poll(0))

        def send(self, chunks: list[bytes]) -> None:
            """Send `chunks`. Raises `ConnectionLost` or `DaemonTimeout`."""
            if self.send_now(chunks):
                return
            writable = _poll(self._socket, select.POLLOUT)
            while not self.send_now([]):
                self._wait(writable)

        def send_now(self, chunks: list[bytes]) -> bool:
            """Send unsent data and `chunks` as far as possible without waiting. Return whether all is sent.

            Raises `ConnectionLost`.
            """
            self.all_sent = False
            unsent = self._unsent
            unsent += chunks
            try:
                while unsent:
                    sent = self._socket.send(unsent[0], NO_SIGNAL)
                    if sent == len(unsent[0]):
                        del unsent[0]
                    else:
                        unsent[0] = memoryview(unsent[0])[sent:]
            except BlockingIOError:
                return False
            except OSError as error:
                raise connection_lost(error) from error
            self.all_sent = True
            return True

        def receive(self, limit: int) -> bytes:
            """Wait for data and return it. Raises `ConnectionLost` or `DaemonTimeout`."""
            while True:
                if not self._may_have_more:
                    self._wait(self._readable)
                if (data := self.receive_now(limit)) is not None:
                    return data

        def receive_now(self, limit: int) -> bytes | None:
            """Return available data, or None. Raises `ConnectionLost`. A read is at most `MAX_READ` bytes for any `limit`."""
            try:
                data = self._socket.recv(MAX_READ)
            except BlockingIOError:
                self._may_have_more = False
                return None
            except OSError as error:
                raise connection_lost(error) from error
            if not data:
                raise ConnectionLost("the peer closed the connection")
            self._may_have_more = len(data) == MAX_READ
            return data

        def _wait(self, poll: select.poll | _Select) -> None:
            # Rounded up: otherwise poll may return before the deadline, and would be repeated.
            while not poll.poll(None if self.deadline == inf else ceil(remaining(self.deadline) * 1000)):
                pass

    def prepare(sock: socket.socket) -> None:
        """Make `sock` non-blocking, and disable SIGPIPE for it."""
        sock.setblocking(False)
        if sys.platform == "darwin":
            sock.setsockopt(socket.SOL_SOCKET, _SO_NOSIGPIPE, 1)

    def _poll(sock: socket.socket, event: int) -> select.poll | _Select:
        if not hasattr(select, "poll"):
            return _Select(sock, event)
        poll = select.poll()
        poll.register(sock, event)
        return poll

    class _Select:
        """A replacement for `select.poll`, which eventlet removes, for one socket and one event."""

        def __init__(self, sock: socket.socket, event: int) -> None:
            self._sets = ([sock], []) if event == select.POLLIN else ([], [sock])

        def poll(self, timeout: float | None) -> list[socket.socket]:
            """Wait for at most `timeout` milliseconds."""
            readable, writable, _ = select.select(*self._sets, [], None if timeout is None else timeout / 1000)
            return [*readable, *writable]

    def connect(address: str, deadline: float) -> Connection:
        """Connect to `address` before `deadline`, a monotonic time.

        Raises `DaemonNotRunning` without a listener, `DaemonTimeout` if it does not accept, `AuthenticationFailed` if the peer
        is another user's, and `ResourceExhausted` if this process has no free descriptor or memory.
        """
        remaining(deadline)
        connection = connect_now(address)
        # Retry after a signal.
        while connection is None:
            connection = _connect(address, deadline)
        return connection

    def connect_now(address: str) -> Connection | None:
        """Connect without waiting. Return None if the daemon's accept queue is full. Raises what `connect` does."""
        try:
            return _connect(address, None)
        except DaemonTimeout:
            return None

    def _connect(address: str, deadline: float | None) -> Connection | None:
        """Connect before `deadline`, or with None without waiting. Return None after a signal, or if the queue is full."""
        sock = _new_socket()
        # Before connecting: a child forked meanwhile closes its copy.
        connection = Connection(sock)
        try:
            if deadline is not None:
                sock.setblocking(True)
                if deadline != inf:
                    # Only a blocking connect waits for room in the accept queue; SO_SNDTIMEO limits it (unix(7), socket(7)).
                    seconds = max(remaining(deadline), 0.001)
                    time = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, time)
            sock.connect(address)
            if deadline is not None:
                if not _has_peer(sock):
                    connection.close()
                    return None
                sock.setblocking(False)
            connection.peer = check_peer(sock)
            return connection
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError) and not isinstance(error, HarnessIPCError):
                raise _connect_error(error, address) from error
            raise

    def _new_socket() -> socket.socket:
        try:
            return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise ResourceExhausted(
                    f"can't create a socket: {error.strerror}; close unused files or connections, or raise the limit"
                ) from error
            raise ConnectionLost(f"can't create a socket: {error.strerror}") from error

    def _has_peer(sock: socket.socket) -> bool:
        """Whether a blocking connect has succeeded.

        After a signal, Python assumes that the connect continues in the background. That holds for TCP, but not for AF_UNIX.
        """
        try:
            sock.getpeername()
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return False
            raise
        return True

    def _connect_error(error: OSError, address: str) -> HarnessIPCError:
        """Return the error for a connect, or a check of the peer, that failed with `error`."""
        if isinstance(error, BlockingIOError):
            return DaemonTimeout("the daemon accepts no connections: it is stopped or overloaded")
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
            return DaemonNotRunning(f"nobody listens at {address}")
        if isinstance(error, PermissionError):
            return AuthenticationFailed(
                f"the socket {address} can't be connected: {error.strerror}; a sandbox or another user's directory is in the "
                "way"
            )
        kind = ResourceExhausted if error.errno in EXHAUSTED else ConnectionLost
        return kind(f"the socket {address} can't be connected: {error.strerror}")

    def check_peer(sock: socket.socket) -> PeerCredentials:
        """Return the credentials of the peer of `sock`. Raises `OSError`, and `AuthenticationFailed` for another user."""
        peer = peer_credentials(sock)
        if peer.uid is not None and peer.uid != os.geteuid():
            raise AuthenticationFailed(f"the peer, pid {peer.pid}, belongs to uid {peer.uid}, not to {os.geteuid()}")
        return peer

    def peer_credentials(sock: socket.socket) -> PeerCredentials:
        """Return the credentials of the peer of `sock`, according to the kernel. Raises `OSError`."""
        if sys.platform == "linux":
            # struct ucred, unix(7).
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return PeerCredentials(pid, uid & 0xFFFFFFFF)
        if sys.platform == "darwin":
            # sys/un.h: SOL_LOCAL 0, LOCAL_PEERCRED 1 (struct xucred: version, uid, ...), LOCAL_PEERPID 2.
            _, uid = struct.unpack_from("2I", sock.getsockopt(0, 1, 76))
            (pid,) = struct.unpack("i", sock.getsockopt(0, 2, 4))
            return PeerCredentials(pid, uid)
        return _UNKNOWN
