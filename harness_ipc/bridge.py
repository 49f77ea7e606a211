"""From a connection to the event loop and back: one message at a time for each session. It accepts and closes nothing.

Where the loop can watch a connection, it has the session: it examines the client and answers short messages without any thread,
and asks for one for all else: what is long, what comes in pieces, the end. Such a thread gives the session back with the next
message. Where the loop can't, on Windows, a thread has it to the end and waits for each reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from . import auth
from ._protocol import messages
from ._protocol.handshake import ServerHandshake
from ._rate_limit import RateLimitedLogger
from .errors import Busy, ConnectionLost, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ._protocol.messages import Message
    from .transport import Connection, PeerCredentials

    Handler = Callable[[Message], Awaitable[Message]]

logger = logging.getLogger(__name__)

# Who sent the request that is being handled, for the handler: None outside of one.
current_peer: contextvars.ContextVar[PeerCredentials | None] = contextvars.ContextVar("current_peer", default=None)

# Bytes that are read of what a client sends before the reply to its last request: the end of the connection shows only behind
# them, and cancels that request.
_MOST_AHEAD = 64 * 1024
# Seconds that a ping waits for the loop. A loop that takes longer blocks everybody: it is unresponsive.
_PROBE_PATIENCE = 0.25


class Usage(NamedTuple):
    """Requests in flight, requests answered so far, how many of the answers were errors, and seconds since the last one."""

    in_flight: int
    requests: int
    errors: int
    idle: float


class Session:
    """One connection, and the one request of it that is on its way through the loop."""

    __slots__ = (
        "accepted_at",
        "connection",
        "counts",
        "departed",
        "full",
        "handshake",
        "in_loop",
        "message",
        "parked",
        "received",
        "task",
        "unsent",
        "waiting",
        "wake",
        "watched",
    )

    def __init__(self, connection: Connection, keys: auth.Keys) -> None:
        self.connection = connection
        self.accepted_at = time.monotonic()
        # Until the client has proved itself and been admitted.
        self.handshake: ServerHandshake | None = ServerHandshake(keys)
        # Which limit is reached, if that is why the client is not admitted.
        self.full: str | None = None
        self.message: Message = {}
        # What the loop leaves to a thread: a frame that is not for the handler, a reply that it can't send without waiting.
        self.received: bytes | None = None
        self.unsent: bytes | None = None
        # A request is on its way, and whether it counts as use of the daemon.
        self.waiting = False
        self.counts = False
        # Its task, if the end of the connection cancels it; and whether that has happened.
        self.task: asyncio.Task[None] | None = None
        self.departed = False
        # The loop has the session, and whether it watches the connection for more.
        self.in_loop = False
        self.watched = False
        # Or a thread waits for a lock that the loop releases: a third of the cost of a concurrent future.
        self.parked = False
        self.wake = threading.Lock()
        self.wake.acquire()


class LoopBridge:
    """Runs the handler in the loop, measures the loop, and breaks off what does not end.

    `pong` makes the reply to a ping, of whether the loop reacts and within how many seconds. For a session that the loop has,
    these are called in the loop's thread: `admit` when the client has proved itself, which says whether it may go on,
    `need_thread` if a thread has to go on with it, `end` if it is over, with the error that it ended by; `end` must bear to be
    called again.
    """

    def __init__(
        self,
        handler: Handler,
        health: Callable[[], Awaitable[Message]] | None,
        max_message: int,
        *,
        cancel_on_disconnect: bool,
        pong: Callable[[bool, float], Message],
        admit: Callable[[Session], bool],
        need_thread: Callable[[Session], None],
        end: Callable[[Session, Exception | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = RateLimitedLogger(logger)
        self._context = contextvars.copy_context()
        self._handler = handler
        self._health = health
        self._max_message = max_message
        self._cancel_on_disconnect = cancel_on_disconnect
        self._draining = False
        self._pong = pong
        self._admit = admit
        self._need_thread = need_thread
        self._end = end
        self._lock = threading.Lock()
        # One wake-up of the loop takes all that came meanwhile.
        self._inbox: list[Session] = []
        self._tasks: dict[asyncio.Task[None], Session] = {}
        self._cancelling = False
        self._broken_off = False
        # Counted under the lock, as what was answered so far, and how many of the answers were errors. The channel's own
        # requests don't count.
        self._in_flight = 0
        self._requests = 0
        self._errors = 0
        self._last_used = time.monotonic()
        # When the loop was last seen to turn, if somebody calls `beat` regularly.
        self._turned_at: float | None = None
        self._probe_sent = 0.0
        self._probe_lag = 0.0
        self._probe_answered = threading.Event()
        self._probe_answered.set()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request ended; 0 while one is in flight. The channel's own don't count."""
        return self.usage().idle

    def usage(self) -> Usage:
        """Return how much the handler has been used, all of one moment."""
        with self._lock:
            idle = 0.0 if self._in_flight else time.monotonic() - self._last_used
            return Usage(self._in_flight, self._requests, self._errors, idle)

    def ask(self, session: Session, message: Message | None) -> bool:
        """Have the loop answer `message`. Return True if it has taken the session over: it is no more the thread's then.

        Otherwise wait for the answer: `session.unsent` is what the thread has to send of it, or None if the loop has sent it
        as far as that went without waiting; the rest is in the connection's `flush`. Without a message the loop watches for
        one, which it has to be able to: see `leave`. Raises `ConnectionLost` if the loop answers nothing any more.
        """
        in_loop = session.connection.LOOP_CAN_WATCH
        with self._lock:
            if self._broken_off or self._loop.is_closed():
                raise ConnectionLost("the daemon has stopped")
            wake = not self._inbox
            self._inbox.append(session)
            if message is not None:
                self._expect_reply(session, message)
            session.in_loop = in_loop
            session.parked = not in_loop
        if wake:
            self._loop.call_soon_threadsafe(self._take_inbox)
        if not in_loop:
            session.wake.acquire()
        return in_loop

    def leave(self, session: Session) -> bool:
        """Have the loop take the session over, and return True, if it can wait for what comes next."""
        connection = session.connection
        if not connection.LOOP_CAN_WATCH or connection.has_unread or session.received is not None:
            return False
        return self.ask(session, None)

    def _expect_reply(self, session: Session, message: Message) -> None:
        session.message = message
        session.waiting = True
        session.counts = message.get("meta") not in (messages.HEALTH, messages.PING)
        self._in_flight += session.counts

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

    def _encode(self, reply: Message, limit: int | None) -> bytes:
        """Return the frame of `reply`, or of the error that it can't be one."""
        try:
            return messages.encode(reply, limit)
        except BaseException as error:  # of the reply's own methods too, where it is no plain dict
            sorry = messages.error_reply(error)
            self._log.error("the reply can't be sent: %s: %s", *sorry["error"].values(), error=error)
            # Without a limit: the error is short, and there has to be a reply.
            return messages.encode(sorry)

    def drain(self) -> None:
        """Take no end of a connection for its client's departure any more: the daemon itself ends them, from any thread."""
        self._draining = True

    def cancel(self) -> None:
        """Cancel the handlers that are running, and start no more of them, from any thread."""
        # At once: what the loop has yet to do may come before it cancels.
        self._cancelling = True
        with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile runs none
            self._loop.call_soon_threadsafe(self._cancel_tasks)

    def break_off(self, sessions: Iterable[Session]) -> None:
        """Fail the pending requests of `sessions` with an error reply, and reject new ones."""
        with self._lock:
            self._broken_off = True
        for session in sessions:
            self._give_reply(session, messages.error_reply(asyncio.CancelledError("the daemon has stopped")), None)
            if session.in_loop:
                try:
                    self._loop.call_soon_threadsafe(self._let_go, session)
                except RuntimeError:  # a loop that was closed meanwhile watches nothing
                    self._end(session, None)

    # In the loop's thread.

    def welcome(self, session: Session) -> None:
        """Have the loop take over a session that has just been accepted."""
        session.in_loop = True
        self._receive(session)

    def _take_inbox(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for session in inbox:
            if session.waiting:
                self._start_task(session)
            else:
                self._receive(session)

    def _start_task(self, session: Session) -> None:
        if self._turned_at is not None:
            self.beat()
        if self._cancelling and session.message.get("meta") != messages.PING:
            self._give_reply(session, messages.not_executed(Busy("it is stopping")), None)
            return
        context = self._context.copy()
        context.run(current_peer.set, session.connection.peer)
        task = self._loop.create_task(self._handle(session), context=context)
        # An eager one, which the app's task factory may make, has perhaps ended already.
        if not task.done():
            self._tasks[task] = session
            # A task that is cancelled before its first step runs nothing of `_handle`, which otherwise removes this again: a
            # callback costs a turn of the loop.
            task.add_done_callback(self._on_task_done)
            if session.in_loop and self._cancel_on_disconnect and session.counts:
                session.task = task
                self._watch(session)

    def _on_readable(self, session: Session) -> None:
        if not session.waiting:
            self._receive(session)
        elif session.task is None or self._draining:
            # More, or the end, before the reply to the last one: it is seen to when that has been sent.
            self._unwatch(session)
        elif not (goes_on := session.connection.read_ahead(_MOST_AHEAD)):
            self._unwatch(session)
            if goes_on is False and not self._draining:
                # What it has sent after this request does not run either.
                session.departed = True
                session.task.cancel()

    def _watch(self, session: Session) -> None:
        if not session.watched:
            self._loop.add_reader(session.connection.fileno(), self._on_readable, session)
            session.watched = True

    def _receive(self, session: Session) -> None:
        """Take the next frame if it is there; otherwise watch for it."""
        connection = session.connection
        frame = None
        try:
            if session.handshake is None or self._receive_handshake(session, session.handshake):
                frame = connection.receive_now(self._max_message)
        except Exception as error:
            self._let_go(session, error)
            return
        if frame is None and not connection.has_unread and not connection.has_unsent:
            if session.in_loop:
                self._watch(session)
            return
        message = None if frame is None else self._for_handler(frame)
        if message is None:
            session.received = frame
            self._leave_to_thread(session)
            return
        with self._lock:
            if self._broken_off:
                return
            self._expect_reply(session, message)
        if self._loop.get_task_factory() is None and not self._cancelling:
            self._start_task(session)
        else:
            # An eager task, or a refusal, would answer at once, and come back here for the next request if that is there
            # already: so each has a turn of the loop of its own.
            self._loop.call_soon(self._start_task, session)

    def _receive_handshake(self, session: Session, handshake: ServerHandshake) -> bool:
        """Process what the client has sent to prove itself. Return whether its requests are read now."""
        connection = session.connection
        if not auth.receive_now(connection, handshake) or not self._admit(session):
            return False
        # Our verdict goes out with the reply to a request that came with the proof: it would wake the client for nothing.
        if not connection.has_unread:
            connection.try_flush()
        return True

    @staticmethod
    def _for_handler(frame: bytes) -> Message | None:
        try:
            message = messages.decode(frame)
        except ProtocolError:
            return None
        return None if message.get("meta") == messages.SHUTDOWN else message

    async def _handle(self, session: Session) -> None:
        message, session.message = session.message, {}
        try:
            reply = await self._answer(message)
        except (asyncio.CancelledError, GeneratorExit):
            reply = _cancelled_reply()
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a task that ends with them ends the loop.
            if message.get("meta") == messages.HEALTH:
                # A monitor asks often: no traceback each time.
                self._log.warning("health check failed: %s: %s", *messages.error_reply(error)["error"].values(), error=error)
            else:
                self._log.exception("the handler failed", error)
            reply = messages.error_reply(error)
        # The limit is for what is the app's.
        self._give_reply(session, reply, None if message.get("meta") == messages.PING else self._max_message)
        task = asyncio.current_task(self._loop)
        if task is not None and self._tasks.pop(task, None) is not None:
            task.remove_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._give_reply(self._tasks.pop(task), _cancelled_reply(), None)

    async def _answer(self, message: Message) -> Message:
        if message.get("meta") == messages.HEALTH:
            return {"health": await self._health() if self._health is not None else None}
        if message.get("meta") == messages.PING:
            since = time.monotonic()
            await asyncio.sleep(0)  # a turn of the loop
            return self._pong(True, time.monotonic() - since)
        reply: Any = await self._handler(message)
        if not isinstance(reply, dict):
            raise TypeError(f"the handler returned {type(reply).__name__}, a reply is a dict")
        return reply

    def _give_reply(self, session: Session, reply: Message, limit: int | None) -> None:
        with self._lock:
            if not session.waiting:
                return
            session.waiting = False
            session.message = {}
            session.task = None
            if session.counts:
                self._in_flight -= 1
                self._requests += 1
                self._errors += "error" in reply
                self._last_used = time.monotonic()
        if session.departed:
            self._let_go(session)
            return
        # Sent from here if that does not wait: the client has it one wake-up earlier.
        connection = session.connection
        frame = self._encode(reply, limit)
        session.unsent = None if connection.try_send(frame) else frame
        if session.parked:
            session.parked = False
            session.wake.release()
        elif self._broken_off:
            # This may be another thread; whoever broke off sees to the end.
            return
        elif session.unsent is not None or connection.has_unsent:
            self._leave_to_thread(session)
        elif not session.watched or connection.has_unread:
            # At once: most clients that ask once have said meanwhile that they are done.
            self._receive(session)

    def _leave_to_thread(self, session: Session) -> None:
        self._unwatch(session)
        session.in_loop = False
        self._need_thread(session)

    def _let_go(self, session: Session, error: Exception | None = None) -> None:
        self._unwatch(session)
        session.in_loop = False
        self._end(session, error)

    def _unwatch(self, session: Session) -> None:
        if session.watched:
            session.watched = False
            self._loop.remove_reader(session.connection.fileno())

    def _answer_probe(self) -> None:
        self._probe_lag = time.monotonic() - self._probe_sent
        self._probe_answered.set()

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()


def _cancelled_reply() -> Message:
    return messages.error_reply(asyncio.CancelledError("the request was cancelled"))
