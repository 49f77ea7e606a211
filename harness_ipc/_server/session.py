"""One connection in the event loop: what its protocol decides meets what its transport does. It knows no socket and no pipe."""

from __future__ import annotations

import asyncio
import contextlib
import time
from math import inf
from typing import TYPE_CHECKING, Protocol

from .._protocol import messages
from .._protocol.session import ACTIVE, CANCELLING, CLOSED, IDLE, LEAVING, MAX_READ_AHEAD, PROVED, REPLYING
from ..errors import MessageTooLarge, ProtocolError
from .builtins import answer_builtin

if TYPE_CHECKING:
    from .._protocol.messages import Message
    from .._protocol.session import ServerProtocol
    from .._transport import PeerCredentials
    from .admission import Deadlines
    from .server import DaemonServer

    class Host(Protocol):
        """An event loop and what it does with requests: the server, or its greeter."""

        loop: asyncio.AbstractEventLoop
        deadlines: Deadlines

        def start_request(self, session: Session, message: Message) -> asyncio.Task[None] | None:
            """Start a request that is the app's, or `health`."""

        def start_ping(self, session: Session) -> None:
            """Answer a ping."""

    class Transport(Protocol):
        """What carries the bytes: a loop's socket, or a pump. Its methods belong to the loop's thread."""

        peer: PeerCredentials
        unsent: int

        def attach(self, loop: asyncio.AbstractEventLoop) -> None:
            """Belong to `loop`, in whose thread this is called."""

        def detach(self) -> None:
            """Belong to no loop, until `attach`."""

        def write(self, chunks: list[bytes]) -> bool:
            """Write in order. Return whether the system has taken all; otherwise `Session.on_drained` is called when it has."""

        def pause_reading(self) -> None:
            """Deliver no more data until `resume_reading`."""

        def resume_reading(self) -> None:
            """Deliver data again."""

        def abort(self) -> None:
            """End the connection, from any thread: it is closed then as if the client had gone."""

        def close(self) -> None:
            """Close at once. Closing twice is no error."""

        def close_inherited(self) -> None:
            """Close a forked child's copy."""


# Bytes that may be unsent before a handler that sends items waits.
_MAX_UNSENT = 64 * 1024
# Seconds for the rest of a frame that has begun: as long as a client waits for a call by default.
FRAME_TIMEOUT = 60.0
# Items that a handler may send before everybody else has a turn of the loop: their reader may be as fast as they are made.
_MAX_BURST = 16
_IN_FLIGHT = (ACTIVE, CANCELLING, REPLYING)


