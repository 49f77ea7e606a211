"""AF_UNIX: sockets in a private directory, peers checked by uid, every read and write under one deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
from math import ceil, inf

from ._base import EXHAUSTED, PeerCredentials, check_size, remaining
from ._descriptors import close_in_child
from ._registry import files
from ._registry.namespace import private_temporary_dir
from .errors import (
    AuthenticationFailed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    ResourceExhausted,
    StartFailed,
)

FAMILY = "AF_UNIX"
# sun_path less its final NUL: unix(7) has 108 bytes, macOS' sys/un.h 104.
MAX_ADDRESS = 103 if sys.platform == "darwin" else 107
# listen(2): more clients than this that connect within one scheduling delay would block or be refused.
_BACKLOG = 128
# One read takes a short frame with its header, and the next one that came with it; a long one is read in pieces, so that a
# peer's mere announcement allocates nothing. Below malloc's threshold for memory of its own (mallopt(3), 128 KiB), which the
# system would give and take back for each piece: 16 MiB took three times as long.
_LEAST_READ = 4096
_MOST_READ = 64 * 1024
# A frame up to this length fits a socket's buffer on every system, if the peer has read the last one.
_MOST_AT_ONCE = 64 * 1024
# The framing of multiprocessing.connection: a length, or -1 and a long one.
_HEADER = struct.Struct("!i")
_LONG_HEADER = struct.Struct("!Q")
_MOST_SHORT = 2**31 - 1
# A program that restored SIGPIPE's default must not be killed by a daemon's end: a flag of each send, or on macOS an option of
# the socket (SO_NOSIGPIPE in its sys/socket.h, which Python does not name).
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_SO_NOSIGPIPE = 0x1022

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

if sys.platform != "win32":

    def _header(size: int) -> bytes:
        return _HEADER.pack(size) if size <= _MOST_SHORT else _HEADER.pack(-1) + _LONG_HEADER.pack(size)

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

    class Connection:
        """A socket with the frames of `multiprocessing.connection.Connection`, and a deadline.

        It is not one of those: to import them takes a client a third of its time. `deadline` is the monotonic time at which a
        blocked send or receive raises `DaemonTimeout`; infinity by default. `peer` is the process at the other end, by the
        kernel. One thread may send while another receives, never two of a kind.
        """

        def __init__(self, sock: socket.socket, peer: PeerCredentials) -> None:
            self._socket = sock
            sock.setblocking(False)
            if sys.platform == "darwin":
                sock.setsockopt(socket.SOL_SOCKET, _SO_NOSIGPIPE, 1)
            self.peer = peer
            self.deadline = inf
            self._buffered = b""
            self._held = b""
            self._receivable = _poll(sock, select.POLLIN)
            close_in_child(self)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def __del__(self) -> None:
            # As multiprocessing's connections: a client that is kept until its process ends is no leak to be warned of.
            self._socket.close()

        def close(self) -> None:
            """Close the socket. Closing twice is no error."""
            self._socket.close()

        close_inherited = close

        def fileno(self) -> int:
            """Return the socket's descriptor."""
            return self._socket.fileno()

        def readable_now(self) -> bool:
            """Whether a receive would not block: there is a frame, or the peer has gone."""
            return bool(self._buffered or self._receivable.poll(0))

        # An event loop can tell when there is something to receive.
        LOOP_CAN_WATCH = True
        # The system has not taken the last byte of a frame whose send failed: the peer can't have received it.
        FAILED_SEND_MAY_ARRIVE = False

        @property
        def has_unsent(self) -> bool:
            """Whether something is left to flush."""
            return bool(self._held)

        @property
        def has_unread(self) -> bool:
            """Whether something was read and not yet received: a frame, or a part of one."""
            return bool(self._buffered)

        def receive_now(self, limit: int) -> bytes | None:
            """Return the next frame without waiting, or None: `recv_bytes` then waits for it, or says what is wrong with it.

            Raises `EOFError` at the end of the stream, and `OSError`.
            """
            frame = self._next(limit) if self._buffered else None
            if frame is not None:
                return frame
            try:
                piece = self._socket.recv(_MOST_AT_ONCE)
            except BlockingIOError:
                return None
            if not piece and not self._buffered:
                raise EOFError("the peer closed the connection")
            self._buffered += piece
            return self._next(limit)

        def read_ahead(self, limit: int) -> bool | None:
            """Read what has come, for later receives. Return False if the peer has gone, None if `limit` bytes are unread."""
            if len(self._buffered) >= limit:
                return None
            try:
                piece = self._socket.recv(limit)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self._buffered += piece
            return bool(piece)

        def _next(self, limit: int) -> bytes | None:
            data = self._buffered
            if len(data) < _HEADER.size:
                return None
            (size,) = _HEADER.unpack_from(data)
            end = _HEADER.size + size
            if not 0 <= size <= limit or end > len(data):
                return None
            self._buffered = data[end:]
            return data[_HEADER.size : end]

        def hold(self, frame: bytes) -> None:
            """Send a short frame together with the next one, or before the next receive that has to wait."""
            self._held += _header(len(frame)) + frame

        def try_send(self, frame: bytes) -> bool:
            """Send a frame as far as that goes without waiting; `flush` sends the rest. False: too long, nothing was done."""
            if len(frame) > _MOST_AT_ONCE:
                return False
            self.hold(frame)
            self.try_flush()
            return True

        def try_flush(self) -> None:
            """Send what is held as far as that goes without waiting."""
            # What is wrong with the connection shows in the flush, or the next receive.
            try:
                self._held = self._held[self._socket.send(self._held, _NO_SIGNAL) :]
            except OSError:
                return

        def flush(self) -> None:
            """Send what is held."""
            while self._held:
                self._held = self._held[self._write(self._held) :]

        def finish_receiving(self) -> None:
            """Let receives return what has already arrived and then report the end; from any thread."""
            self._shutdown(socket.SHUT_RD)

        def abort(self) -> None:
            """Make every blocked send and receive end at once; from any thread."""
            self._shutdown(socket.SHUT_RDWR)

        def _shutdown(self, how: int) -> None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(how)

        def send_bytes(self, frame: bytes) -> None:
            """Send a frame, after what is held."""
            if len(frame) <= _MOST_AT_ONCE:
                self.hold(frame)
                self.flush()
                return
            self._held += _header(len(frame))
            self.flush()
            # Not appended to what is held: that would copy it.
            with memoryview(frame) as rest:
                sent = 0
                while sent < len(frame):
                    sent += self._write(rest[sent:])

        def recv_bytes(self, maxlength: int | None = None) -> bytes:
            """Return the next frame, with as few reads as possible. Raises `EOFError` at the end of the stream."""
            if not self._buffered:
                self._buffered = self._read(_LEAST_READ)
            frame = self._next(sys.maxsize if maxlength is None else maxlength)
            if frame is not None:
                return frame
            (size,) = _HEADER.unpack(self._take(_HEADER.size, starting=True))
            if size == -1:
                (size,) = _LONG_HEADER.unpack(self._take(_LONG_HEADER.size))
            check_size(size, maxlength)
            if size < 0:
                raise OSError("a frame's header makes no sense")
            return self._take(size)

        def _take(self, size: int, *, starting: bool = False) -> bytes:
            data = self._buffered
            if len(data) < size:
                pieces = [data]
                missing = size - len(data)
                while missing > 0:
                    piece = self._read(_LEAST_READ if size <= _LEAST_READ else min(missing, _MOST_READ))
                    if not piece:
                        if starting and missing == size:
                            raise EOFError
                        raise OSError("the peer closed it in the middle of a message")
                    pieces.append(piece)
                    missing -= len(piece)
                data = b"".join(pieces)
            self._buffered = data[size:]
            return data[:size]

        def _read(self, size: int) -> bytes:
            if self._held and not self.readable_now():
                self.flush()
            # The next piece of a long frame is most likely there.
            if size <= _LEAST_READ:
                self._wait(self._receivable)
            while True:
                try:
                    return self._socket.recv(size)
                except BlockingIOError:
                    self._wait(self._receivable)

        def _write(self, buf: bytes | memoryview) -> int:
            while True:
                try:
                    return self._socket.send(buf, _NO_SIGNAL)
                except BlockingIOError:
                    self._wait(_poll(self._socket, select.POLLOUT))

        def _wait(self, poll: select.poll | _Select) -> None:
            # Rounded up: a poll that ends before the deadline would only be repeated.
            while not poll.poll(None if self.deadline == inf else ceil(remaining(self.deadline) * 1000)):
                pass

    class Listener:
        """A bound and listening socket that only this user can reach; several threads may accept at once."""

        def __init__(self, address: str) -> None:
            """Bind `address`. Raises `StartFailed`."""
            from ._stock import connection

            try:
                self._listener = connection.Listener(address, FAMILY, backlog=_BACKLOG)
                self._socket: socket.socket = self._listener._listener._socket  # type: ignore[attr-defined]
                self._socket.setblocking(False)
                os.chmod(address, 0o600)
            except OSError as error:
                why = "a sandbox may forbid it; " if error.errno in (errno.EPERM, errno.EACCES) else ""
                raise StartFailed(
                    f"the socket {address} can't be bound: {error.strerror}; {why}"
                    "set HARNESS_IPC_RUNTIME_DIR to a directory where sockets are allowed"
                ) from error
            self.address = address
            self._woken = False
            self._spare: int | None = None
            self.keep_spare()
            close_in_child(self)

        def accept(self) -> Connection:
            """Return the next connection. Raises `OSError`, and `AuthenticationFailed` for another user's."""
            while True:
                self.wait()
                try:
                    return self.accept_now()
                except BlockingIOError:
                    if self._woken:
                        raise

        def wait(self) -> None:
            """Wait for a connection, or to be woken. Somebody else may be the one to accept it."""
            _poll(self._socket, select.POLLIN).poll(None)

        def accept_now(self) -> Connection:
            """Accept as `accept` does without waiting. Raises `BlockingIOError`, an `OSError`, if there is none."""
            # Not the Listener's own accept(): its Connection can't give the descriptor away.
            return _checked(self._socket.accept()[0])

        def keep_spare(self) -> None:
            """Open the descriptor that `accept_spare` uses up, unless it is open, or none is free."""
            if self._spare is None:
                with contextlib.suppress(OSError):
                    self._spare = os.open(os.devnull, os.O_RDONLY)

        def accept_spare(self) -> Connection:
            """Accept as `accept_now` does when no descriptor is free, with the spare one. Call `keep_spare` afterwards."""
            self._close_spare()
            return self.accept_now()

        def _close_spare(self) -> None:
            spare, self._spare = self._spare, None
            if spare is not None:
                os.close(spare)

        def close_inherited(self) -> None:
            """Close a forked child's copies. The path stays: it is the parent's."""
            self._close_spare()
            self._socket.close()

        def fileno(self) -> int:
            """Return the socket's descriptor, for an event loop."""
            return self._socket.fileno()

        def wake(self) -> None:
            """Make one blocked accept, or all of them, return or raise `OSError`."""
            # Linux wakes all. Where a listening socket can't be shut down (ENOTCONN on macOS), a client wakes one. The
            # first comes first because the path may have been removed by hand.
            self._woken = True
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                    sock.setblocking(False)
                    sock.connect(self.address)

        def close(self) -> None:
            """Close the socket and remove its path. No accept may be blocked: see `wake`."""
            self._close_spare()
            with contextlib.suppress(OSError):
                self._listener.close()

    def lacking_descriptors() -> str | None:
        """Return which limit keeps this process from opening one more file, or None if it can."""
        import resource

        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno == errno.EMFILE:
                return f"no free file descriptor: limit {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n)"
            if error.errno == errno.ENFILE:
                return "no free file descriptor: the limit of the whole system is reached"
        return None

    def new_address(directory: str, generation: str) -> str:
        """Return the address of a new generation, and make the directory for it if `directory` is too deep.

        Raises `StartFailed` if the path is above the limit of the operating system in every directory.
        """
        name = f"{generation[:16]}.sock"
        address = os.path.join(directory, name)
        if len(os.fsencode(address)) <= MAX_ADDRESS:
            return address
        short = private_temporary_dir()
        if len(os.fsencode(os.path.join(short, name))) <= MAX_ADDRESS:
            files.create_private_dir(short)
            return os.path.join(short, name)
        raise StartFailed(
            f"the socket path {address} has {len(os.fsencode(address))} bytes, the operating system allows {MAX_ADDRESS}, "
            f"and {short} is too long as well: set HARNESS_IPC_RUNTIME_DIR to a directory with a shorter path"
        )

    def dial(address: str, deadline: float) -> Connection:
        """Connect to `address` before `deadline`, a monotonic time.

        Raises `DaemonNotRunning` if nobody listens there, `DaemonTimeout` if nobody accepts, `AuthenticationFailed` if it
        is another user's, and `ResourceExhausted` if this process has no free descriptor or memory.
        """
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise ResourceExhausted(
                    f"no socket can be made: {error.strerror}; close files or connections that are not used, or raise the limit"
                ) from error
            raise ConnectionLost(f"no socket can be made: {error.strerror}") from error
        try:
            _connect(sock, address, deadline)
        except BaseException:
            sock.close()
            raise
        return _checked(sock)

    def _connect(sock: socket.socket, address: str, deadline: float) -> None:
        try:
            while not _is_connected(sock, address, deadline):
                pass
        except DaemonTimeout:
            raise
        except BlockingIOError as error:
            raise DaemonTimeout("the daemon accepts no connections: it is stopped or overloaded") from error
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise DaemonNotRunning("the daemon ended without removing its record: start it again") from error
        except PermissionError as error:
            raise AuthenticationFailed(f"the socket {address} can't be connected: {error.strerror}; a sandbox or another "
                                       "user's directory is in the way") from error  # fmt: skip
        except OSError as error:
            kind = ResourceExhausted if error.errno in EXHAUSTED else ConnectionLost
            raise kind(f"the socket {address} can't be connected: {error.strerror}") from error

    def _is_connected(sock: socket.socket, address: str, deadline: float) -> bool:
        """Connect, and return whether it has been done: a signal may have ended the wait."""
        if deadline != inf:
            # Only a blocking connect waits for room in the accept queue, and only this bounds it (unix(7), socket(7)).
            seconds = max(remaining(deadline), 0.001)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
        sock.connect(address)
        try:
            sock.getpeername()
        except OSError as error:
            # Python, which thinks of TCP, takes the socket for one that goes on connecting.
            if error.errno == errno.ENOTCONN:
                return False
            raise
        return True

    def _checked(sock: socket.socket) -> Connection:
        try:
            peer = _credentials(sock)
            if peer.uid is not None and peer.uid != os.geteuid():
                raise AuthenticationFailed(f"the peer, pid {peer.pid}, belongs to uid {peer.uid}, not to {os.geteuid()}")
            return Connection(sock, peer)
        except OSError as error:
            sock.close()
            if isinstance(error, AuthenticationFailed):
                raise
            raise ConnectionLost(f"the peer went away at once: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise

    def _credentials(sock: socket.socket) -> PeerCredentials:
        if sys.platform == "linux":
            # struct ucred, unix(7).
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return PeerCredentials(pid, uid & 0xFFFFFFFF)
        if sys.platform == "darwin":
            # sys/un.h: SOL_LOCAL 0, LOCAL_PEERCRED 1 (struct xucred: version, uid, ...), LOCAL_PEERPID 2.
            _, uid = struct.unpack_from("2I", sock.getsockopt(0, 1, 76))
            (pid,) = struct.unpack("i", sock.getsockopt(0, 2, 4))
            return PeerCredentials(pid, uid)
        return PeerCredentials(None, None)
