"""From a connection to the event loop and back: one message at a time for each session. It accepts and closes nothing.

A session belongs to a worker thread, which receives a message, has the loop answer it and waits. Where the loop can watch the
connection, the thread may leave a session to it: the loop then answers short messages without the thread, and wakes it for
all else: what is long, what comes in pieces, what is the channel's own, and the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from . import messages
from .errors import ConnectionLost, ProtocolError

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

    __slots__ = (
        "accepted_at",
        "connection",
        "counts",
        "left_to_loop",
        "message",
        "parked",
        "received",
        "unsent",
        "waiting",
        "wake",
    )

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.accepted_at = time.monotonic()
        self.message: Message = {}
        # What the loop leaves to the thread: a frame that is not for the handler, a reply that it can't send without waiting.
        self.received: bytes | None = None
        self.unsent: bytes | None = None
        # A request is on its way, and whether it counts as use of the daemon.
        self.waiting = False
        self.counts = False
        # The thread has left the session to the loop.
        self.left_to_loop = False
        # The thread waits for a lock that the loop releases: a third of the cost of a concurrent future.
        self.parked = False
        self.wake = threading.Lock()
        self.wake.acquire()


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
        # Answered so far, and how many of the answers were errors. Requests for the health don't count.
        self.requests = 0
        self.errors = 0
        self._last_used = time.monotonic()
        # When the loop was last seen to turn, if somebody calls `beat` regularly.
        self._turned_at: float | None = None
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
        with self._lock:
            self._check()
            wake = not self._inbox
            self._inbox.append(session)
            self._expect_reply(session, message)
            session.parked = True
        if wake:
            self._loop.call_soon_threadsafe(self._take_inbox)
        return self._wait(session)

    def leave_to_loop(self, session: Session) -> bytes | None:
        """Have the loop answer what it can by itself, and wait until the session's thread is needed again.

        Returns and raises as `ask`; there need not have been a request.
        """
        if not session.connection.LOOP_CAN_WATCH or session.connection.has_more:
            return None
        with self._lock:
            self._check()
            session.left_to_loop = session.parked = True
        self._loop.call_soon_threadsafe(self._watch, session)
        return self._wait(session)

    def _check(self) -> None:
        if self._broken_off or self._loop.is_closed():
            raise ConnectionLost("the daemon has stopped")

    def _expect_reply(self, session: Session, message: Message) -> None:
        session.message = message
        session.waiting = True
        session.counts = message.get("meta") != messages.HEALTH
        self.in_flight += session.counts

    def _wait(self, session: Session) -> bytes | None:
        session.wake.acquire()
        unsent, session.unsent = session.unsent, None
        return unsent

    def probe(self) -> tuple[bool, float]:
        """Return whether the loop reacts, and within how many seconds it did, or for how many it has not."""
        with self._lock:
            if self._probe_answered.is_set():
                self._probe_answered.clear()
                self._probe_sent = time.monotonic()
                self._loop.call_soon_threadsafe(self._answer_probe)
        if self._probe_answered.wait(_PROBE_PATIENCE):
            return True, self._probe_lag
        since = self._probe_sent if self._turned_at is None else self._turned_at
        return False, time.monotonic() - since

    def beat(self) -> None:
        """Take note, in the loop's thread, that the loop turns: to tell later since when it has not."""
        self._turned_at = time.monotonic()

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
            self._give_back(session)

    # In the loop's thread.

    def _take_inbox(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for session in inbox:
            self._start_task(session)

    def _start_task(self, session: Session) -> None:
        if self._turned_at is not None:
            self.beat()
        context = self._context.copy()
        context.run(current_peer.set, session.connection.peer)
        task = self._loop.create_task(self._handle(session), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _watch(self, session: Session) -> None:
        if session.left_to_loop:
            try:
                self._loop.add_reader(session.connection.fileno(), self._on_readable, session)
            except OSError:
                self._give_back(session)

    def _on_readable(self, session: Session) -> None:
        connection = session.connection
        if session.waiting:
            # More, or the end, before the reply to the last one: the thread sees to it when it has been sent.
            self._unwatch(session)
            return
        frame = connection.receive_now(self._max_message)
        if frame is not None:
            message = self._for_handler(frame)
            with self._lock:
                if message is not None and not self._broken_off:
                    self._expect_reply(session, message)
            if session.waiting:
                self._start_task(session)
                return
            session.received = frame
        self._give_back(session)

    @staticmethod
    def _for_handler(frame: bytes) -> Message | None:
        try:
            message = messages.decode(frame)
        except ProtocolError:
            return None
        return None if message.get("meta") in (messages.PING, messages.SHUTDOWN) else message

    async def _handle(self, session: Session) -> None:
        message, session.message = session.message, {}
        # What is left if neither of the two below comes to replace it.
        reply = messages.error_reply(asyncio.CancelledError("the request was cancelled"))
        try:
            reply = await self._answer(message)
        except Exception as error:
            if message.get("meta") == messages.HEALTH:
                # Whoever looks at a daemon that is not well looks often: no traceback each time.
                logger.warning("the app is not well: %s: %s", type(error).__name__, error)
            else:
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
            if session.counts:
                self.in_flight -= 1
                self.requests += 1
                self.errors += "error" in reply
                self._last_used = time.monotonic()
        # Sent from here if that does not wait: the client has it one wake-up earlier.
        frame = self.encode(reply)
        session.unsent = None if session.connection.try_send(frame) else frame
        if not session.left_to_loop or session.unsent is not None or session.connection.has_more:
            self._give_back(session)

    def _give_back(self, session: Session) -> None:
        """Wake the session's thread, if nobody has yet."""
        with self._lock:
            if session.parked:
                self._unwatch(session)
                session.parked = False
                session.wake.release()

    def _unwatch(self, session: Session) -> None:
        if session.left_to_loop:
            session.left_to_loop = False
            descriptor = session.connection.fileno()
            if not self._broken_off:
                self._loop.remove_reader(descriptor)
            else:
                # It may be another thread that says so, and a loop that was closed meanwhile watches nothing.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._loop.remove_reader, descriptor)

    def _answer_probe(self) -> None:
        self._probe_lag = time.monotonic() - self._probe_sent
        self._probe_answered.set()

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
