"""Sockets in event loops, on POSIX: they accept, read and write without blocking, and no connection costs a thread."""

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

# Seconds that a client waits for a loop that accepts nothing before the greeter accepts it.
_LOOP_PATIENCE = 0.1
# Bytes of a read that is not expected to be full.
_FIRST_READ = 4096


class LoopAcceptor:
    """Accepts in the server's loop. The greeter does while that is blocked."""

    has_ended = True

    def __init__(self, server: DaemonServer) -> None:
        self._server = server
        self._listener = server.admission.listener
        self._descriptor = self._listener.fileno()
        # How many had been accepted when the loop was found to be blocked.
        self._stalled_at = -1

    def start(self) -> None:
        """Begin."""
        self._resume()
        self._server.greeter.loop.call_soon_threadsafe(self._stand_by)

    def close(self) -> None:
        """Accept nobody any more."""
        with contextlib.suppress(RuntimeError):  # a loop that was closed before watches nothing
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
        """Accept a client for the loop of `host`. Return whether there was one."""
        if (accepted := self._server.admission.accept()) is None:
            return False
        client, full = accepted
        transport = LoopTransport(*client)
        transport.session = self._server.new_session(transport, full)
        transport.session.begin(host)
        # Most clients have sent something by now: one iteration of the loop less.
        transport.on_readable()
        return True

    # In the greeter's thread.

    def _stand_by(self) -> None:
        if not self._server.is_draining:
            with contextlib.suppress(OSError):  # it has been closed meanwhile
                self._server.greeter.loop.add_reader(self._descriptor, self._on_waiting_client)

    def _on_waiting_client(self) -> None:
        admission = self._server.admission
        if self._stalled_at == admission.accepted and self._accept(self._server.greeter):
            self._stalled_at = admission.accepted
        else:
            # The server's loop is faster if it is not blocked. It may also pause on purpose.
            self._server.greeter.loop.remove_reader(self._descriptor)
            self._server.greeter.loop.call_later(_LOOP_PATIENCE, self._look_again, admission.accepted)

    def _look_again(self, accepted: int) -> None:
        admission = self._server.admission
        self._stand_by()
        if admission.accepted == accepted and not admission.is_paused():
            self._stalled_at = accepted


class LoopTransport:
    """A `Session`'s socket, watched by a loop until it is closed: its end is noticed while a request is in flight."""

    __slots__ = ("_chunks", "_loop", "_read_size", "_reading_paused", "_socket", "peer", "session", "unsent")

    session: Session
    _loop: asyncio.AbstractEventLoop

    def __init__(self, sock: socket.socket, peer: PeerCredentials) -> None:
        self._socket = sock
        self.peer = peer
        self._read_size = _FIRST_READ
        # What the system has not taken yet, and how many bytes that is.
        self._chunks: deque[memoryview] = deque()
        self.unsent = 0
        self._reading_paused = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the socket in `loop`, in whose thread this is called."""
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self.on_readable)
        if self._chunks:
            loop.add_writer(self._socket.fileno(), self._on_writable)

    def detach(self) -> None:
        """Stop watching it."""
        self._loop.remove_reader(self._socket.fileno())
        if self._chunks:
            self._loop.remove_writer(self._socket.fileno())

    def on_readable(self) -> None:
        """Read what has arrived."""
        try:
            data = self._socket.recv(self._read_size)
        except BlockingIOError:
            return
        except (OSError, MemoryError) as error:
            self.session.on_lost(error)
            return
        # Memory for a long read is taken only after a full one.
        self._read_size = MAX_READ if len(data) == self._read_size else _FIRST_READ
        if data:
            self.session.on_data(data)
        else:
            self.session.on_lost()

    def write(self, chunks: list[bytes]) -> bool:
        """Write in order. Return whether the system has taken all."""
        for chunk in chunks:
            taken = 0
            if not self._chunks:
                try:
                    taken = self._socket.send(chunk, NO_SIGNAL)
                except BlockingIOError:
                    pass
                except OSError as error:
                    # Not at once: this may be in the middle of the session's own work.
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
        """Deliver no more data until `resume_reading`."""
        self._reading_paused = True
        self._loop.remove_reader(self._socket.fileno())

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._reading_paused:
            self._reading_paused = False
            self._loop.add_reader(self._socket.fileno(), self.on_readable)

    def abort(self) -> None:
        """End the connection, from any thread; the loop that has it sees that and closes it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket at once. Closing twice is no error."""
        if self._socket.fileno() >= 0:
            self.detach()
            self._chunks.clear()
            self._socket.close()

    def close_inherited(self) -> None:
        """Close a forked child's copy. The loop's is the parent's."""
        self._socket.close()
