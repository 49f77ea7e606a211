"""From a worker thread to the event loop and back: one message at a time for each session. It accepts and closes nothing."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from . import messages
from .errors import ConnectionLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from .messages import Message
    from .transport import Connection, PeerCredentials

    Handler = Callable[[Message], Awaitable[Message]]

logger = logging.getLogger(__name__)

# Who sent the request that is being handled, for the handler: None outside of one.
current_peer: contextvars.ContextVar[PeerCredentials | None] = contextvars.ContextVar("current_peer", default=None)

# Seconds that a ping waits for the loop. A loop that takes longer blocks everybody: it is unresponsive.
_PROBE_PATIENCE = 0.25


class Session:
    """One connection, and the one request of it that is on its way through the loop."""

    __slots__ = ("accepted_at", "connection", "message", "replied", "unsent", "waiting")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.accepted_at = time.monotonic()
        self.message: Message = {}
        self.unsent: bytes | None = None
        self.waiting = False
        # A lock that the thread takes and the loop releases: a third of the cost of a concurrent future.
        self.replied = threading.Lock()
        self.replied.acquire()


class LoopBridge:
    """Runs the handler in the loop for threads that wait, measures the loop, and breaks off what does not end."""

    def __init__(self, handler: Handler, health: Callable[[], Awaitable[Message]] | None, max_message: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._handler = handler
        self._health = health
        self._max_message = max_message
        self._lock = threading.Lock()
        # One wake-up of the loop takes all that came meanwhile.
        self._inbox: list[Session] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken_off = False
        self.in_flight = 0
        self._last_used = time.monotonic()
        self._probe_sent = 0.0
        self._probe_lag = 0.0
        self._probe_answered = threading.Event()
        self._probe_answered.set()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request ended; 0 while one is in flight. Requests for the health don't count."""
        return 0.0 if self.in_flight else time.monotonic() - self._last_used

    def ask(self, session: Session, message: Message) -> bytes | None:
        """Have the loop answer `message` and wait for it, in the session's thread.

        Returns the reply if this thread has to send it, or None if the loop did, as far as that went without waiting: the
        rest is in the connection's `flush`. Raises `ConnectionLost` if the loop answers nothing any more.
        """
        counts = message.get("meta") != messages.HEALTH
        with self._lock:
            if self._broken_off or self._loop.is_closed():
                raise ConnectionLost("the daemon has stopped")
            wake = not self._inbox
            self._inbox.append(session)
            session.message = message
            session.waiting = True
            self.in_flight += counts
        try:
            if wake:
                self._loop.call_soon_threadsafe(self._take_inbox)
            session.replied.acquire()
        finally:
            if counts:
                with self._lock:
                    self.in_flight -= 1
                    self._last_used = time.monotonic()
        unsent, session.unsent = session.unsent, None
        return unsent

    def probe(self) -> tuple[bool, float]:
        """Return whether the loop reacts, and within how many seconds it did, or for how many it has not."""
        with self._lock:
            if self._probe_answered.is_set():
                self._probe_answered.clear()
                self._probe_sent = time.monotonic()
                self._loop.call_soon_threadsafe(self._answer_probe)
        responsive = self._probe_answered.wait(_PROBE_PATIENCE)
        return responsive, self._probe_lag if responsive else time.monotonic() - self._probe_sent

    def encode(self, reply: Message) -> bytes:
        """Return the frame of `reply`, or of the error that it can't be one."""
        try:
            return messages.encode(reply, self._max_message)
        except Exception as error:  # of the reply's own methods too, where it is no plain dict
            sorry = messages.error_reply(error)
            logger.error("the reply can't be sent: %s", sorry["error"]["message"])
            # Without a limit: the error is short, and there has to be a reply.
            return messages.encode(sorry)

    def cancel(self) -> None:
        """Cancel the handlers that are running, from any thread."""
        self._loop.call_soon_threadsafe(self._cancel_tasks)

    def break_off(self, sessions: Iterable[Session]) -> None:
        """Answer what is still asked by `sessions` with an error, and nothing from now on."""
        with self._lock:
            self._broken_off = True
        for session in sessions:
            self._give_reply(session, messages.error_reply(asyncio.CancelledError("the daemon has stopped")))

    # In the loop's thread.

    def _take_inbox(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for session in inbox:
            context = self._context.copy()
            context.run(current_peer.set, session.connection.peer)
            task = self._loop.create_task(self._handle(session), context=context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(self, session: Session) -> None:
        message, session.message = session.message, {}
        # What is left if neither of the two below comes to replace it.
        reply = messages.error_reply(asyncio.CancelledError("the request was cancelled"))
        try:
            reply = await self._answer(message)
        except Exception as error:
            logger.exception("the handler failed")
            reply = messages.error_reply(error)
        finally:
            self._give_reply(session, reply)

    async def _answer(self, message: Message) -> Message:
        if message.get("meta") == messages.HEALTH:
            return {"health": await self._health() if self._health is not None else None}
        reply: Any = await self._handler(message)
        if not isinstance(reply, dict):
            raise TypeError(f"the handler returned {type(reply).__name__}, a reply is a dict")
        return reply

    def _give_reply(self, session: Session, reply: Message) -> None:
        with self._lock:
            if not session.waiting:
                return
            session.waiting = False
        # Sent from here if that does not wait: the client has it one wake-up earlier.
        frame = self.encode(reply)
        session.unsent = None if session.connection.try_send(frame) else frame
        session.replied.release()

    def _answer_probe(self) -> None:
        self._probe_lag = time.monotonic() - self._probe_sent
        self._probe_answered.set()

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
