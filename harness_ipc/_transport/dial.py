"""A client's connection over AF_UNIX: the peer is checked by its uid, and every wait has a deadline.

It knows neither keys nor frames. An event loop drives the same connection by `connect_now`, `send_now` and `receive_now`.
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
from .base import PeerCredentials, lost, remaining

try:
    # `socket` imports `selectors` and makes enums of its constants: 2 ms of the 30 that a client's process takes.
    import _socket as socket
except ImportError:
    import socket  # type: ignore[no-redef]

# Bytes of a read. Below malloc's threshold for memory of its own (mallopt(3), 128 KiB), which the system would give and take
# back for each piece: 16 MiB took three times as long.
MAX_READ = 64 * 1024
# A program that restored SIGPIPE's default must not be killed by a daemon's end: a flag of each send, or on macOS an option of
# the socket (SO_NOSIGPIPE in its sys/socket.h, which Python does not name).
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_SO_NOSIGPIPE = 0x1022
_UNKNOWN = PeerCredentials(None, None)

if sys.platform != "win32":

    class Connection:
        """A connected socket for one caller. Other threads may only `abort` it.

        `deadline` is the monotonic time at which a blocked send or receive raises `DaemonTimeout`; infinity by default. `peer`
        is the process at the other end, by the kernel. `all_sent` tells of the last send whether the system has taken its last
        byte: before that, the peer can't have received all of it. A forked child closes its copy.
        """

        __slots__ = ("__weakref__", "_may_have_more", "_readable", "_socket", "_unsent", "all_sent", "deadline", "peer")

        def __init__(self, sock: socket.socket, peer: PeerCredentials = _UNKNOWN) -> None:
            self._socket = sock
            self.peer = peer
            self.deadline = inf
            self.all_sent = False
            self._unsent: list[bytes | memoryview] = []
            # The last read was a full one.
            self._may_have_more = False
            prepare(sock)
            self._readable = _poll(sock, select.POLLIN)
            close_in_child(self)

        def __del__(self) -> None:
            # A client that is kept until its process ends is no leak to be warned of.
            self._socket.close()

        def close(self) -> None:
            """End the connection: for the peer too, where a forked child has a copy of it. Closing twice is no error."""
            self.abort()
            self._socket.close()

        def close_inherited(self) -> None:
            """Close a forked child's copy."""
            self._socket.close()

        def abort(self) -> None:
            """Make a blocked send or receive end at once; from any thread."""
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

        def fileno(self) -> int:
            """Return the socket's descriptor, for an event loop."""
            return self._socket.fileno()

        def is_readable(self) -> bool:
            """Whether a receive would not block: something has arrived, or the peer has gone."""
            return bool(self._readable.poll(0))

        def send(self, chunks: list[bytes]) -> None:
            """Send `chunks`. Raises `ConnectionLost` or `DaemonTimeout`."""
            if self.send_now(chunks):
                return
            writable = _poll(self._socket, select.POLLOUT)
            while not self.send_now([]):
                self._wait(writable)

        def send_now(self, chunks: list[bytes]) -> bool:
            """Send what is left, and `chunks`, as far as that goes without waiting. Return whether all is sent.

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
                raise lost(error) from error
            self.all_sent = True
            return True

        def receive(self, limit: int) -> bytes:
            """Return what has arrived, once there is something. Raises `ConnectionLost` or `DaemonTimeout`."""
            while True:
                if not self._may_have_more:
                    self._wait(self._readable)
                if (data := self.receive_now(limit)) is not None:
                    return data

        def receive_now(self, limit: int) -> bytes | None:
            """Return what has arrived, or None. Raises `ConnectionLost`. It allocates no more if `limit` is larger."""
            try:
                data = self._socket.recv(MAX_READ)
            except BlockingIOError:
                self._may_have_more = False
                return None
            except OSError as error:
                raise lost(error) from error
            if not data:
                raise ConnectionLost("the peer closed the connection")
            self._may_have_more = len(data) == MAX_READ
            return data

        def _wait(self, poll: select.poll | _Select) -> None:
            # Rounded up: a poll that ends before the deadline would only be repeated.
            while not poll.poll(None if self.deadline == inf else ceil(remaining(self.deadline) * 1000)):
                pass

    def prepare(sock: socket.socket) -> None:
        """Let nothing on `sock` block, nor signal that its peer has gone."""
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
        """`select.poll` for one socket and one event where eventlet has removed that."""

        def __init__(self, sock: socket.socket, event: int) -> None:
            self._sets = ([sock], []) if event == select.POLLIN else ([], [sock])

        def poll(self, timeout: float | None) -> list[socket.socket]:
            """Wait for at most `timeout` milliseconds."""
            readable, writable, _ = select.select(*self._sets, [], None if timeout is None else timeout / 1000)
            return [*readable, *writable]

    def connect(address: str, deadline: float) -> Connection:
        """Connect to `address` before `deadline`, a monotonic time.

        Raises `DaemonNotRunning` if nobody listens there, `DaemonTimeout` if nobody accepts, `AuthenticationFailed` if it
        is another user's, and `ResourceExhausted` if this process has no free descriptor or memory.
        """
        remaining(deadline)
        connection = connect_now(address)
        # A signal may have ended the wait.
        while connection is None:
            connection = _connect(address, deadline)
        return connection

    def connect_now(address: str) -> Connection | None:
        """Connect as `connect` does, without waiting. Return None if the daemon has no room for a connection now."""
        try:
            return _connect(address, None)
        except DaemonTimeout:
            return None

    def _connect(address: str, deadline: float | None) -> Connection | None:
        """Connect before `deadline`, or without one at once. Return None if a signal has ended the wait."""
        sock = _new_socket()
        # At once: a child that is forked while it connects closes its copy.
        connection = Connection(sock)
        try:
            if deadline is not None:
                sock.setblocking(True)
                if deadline != inf:
                    # Only a blocking connect waits for room in the accept queue, and only this bounds it (unix(7), socket(7)).
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
                    f"no socket can be made: {error.strerror}; close files or connections that are not used, or raise the limit"
                ) from error
            raise ConnectionLost(f"no socket can be made: {error.strerror}") from error

    def _has_peer(sock: socket.socket) -> bool:
        """Whether a blocking connect is done: Python, which thinks of TCP, takes an interrupted one for one that goes on."""
        try:
            sock.getpeername()
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return False
            raise
        return True

    def _connect_error(error: OSError, address: str) -> HarnessIPCError:
        """Return the error for a connect, or a look at the peer, that failed with `error`."""
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
        """Return the process at the other end of `sock`. Raises `OSError`, and `AuthenticationFailed` for another user's."""
        peer = peer_credentials(sock)
        if peer.uid is not None and peer.uid != os.geteuid():
            raise AuthenticationFailed(f"the peer, pid {peer.pid}, belongs to uid {peer.uid}, not to {os.geteuid()}")
        return peer

    def peer_credentials(sock: socket.socket) -> PeerCredentials:
        """Return the process at the other end of `sock`, by the kernel. Raises `OSError`."""
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
