"""One connection of the server: connects its protocol, its transport and the requests."""

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
        """An event loop that handles requests: the server, or its greeter."""

        loop: asyncio.AbstractEventLoop
        deadlines: Deadlines

        def start_request(self, session: Session, message: Message) -> asyncio.Task[None] | None:
            """Start a request to the app, or `health`."""

        def start_ping(self, session: Session) -> None:
            """Answer a ping."""

    class Transport(Protocol):
        """Sends and receives bytes: a socket in a loop, or a pump. Not thread-safe, except `abort`."""

        peer: PeerCredentials
        unsent: int

        def attach(self, loop: asyncio.AbstractEventLoop) -> None:
            """Deliver events in `loop`. Call it in the thread of `loop`."""

        def detach(self) -> None:
            """Deliver no events until `attach`."""

        def write(self, chunks: list[bytes]) -> bool:
            """Write in order. Return whether the system has accepted all; otherwise `Session.on_drained` is called later."""

        def pause_reading(self) -> None:
            """Stop delivering data until `resume_reading`."""

        def resume_reading(self) -> None:
            """Deliver data again."""

        def abort(self) -> None:
            """End the connection, from any thread, as if the client had disconnected."""

        def close(self) -> None:
            """Close at once. Idempotent."""

        def close_inherited(self) -> None:
            """Close a forked child's copy."""


# Unsent bytes at which a handler that sends items has to wait.
_MAX_UNSENT = 64 * 1024
# Seconds to receive the rest of a frame: the default timeout of a client's call.
FRAME_TIMEOUT = 60.0
# The number of items after which a handler yields to the loop: with a fast reader it would never wait.
_MAX_BURST = 16
_IN_FLIGHT = (ACTIVE, CANCELLING, REPLYING)


class Session:
    """A connection, from accept to close. `full` is the text of the limit because of which its client is rejected, or None.

    Only the thread of `host`'s loop may use it; `host` is None while it is handed over. `transport` is its connection, unless
    it is handed over or closed. `due` is its deadline: see `Deadlines`.
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
        # Set when everything is written, if a handler that sends items waits for that.
        self._drained: asyncio.Event | None = None
        self._items = 0

    def begin(self, host: Host) -> None:
        """Start the handshake, in the thread of `host`."""
        host.deadlines.set(self, self._server.handshake_timeout(self))
        self._adopt(host, None)

    def move(self, host: Host, message: Message) -> None:
        """Hand over to another host, once, at a message boundary: with `message`, and data that the protocol has read ahead."""
        self.transport = self.host = None
        self.connection.detach()
        try:
            host.loop.call_soon_threadsafe(self._adopt, host, message)
        except RuntimeError:  # its loop is closed
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

    # Called by the transport.

    def on_data(self, data: bytes) -> None:
        """Process received data."""
        try:
            self.protocol.receive_data(data)
            if self.protocol.state not in _IN_FLIGHT:
                self._advance()
            elif self.protocol.buffered >= MAX_READ_AHEAD and self.transport is not None:
                self.transport.pause_reading()
        except Exception as error:
            self.close(error)

    def on_drained(self) -> None:
        """Continue: the system has accepted all data."""
        try:
            if self._drained is not None:
                self._release_waiters()
            if self.protocol.state == LEAVING:
                self.close()
            elif self.protocol.state == REPLYING:
                self.protocol.reply_taken()
                self._after_reply()
        except Exception as error:
            self.close(error)

    def _release_waiters(self) -> None:
        assert self._drained is not None
        self._drained.set()
        self._drained = None

    def on_lost(self, error: Exception | None = None) -> None:
        """Close: the client has disconnected, or can't be read any more. Requests that have not started are dropped."""
        if isinstance(error, MessageTooLarge) and self.protocol.state == IDLE:
            self.protocol.fail(error)
        self.close(error)

    # Called by requests.

    async def send_item(self, frame: bytes) -> None:
        """Send a reply that is not the final one, and wait while 64 KiB or more are unsent. Every 16th lets other tasks run."""
        self._items += 1
        if self._items % _MAX_BURST == 0:
            # A handler that never waits would not notice that its client has disconnected.
            await asyncio.sleep(0)
        if self.protocol.state != ACTIVE or self.transport is None:
            return
        self.protocol.send_item(frame)
        if not self._flush() and self.transport.unsent > _MAX_UNSENT:
            self._drained = self._drained or asyncio.Event()
            await self._drained.wait()

    def send_reply(self, frame: bytes) -> None:
        """Send the final reply. It is dropped if the client has disconnected."""
        self._task = None
        if self.protocol.state not in (ACTIVE, CANCELLING):
            return
        try:
            self.protocol.send_reply(frame)
            if self._flush():
                self.on_drained()
        except Exception as error:
            self.close(error)

    # Called by the server.

    def leave(self) -> None:
        """End the connection with a goodbye, after the reply to the request in flight, if there is one."""
        if self.transport is not None and self.protocol.state not in (*_IN_FLIGHT, CLOSED):
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        try:
            self.protocol.leave()
            if self.protocol.state == CLOSED or self._flush():
                self.close()
        except Exception as error:  # the other clients must still get their goodbye
            self.close(error)

    def cancel(self) -> None:
        """Record that the request in flight is cancelled. It is still answered."""
        if self._task is not None and self.protocol.state == ACTIVE:
            self.protocol.cancel()

    def abandon(self) -> None:
        """Close; a request in flight is answered with an error."""
        if self.transport is not None and self.protocol.state in (ACTIVE, CANCELLING):
            self.send_reply(messages.encode(messages.stopping_reply()))
        self.close()

    def close(self, error: Exception | None = None) -> None:
        """Close the connection, cancel its request if a disconnect does that, and log the reason."""
        transport, self.transport = self.transport, None
        if transport is None:
            return
        try:
            # Before the client sees EOF.
            self._server.admission.log_end(self, error)
        finally:  # log handlers of the app may raise
            self._close_transport(transport, error)

    def _close_transport(self, transport: Transport, error: Exception | None) -> None:
        if error is not None:
            # The protocol may have queued the reason for the client.
            with contextlib.suppress(Exception):
                transport.write(self.protocol.data_to_send())
        self.protocol.close()
        self._server.remove(self, transport.close)
        # Break the reference cycle.
        del self.connection
        if self._drained is not None:
            self._release_waiters()
        if self._task is not None and self._server.options.cancel_on_disconnect:
            self._server.requests.cancel(self._task)

    # Processing of events.

    def _advance(self) -> None:
        event = self.protocol.next_event()
        if event is PROVED:
            self._server.admission.admit(self)
            if not self.full:
                self.due = inf
            event = self.protocol.next_event()
        if event is None:
            # Includes the verdict, unless it can be sent with the reply to a request that came with the proof.
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

    def _after_reply(self) -> None:
        if self._server.is_draining or self.full:
            self.leave()
        elif self.transport is not None and self.host is not None and self.protocol.buffered:
            self.transport.resume_reading()
            # Later: pipelined requests would recurse, and starve the other clients.
            self.host.loop.call_soon(self._advance_if_idle)

    def _advance_if_idle(self) -> None:
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
