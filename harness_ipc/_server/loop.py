"""The event loop's own sockets, on POSIX: it accepts, reads and writes without blocking, and no connection costs a thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

from .admission import PAUSE
from .greet import StandBy

if TYPE_CHECKING:
    from .._protocol.messages import Message
    from .._transport.listen import Connection
    from ..errors import ProtocolError
    from .server import DaemonServer
    from .session import Session


class LoopAcceptor:
    """Accepts in the loop. A stand-by thread does while the loop is blocked."""

    def __init__(self, server: DaemonServer) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._listener = server.admission.listener
        self._stand_by = StandBy(server, self._adopt)

    def start(self) -> None:
        """Begin. Raises `RuntimeError` if no thread can be started."""
        self._stand_by.start()
        self._resume()

    def _resume(self) -> None:
        if not self._server.is_draining:
            self._loop.add_reader(self._listener.fileno(), self._on_client)

    def _on_client(self) -> None:
        accepted = self._server.admission.accept()
        if accepted is not None:
            connection, full = accepted
            session = self._server.new_session(connection, full)
            self._server.deadlines.set(session, self._server.handshake_timeout(session))
            transport = LoopTransport(connection, session)
            session.adopt(transport)
            # Most clients have sent something by now: one iteration of the loop less.
            transport.on_readable()
        elif self._server.admission.is_paused():
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(PAUSE, self._resume)

    def _adopt(self, session: Session, connection: Connection, message: Message | ProtocolError) -> None:
        session.adopt(LoopTransport(connection, session), message)

    def close(self) -> None:
        """Accept nobody any more."""
        with contextlib.suppress(RuntimeError):  # a loop that was closed before watches nothing
            self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._stand_by.close()

    @property
    def has_ended(self) -> bool:
        """Whether its thread serves nobody any more."""
        return self._stand_by.has_ended

    def join(self) -> None:
        """Wait for its thread."""
        self._stand_by.join()


class LoopTransport:
    """A `Session`'s socket, watched by the loop until it is closed: its end is noticed while a request is in flight."""

    __slots__ = ("_chunks", "_connection", "_loop", "_reading_paused", "_session", "unsent")

    def __init__(self, connection: Connection, session: Session) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._session = session
        # What the system has not taken yet, and how many bytes that is.
        self._chunks: deque[memoryview] = deque()
        self.unsent = 0
        self._reading_paused = False
        self._loop.add_reader(connection.fileno(), self.on_readable)

    def on_readable(self) -> None:
        """Read what has arrived."""
        try:
            data = self._connection.read()
        except (OSError, MemoryError) as error:
            self._session.on_lost(error)
            return
        if data:
            self._session.on_data(data)
        elif data is not None:
            self._session.on_lost()

    def write(self, chunks: list[bytes]) -> bool:
        """Write in order. Return whether the system has taken all."""
        for chunk in chunks:
            taken = 0
            if not self._chunks:
                try:
                    taken = self._connection.write(chunk)
                except OSError as error:
                    # Not at once: this may be in the middle of the session's own work.
                    self._loop.call_soon(self._session.on_lost, error)
                    return False
                if taken < len(chunk):
                    self._loop.add_writer(self._connection.fileno(), self._on_writable)
            if taken < len(chunk):
                self._chunks.append(memoryview(chunk)[taken:])
                self.unsent += len(chunk) - taken
        return not self._chunks

    def _on_writable(self) -> None:
        try:
            while self._chunks:
                chunk = self._chunks[0]
                taken = self._connection.write(chunk)
                self.unsent -= taken
                if taken < len(chunk):
                    self._chunks[0] = chunk[taken:]
                    return
                self._chunks.popleft()
        except (OSError, MemoryError) as error:
            self._session.on_lost(error)
            return
        self._loop.remove_writer(self._connection.fileno())
        self._session.on_drained()

    def pause_reading(self) -> None:
        """Deliver no more data until `resume_reading`."""
        self._reading_paused = True
        self._loop.remove_reader(self._connection.fileno())

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._reading_paused:
            self._reading_paused = False
            self._loop.add_reader(self._connection.fileno(), self.on_readable)

    def close(self) -> None:
        """Close the socket at once. Closing twice is no error."""
        descriptor = self._connection.fileno()
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            if self._chunks:
                self._loop.remove_writer(descriptor)
                self._chunks.clear()
            self._connection.close()
