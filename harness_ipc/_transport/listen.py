"""The daemon's side of AF_UNIX: a listener that only this user can reach, and its connections.

Only `Listener.wait`, `Listener.accept_port` and `Port.wait` block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import time
from math import ceil, inf

from .._descriptors import close_in_child
from .._registry import files
from .._registry.namespace import private_temporary_dir
from ..errors import AuthenticationFailed, ConnectionLost, StartFailed

__all__ = ["FAMILY", "Accepted", "Listener", "Port", "lacking_descriptors", "new_address"]

# Bytes of sun_path without the final NUL: 108 in unix(7), 104 in sys/un.h of macOS.
MAX_ADDRESS = 103 if sys.platform == "darwin" else 107
# The accept queue (listen(2)): when it is full, further clients block or are refused.
_BACKLOG = 128

if sys.platform == "win32":
    from typing import Any

    from .windows_listen import FAMILY, Listener, Port, lacking_descriptors, new_address

    # An event loop can't watch a pipe.
    Accepted = Any

else:
    # Private to multiprocessing.connection: the Listener's socket. Its accept() returns a Connection that can't detach its
    # descriptor.
    from multiprocessing import connection as _stock

    from .base import PeerCredentials
    from .dial import MAX_READ, NO_SIGNAL, check_peer, prepare

    FAMILY = "AF_UNIX"
    # A non-blocking socket, and the credentials of its peer.
    Accepted = tuple[socket.socket, PeerCredentials]

    if "_socket" not in _stock.SocketListener.__init__.__code__.co_names:  # type: ignore[attr-defined]
        raise ImportError("multiprocessing.connection.Listener of this Python keeps its socket elsewhere")

    class Port:
        """A connection of a pump's thread, which can wait for a read, a write and a wake-up at once."""

        def __init__(self, sock: socket.socket, peer: PeerCredentials) -> None:
            self._socket = sock
            self.peer = peer
            self._writing: memoryview | None = None
            self._received: bytes | None = None
            self._wake, self._woken = socket.socketpair()
            self._wake.setblocking(False)
            self._woken.setblocking(False)

        @property
        def is_writing(self) -> bool:
            """Whether the last chunk is not yet written."""
            return self._writing is not None

        def begin_write(self, chunk: bytes) -> None:
            """Start writing a chunk. The previous one must be written."""
            self._writing = memoryview(chunk)
            self._write()

        def _write(self) -> None:
            with contextlib.suppress(BlockingIOError):
                if self._writing is not None:
                    self._writing = self._writing[self._socket.send(self._writing, NO_SIGNAL) :] or None

        def wait(self, deadline: float, *, reading: bool, limit: int) -> bytes | None:
            """Wait for data, if `reading`, for the chunk to be written, or for `wake`, until `deadline`.

            Return data, b"" at EOF, or None. `limit` applies to messages of a pipe. Raises `OSError`.
            """
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            if reading or self.is_writing:  # otherwise not: poll always reports EOF, and would spin
                events = (select.POLLIN if reading else 0) | (select.POLLOUT if self.is_writing else 0)
                poll.register(self._socket, events)
            left = None if deadline == inf else max(0, ceil((deadline - time.monotonic()) * 1000))
            ready = dict(poll.poll(left))
            if self._woken.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(MAX_READ)
            happened = ready.get(self._socket.fileno(), 0)
            if happened & ~select.POLLIN:
                self._write()
            with contextlib.suppress(BlockingIOError):
                return self._socket.recv(MAX_READ) if reading and happened & ~select.POLLOUT else None
            return None

        def wake(self) -> None:
            """End the current wait, or else the next one, from any thread."""
            with contextlib.suppress(OSError):  # full: already awake; closed: already ended
                self._wake.send(b"\0")

        def abort(self) -> None:
            """End the connection; the pump notices and closes it."""
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

        def close(self) -> None:
            """Close the connection. Idempotent."""
            self._socket.close()
            self._wake.close()
            self._woken.close()

    class Listener:
        """A listening socket that only this user can reach. Several threads may accept at once."""

        def __init__(self, address: str) -> None:
            """Bind `address`. Raises `StartFailed`."""
            try:
                self._listener = _stock.Listener(address, FAMILY, backlog=_BACKLOG)
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
            self._spare: int | None = None
            self._closed = False
            self._woken = False
            self.keep_spare()
            close_in_child(self)

        def accept(self) -> Accepted:
            """Accept without waiting. Raises `BlockingIOError` if there is no client, `OSError`, and `AuthenticationFailed`."""
            return _checked(self._socket.accept()[0])

        def accept_port(self) -> Port:
            """Wait for a connection. Raises `OSError`, also after `wake`, and `AuthenticationFailed` for another user."""
            while True:
                self.wait()
                try:
                    return Port(*self.accept())
                except BlockingIOError:  # another thread was faster
                    if self._woken:
                        raise

        def wait(self) -> None:
            """Wait for a connection, or for `wake`."""
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.poll()

        def keep_spare(self) -> None:
            """Open the spare descriptor for `accept_spare`, if it is not open and one is free."""
            if self._spare is None and not self._closed:
                with contextlib.suppress(OSError):
                    self._spare = os.open(os.devnull, os.O_RDONLY)

        def accept_spare(self) -> Accepted:
            """Accept with the spare descriptor when none is free. Call `keep_spare` afterwards. Raises what `accept` does."""
            self._close_spare()
            return self.accept()

        def _close_spare(self) -> None:
            spare, self._spare = self._spare, None
            if spare is not None:
                os.close(spare)

        def close_inherited(self) -> None:
            """Close a forked child's copies. The path stays: it belongs to the parent."""
            self._close_spare()
            self._socket.close()

        def fileno(self) -> int:
            """Return the socket's descriptor, for an event loop."""
            return self._socket.fileno()

        def wake(self) -> None:
            """Make all blocked accepts raise `OSError`; on macOS (ENOTCONN from shutdown) one per call."""
            self._woken = True
            # Shutdown first: connecting fails if the path was removed.
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                    sock.setblocking(False)
                    sock.connect(self.address)

        def close(self) -> None:
            """Close the socket and remove its path."""
            self._closed = True
            self._close_spare()
            with contextlib.suppress(OSError):
                self._listener.close()

    def lacking_descriptors() -> str | None:
        """Return the limit that keeps this process from opening one more file, or None if it can."""
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
        """Return the address of a new generation. If `directory` is too deep, create a short one for it.

        Raises `StartFailed` if the path exceeds the limit of the operating system there too.
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

    def _checked(sock: socket.socket) -> Accepted:
        try:
            prepare(sock)
            return sock, check_peer(sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError) and not isinstance(error, AuthenticationFailed):
                raise ConnectionLost(f"the peer went away at once: {error.strerror}") from error
            raise