class Session:
    """A connection of the daemon's, from its acceptance to its end. `full` is the limit that keeps its client out, or None.

    `host` has it, and only the thread of `host`'s loop touches it; None while it is handed over. `transport` is its connection,
    unless it is handed over or closed. `due` is when it is closed if it does not go on: see `Deadlines`.
    """

    host: Host | None = None
    transport: Transport | None = None
    due = inf

    def __init__(self, server: DaemonServer, protocol: ServerProtocol, connection: Transport, full: str | None) -> None:
        self._server = server
        self.protocol = protocol
        self.connection = connection
        self.peer = connection.peer
        self.accepted_at = time.monotonic()
        self.full = full
        self._task: asyncio.Task[None] | None = None
        # Set when what is unsent has been taken, if handlers that send items wait for it.
        self._drained: asyncio.Event | None = None
        self._items = 0

    def begin(self, host: Host) -> None:
        """Begin with the handshake, in the thread of `host`."""
        host.deadlines.set(self, self._server.handshake_timeout(self))
        self._adopt(host, None)

    def move(self, host: Host, message: Message) -> None:
        """Hand over to another host, once, at a message boundary: with `message`, and with what the protocol has read ahead."""
        self.transport = self.host = None
        self.connection.detach()
        try:
            host.loop.call_soon_threadsafe(self._adopt, host, message)
        except RuntimeError:  # it has been closed
            self.transport = self.connection
            raise

    def _adopt(self, host: Host, message: Message | None) -> None:
        self.host, self.transport = host, self.connection
        try:
            self.transport.attach(host.loop)
            if self._server.is_draining:
                self._say_goodbye()
            elif message is not None:
                self._start(message)
        except Exception as error:
            self.close(error)

    # What the transport tells.

    def on_data(self, data: bytes) -> None:
        """Process what has arrived."""
        try:
            self.protocol.receive_data(data)
            if self.protocol.state not in _IN_FLIGHT:
                self._advance()
            elif self.protocol.buffered >= MAX_READ_AHEAD and self.transport is not None:
                self.transport.pause_reading()
        except Exception as error:
            self.close(error)

    def on_drained(self) -> None:
        """Go on: the system has taken all that was to be sent."""
        try:
            if self._drained is not None:
                self._release_waiters()
            if self.protocol.state == LEAVING:
                self.close()
            elif self.protocol.state == REPLYING:
                self.protocol.reply_taken()
                self._next()
        except Exception as error:
            self.close(error)

    def _release_waiters(self) -> None:
        assert self._drained is not None
        self._drained.set()
        self._drained = None

    def on_lost(self, error: Exception | None = None) -> None:
        """The client has gone, or can't be read any more. What it has sent and what does not run yet is dropped."""
        if isinstance(error, MessageTooLarge) and self.protocol.state == IDLE:
            self.protocol.fail(error)
        self.close(error)

    # What the requests say.

    async def send_item(self, frame: bytes) -> None:
        """Send a reply that is not the final one, and wait while 64 KiB are unsent. Every 16th lets other tasks run."""
        self._items += 1
        if self._items % _MAX_BURST == 0:
            # Nothing else may ever wait: a handler that waits for nothing would not see that its client has gone.
            await asyncio.sleep(0)
        if self.protocol.state != ACTIVE or self.transport is None:
            return
        self.protocol.send_item(frame)
        if not self._flush() and self.transport.unsent > _MAX_UNSENT:
            self._drained = self._drained or asyncio.Event()
            await self._drained.wait()

    def send_reply(self, frame: bytes) -> None:
        """Send the final reply. One that comes after the client has gone is dropped."""
        self._task = None
        if self.protocol.state not in (ACTIVE, CANCELLING):
            return
        try:
            self.protocol.send_reply(frame)
            if self._flush():
                self.on_drained()
        except Exception as error:
            self.close(error)

    # What the server decides.

    def leave(self) -> None:
        """End the connection without a request in flight by a goodbye; otherwise its reply comes first."""
        if self.transport is not None and self.protocol.state not in (*_IN_FLIGHT, CLOSED):
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        try:
            self.protocol.leave()
            if self.protocol.state == CLOSED or self._flush():
                self.close()
        except Exception as error:  # the others are still to be told
            self.close(error)

    def cancel(self) -> None:
        """Take note that the request in flight is cancelled. It is still answered."""
        if self._task is not None and self.protocol.state == ACTIVE:
            self.protocol.cancel()

    def abandon(self) -> None:
        """Close, whatever is in flight: with an error in place of a reply that has not come."""
        if self.transport is not None and self.protocol.state in (ACTIVE, CANCELLING):
            self.send_reply(messages.encode(messages.stopping_reply()))
        self.close()

    def close(self, error: Exception | None = None) -> None:
        """End the connection, cancel its request if its end does that, and have the server log why."""
        transport, self.transport = self.transport, None
        if transport is None:
            return
        try:
            # Before the client sees the end.
            self._server.admission.log_end(self, error)
        finally:  # whatever the app's log handlers do
            self._end(transport, error)

    def _end(self, transport: Transport, error: Exception | None) -> None:
        if error is not None:
            # Why, if the protocol says so, and the client still listens.
            with contextlib.suppress(Exception):
                transport.write(self.protocol.data_to_send())
        self.protocol.close()
        self._server.remove(self, transport.close)
        # They refer to each other: no garbage collection is needed.
        del self.connection
        if self._drained is not None:
            self._release_waiters()
        if self._task is not None and self._server.options.cancel_on_disconnect:
            self._server.requests.cancel(self._task)

    # From one request to the next.

    def _advance(self) -> None:
        event = self.protocol.next_event()
        if event is PROVED:
            self._server.admission.admit(self)
            if not self.full:
                self.due = inf
            event = self.protocol.next_event()
        if event is None:
            # Our verdict too, unless it can travel with the reply to a request that came with the proof.
            self._flush()
            if self.host is not None and self.protocol.buffered and self.protocol.state == IDLE:
                self.host.deadlines.set(self, FRAME_TIMEOUT)
        else:
            assert not isinstance(event, str)
            self._start(event)

    def _start(self, message: Message | ProtocolError) -> None:
        assert self.host is not None
        if not self.full:
            self.due = inf
        if isinstance(message, ProtocolError):
            self.send_reply(messages.encode(messages.not_executed(message)))
        elif not (self.full or "meta" in message) or not answer_builtin(self._server, self.host, self, message):
            task = self.host.start_request(self, message)
            if task is not None and not task.done():
                self._task = task

    def _next(self) -> None:
        if self._server.is_draining or self.full:
            self.leave()
        elif self.transport is not None and self.host is not None and self.protocol.buffered:
            self.transport.resume_reading()
            # Not at once: as many requests as came together would recurse, and keep the loop from the other clients.
            self.host.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        try:
            if self.protocol.state == IDLE:
                self._advance()
        except Exception as error:
            self.close(error)

    def _flush(self) -> bool:
        chunks = self.protocol.data_to_send()
        if self.transport is None:
            return True
        return self.transport.write(chunks) if chunks else not self.transport.unsent
