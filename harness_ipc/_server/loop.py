"""Non-blocking sockets in event loops, on POSIX: no connection needs a thread."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from typing import TYPE_CHECKING

from .._transport.dial import MAX_READ, NO_SIGNAL
from .admission import PAUSE

if TYPE_CHECKING:
    import asyncio

    from .._transport import PeerCredentials
    from .server import DaemonServer
    from .session import Host, Session

# Seconds until the greeter accepts a client that the server's loop has not accepted.
_LOOP_TIMEOUT = 0.1
# Bytes of the first read.
_FIRST_READ = 4096


class LoopAcceptor:
    """Accepts in the server's loop, and in the greeter while that loop is blocked."""

    has_ended = True

    def __init__(self, server: DaemonServer) -> None:
        self._server = server
        self._listener = server.admission.listener
        self._descriptor = self._listener.fileno()
        # The number of accepted clients when the server's loop was found blocked, or -1.
        self._accepted_when_blocked = -1

    def start(self) -> None:
        """Start accepting."""
        self._resume()
        self._server.greeter.loop.call_soon_threadsafe(self._accept_while_loop_blocked)

    def close(self) -> None:
        """Stop accepting."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._server.loop.remove_reader(self._descriptor)
            self._server.greeter.loop.call_soon_threadsafe(self._server.greeter.loop.remove_reader, self._descriptor)
        self._listener.close()

    def join(self) -> None:
        """Do nothing: it has no thread."""

    def _resume(self) -> None:
        if not self._server.is_draining:
            self._server.loop.add_reader(self._descriptor, self._on_client)

    def _on_client(self) -> None:
        if not self._accept(self._server) and self._server.admission.is_paused():
            self._server.loop.remove_reader(self._descriptor)
            self._server.loop.call_later(PAUSE, self._resume)

    def _accept(self, host: Host) -> bool:
        """Accept a client in the loop of `host`. Return whether one was waiting."""
        if (accepted := self._server.admission.accept()) is None:
            return False
        client, full = accepted
        transport = LoopTransport(*client)
        transport.session = self._server.new_session(transport, full)
        transport.session.begin(host)
        # Most clients have already sent data: this saves an iteration of the loop.
        transport.on_readable()
        return True

    # In the greeter's thread.

    def _accept_while_loop_blocked(self) -> None:
        if not self._server.is_draining:
            with contextlib.suppress(OSError):  # it was closed meanwhile
                self._server.greeter.loop.add_reader(self._descriptor, self._on_waiting_client)

    def _on_waiting_client(self) -> None:
        admission = self._server.admission
        if self._accepted_when_blocked == admission.accepted and self._accept(self._server.greeter):
            self._accepted_when_blocked = admission.accepted
        else:
            # Leave the client to the server's loop unless that is blocked. Accepting may also be paused.
            self._server.greeter.loop.remove_reader(self._descriptor)
            self._server.greeter.loop.call_later(_LOOP_TIMEOUT, self._check_again, admission.accepted)

    def _check_again(self, accepted: int) -> None:
        admission = self._server.admission
        self._accept_while_loop_blocked()
        if admission.accepted == accepted and not admission.is_paused():
            self._accepted_when_blocked = accepted


class LoopTransport:
    """The socket of a `Session`. The loop watches it until it is closed, so EOF is noticed while a request is in flight."""

    __slots__ = ("_chunks", "_loop", "_read_size", "_reading_paused", "_socket", "peer", "session", "unsent")

    session: Session
    _loop: asyncio.AbstractEventLoop

    def __init__(self, sock: socket.socket, peer: PeerCredentials) -> None:
        self._socket = sock
        self.peer = peer
        self._read_size = _FIRST_READ
        # Chunks not yet written, and their size in bytes.
        self._chunks: deque[memoryview] = deque()
        self.unsent = 0
        self._reading_paused = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the socket in `loop`. Call it in the thread of `loop`."""
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self.on_readable)
        if self._chunks:
            loop.add_writer(self._socket.fileno(), self._on_writable)

    def detach(self) -> None:
        """Stop watching the socket."""
        self._loop.remove_reader(self._socket.fileno())
        if self._chunks:
            self._loop.remove_writer(self._socket.fileno())

    def on_readable(self) -> None:
        """Read available data."""
        try:
            data = self._socket.recv(self._read_size)
        except BlockingIOError:
            return
        except (OSError, MemoryError) as error:
            self.session.on_lost(error)
            return
        # A large buffer is allocated only after a full read.
        self._read_size = MAX_READ if len(data) == self._read_size else _FIRST_READ
        if data:
            self.session.on_data(data)
        else:
            self.session.on_lost()

    def write(self, chunks: list[bytes]) -> bool:
        """Write in order. Return whether the system has accepted all."""
        for chunk in chunks:
            taken = 0
            if not self._chunks:
                try:
                    taken = self._socket.send(chunk, NO_SIGNAL)
                except BlockingIOError:
                    pass
                except OSError as error:
                    # Later: the session may be in the middle of an operation.
                    self._loop.call_soon(self.session.on_lost, error)
                    return False
                if taken < len(chunk):
                    self._loop.add_writer(self._socket.fileno(), self._on_writable)
            if taken < len(chunk):
                self._chunks.append(memoryview(chunk)[taken:])
                self.unsent += len(chunk) - taken
        return not self._chunks

    def _on_writable(self) -> None:
        try:
            while self._chunks:
                chunk = self._chunks[0]
                taken = self._socket.send(chunk, NO_SIGNAL)
                self.unsent -= taken
                if taken < len(chunk):
                    self._chunks[0] = chunk[taken:]
                else:
                    self._chunks.popleft()
        except BlockingIOError:
            return
        except (OSError, MemoryError) as error:
            self.session.on_lost(error)
            return
        self._loop.remove_writer(self._socket.fileno())
        self.session.on_drained()

    def pause_reading(self) -> None:
        """Stop delivering data until `resume_reading`."""
        self._reading_paused = True
        self._loop.remove_reader(self._socket.fileno())

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._reading_paused:
            self._reading_paused = False
            self._loop.add_reader(self._socket.fileno(), self.on_readable)

    def abort(self) -> None:
        """Shut the connection down, from any thread; its loop notices and closes it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket at once. Idempotent."""
        if self._socket.fileno() >= 0:
            self.detach()
            self._chunks.clear()
            self._socket.close()

    def close_inherited(self) -> None:
        """Close a forked child's copy of the socket. The loop belongs to the parent."""
        self._socket.close()
