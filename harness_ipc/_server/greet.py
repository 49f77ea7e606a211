"""Connections in a thread, until their first request is the loop's: the handshake, pings and the shutdown request.

On POSIX one thread stands by, and accepts while the loop does not. On Windows every connection begins here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import selectors
import socket
import threading
import time
from math import inf
from typing import TYPE_CHECKING

from .._descriptors import close_in_child
from .._protocol import messages
from .._protocol.session import IDLE, PROVED, REPLYING
from ..errors import DaemonTimeout, ProtocolError
from .requests import unreadable_reply
from .session import FRAME_TIMEOUT, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._protocol.messages import Message
    from .._transport.listen import Connection
    from .server import DaemonServer

logger = logging.getLogger(__name__)

# Seconds that a client waits for a loop that accepts nothing before the stand-by accepts it.
_LOOP_PATIENCE = 0.1
# Seconds that a ping waits for the loop. A loop that takes longer blocks everybody: it is unresponsive.
PROBE_PATIENCE = 0.25


class LoopProbe:
    """Whether the loop is responsive, asked from threads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        # When the loop was last seen to be responsive, if `beat` is called regularly.
        self._beat_at: float | None = None
        self._sent_at = 0.0
        self._lag = 0.0
        self._answered = threading.Event()
        self._answered.set()

    def beat(self) -> None:
        """Record, in the loop's thread, that the loop is responsive."""
        self._beat_at = time.monotonic()

    def renew(self) -> None:
        """Record the same now and then, if `beat` is called regularly."""
        if self._beat_at is not None:
            self._beat_at = time.monotonic()

    def send(self) -> None:
        """Ask the loop, unless it has not answered the last time yet."""
        with self._lock:
            if self._answered.is_set():
                self._answered.clear()
                self._sent_at = time.monotonic()
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._lag = time.monotonic() - self._sent_at
        self._answered.set()

    def last(self) -> tuple[float, bool]:
        """Return within how many seconds the loop answered, or for how many it has not, and whether it did."""
        if self._answered.is_set():
            return self._lag, True
        return time.monotonic() - (self._sent_at if self._beat_at is None else self._beat_at), False

    def wait(self) -> tuple[float, bool]:
        """Ask the loop, and return what `last` says as soon as it has answered or is unresponsive."""
        self.send()
        self._answered.wait(PROBE_PATIENCE)
        return self.last()


def greet(server: DaemonServer, session: Session) -> Message | ProtocolError | None:
    """Process what has arrived; return a ping or a request that is the loop's, or None: more has to arrive, or to be sent."""
    event = session.protocol.next_event()
    if event is PROVED:
        server.admission.admit(session)
        event = session.protocol.next_event()
    if event is None:
        return None
    assert not isinstance(event, str)
    if isinstance(event, ProtocolError):
        session.protocol.send_reply(unreadable_reply(event))
        return None
    if (reply := server.answer_builtin(session, event)) is None:
        return event
    session.protocol.send_reply(reply)
    return None


class StandBy(threading.Thread):
    """Accepts while the loop does not, and serves all its clients in one thread. `adopt` gives one to the loop, in the loop."""

    def __init__(self, server: DaemonServer, adopt: Callable[[Session, Connection, Message | ProtocolError], None]) -> None:
        super().__init__(name="harness-ipc-stand-by", daemon=True)
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._adopt = adopt
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        # Its clients; when their time is over; those that wait for the answer to a ping, and until when.
        self._clients: dict[Session, Connection] = {}
        self._deadlines: dict[Session, float] = {}
        self._pings: dict[Session, float] = {}
        # How many had been accepted when the loop was found to be blocked, and when to look at it again.
        self._stalled_at = -1
        self._look: tuple[float, int] | None = None
        self.has_ended = False
        close_in_child(self)

    def close(self) -> None:
        """Have the thread end; the server is draining."""
        if self.is_alive():
            with contextlib.suppress(OSError):  # it has seen the drain by itself, and closed its end
                self._wake.send(b"\0")
        else:
            self.close_inherited()
            self.has_ended = True

    def close_inherited(self) -> None:
        """Close the descriptors."""
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def run(self) -> None:
        """Serve until the server drains."""
        try:
            self._selector.register(self._woken, selectors.EVENT_READ)
            self._selector.register(self._server.admission.listener, selectors.EVENT_READ)
            while not self._server.is_draining:
                for key, _ in self._selector.select(self._timeout()):
                    if isinstance(key.data, Session):
                        self._on_readable(key.data)
                    elif key.fileobj is self._woken:
                        self._woken.recv(1)
                    else:
                        self._on_client()
                self._look_at_loop()
                self._answer_pings()
                self._expire()
        except Exception:
            # The listener may have been closed at any moment.
            if not self._server.is_draining:
                logger.exception("the thread that stands by failed")
        finally:
            for session in list(self._deadlines):
                self._say_goodbye(session)
            self.close_inherited()
            self.has_ended = True
            with contextlib.suppress(RuntimeError):  # a loop that was closed before waits for nothing
                self._loop.call_soon_threadsafe(self._server.check_closed)

    def _timeout(self) -> float | None:
        times = [*self._deadlines.values(), *self._pings.values(), *([self._look[0]] if self._look else [])]
        return None if not times or (first := min(times)) == inf else max(0.0, first - time.monotonic())

    def _on_client(self) -> None:
        admission = self._server.admission
        if self._stalled_at == admission.accepted and (accepted := admission.accept()) is not None:
            connection, full = accepted
            session = self._server.new_session(connection, full)
            self._deadlines[session] = time.monotonic() + self._server.handshake_timeout(session)
            self._clients[session] = connection
            self._selector.register(connection, selectors.EVENT_READ, session)
            self._stalled_at = admission.accepted
        else:
            # The loop is faster if it is not blocked. It may also pause on purpose.
            self._selector.unregister(admission.listener)
            self._look = time.monotonic() + _LOOP_PATIENCE, admission.accepted

    def _look_at_loop(self) -> None:
        if self._look is not None and time.monotonic() >= self._look[0]:
            accepted = self._look[1]
            self._look = None
            self._selector.register(self._server.admission.listener, selectors.EVENT_READ)
            if self._server.admission.accepted == accepted and not self._server.admission.is_paused():
                self._stalled_at = accepted

    def _on_readable(self, session: Session) -> None:
        try:
            data = self._clients[session].read()
            if not data:
                if data is not None:
                    self._end(session, None)
                return
            session.protocol.receive_data(data)
            self._go_on(session)
        except Exception as error:
            self._end(session, error)

    def _go_on(self, session: Session) -> None:
        """Process what has arrived, as far as that goes."""
        while True:
            request = greet(self._server, session)
            if request is not None:
                break
            if not self._send(session):
                return
            if session.protocol.state != REPLYING:
                self._renew_deadline(session)
                return
            session.protocol.reply_taken()
            if session.full:
                self._say_goodbye(session)
                return
        if isinstance(request, dict) and request.get("meta") == messages.PING:
            self._server.probe.send()
            self._pings[session] = time.monotonic() + PROBE_PATIENCE
            # More is read when it is answered.
            self._selector.unregister(self._clients[session])
        else:
            del self._deadlines[session]
            connection = self._clients.pop(session)
            self._selector.unregister(connection)
            self._loop.call_soon_threadsafe(self._adopt, session, connection, request)

    def _renew_deadline(self, session: Session) -> None:
        if session.protocol.state == IDLE and not session.full:
            self._deadlines[session] = time.monotonic() + FRAME_TIMEOUT if session.protocol.buffered else inf

    def _answer_pings(self) -> None:
        if not self._pings:
            return
        lag, responsive = self._server.probe.last()
        for session, until in list(self._pings.items()):
            if responsive or time.monotonic() >= until:
                del self._pings[session]
                self._selector.register(self._clients[session], selectors.EVENT_READ, session)
                try:
                    session.protocol.send_reply(messages.encode(self._server.pong(lag, responsive)))
                    if self._send(session):
                        session.protocol.reply_taken()
                        self._go_on(session)
                except Exception as error:
                    self._end(session, error)

    def _send(self, session: Session) -> bool:
        """Send what there is to send. What the system does not take at once ends the connection: these replies are short."""
        for chunk in session.protocol.data_to_send():
            if self._clients[session].write(chunk) < len(chunk):
                self._end(session, None)
                return False
        return True

    def _expire(self) -> None:
        now = time.monotonic()
        for session in [session for session, deadline in self._deadlines.items() if deadline <= now]:
            self._end(session, DaemonTimeout("it did not prove itself, or send the rest of a message, in time"))

    def _say_goodbye(self, session: Session) -> None:
        try:
            session.protocol.leave()
            if self._send(session):
                self._end(session, None)
        except Exception as error:
            self._end(session, error)

    def _end(self, session: Session, error: Exception | None) -> None:
        del self._deadlines[session]
        if self._pings.pop(session, None) is None:
            self._selector.unregister(self._clients[session])
        self._server.admission.log_end(session, error)
        if error is not None:
            # Why, if the protocol says so, and the client still listens.
            with contextlib.suppress(Exception):
                for chunk in session.protocol.data_to_send():
                    self._clients[session].write(chunk)
        session.protocol.close()
        self._server.remove(session, self._clients.pop(session).close)
