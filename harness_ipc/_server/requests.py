"""From one message to its replies: the handler, the channel's own requests, errors and counters. It knows no connection."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import time
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .._descriptors import end_child
from .._protocol import messages
from .._rate_limit import RateLimitedLogger
from .._transport import deadline_after
from ..errors import ExpectedMore, ProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from .._protocol.messages import Message
    from .._transport import PeerCredentials

    Handler = Callable[[Message], Awaitable[Message] | AsyncIterator[Any]]

    class Caller(Protocol):
        """Where the replies to a request go."""

        @property
        def peer(self) -> PeerCredentials:
            """The process at the other end."""

        async def send_item(self, frame: bytes) -> None:
            """Send a reply that is not the final one, and wait while 64 KiB are unsent."""

        def send_reply(self, frame: bytes) -> None:
            """Send the final reply. One that comes after the caller has gone is dropped."""


logger = logging.getLogger(__name__)


class Usage(NamedTuple):
    """Requests in flight, requests answered so far, how many of the answers were errors, and seconds since the last one."""

    in_flight: int
    requests: int
    errors: int
    idle: float


class CurrentRequest:
    """The request that is being handled, read-only: see `current_request`."""

    __slots__ = ("_caller", "_cancelled", "_deadline", "_is_app_request", "_message", "_more", "_task")

    def __init__(self, caller: Caller, message: Message) -> None:
        self._caller = caller
        self._message = message
        self._is_app_request = message.get("meta") != messages.HEALTH
        # The channel's: the handler does not see it.
        self._more = message.pop("more", False) is True
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None
        seconds = message.get("timeout")
        self._deadline = deadline_after(seconds) if isinstance(seconds, (int, float)) and seconds >= 0 else inf

    @property
    def peer(self) -> PeerCredentials:
        """The process that asks."""
        return self._caller.peer

    @property
    def method(self) -> str | None:
        """The method's name, or None for a message of another form."""
        method = self._message.get("method")
        return method if isinstance(method, str) else None

    @property
    def cancelled(self) -> bool:
        """Whether the caller has gone, or the daemon has stopped waiting for the reply."""
        return self._cancelled

    @property
    def deadline(self) -> float:
        """The monotonic time in seconds at which the caller stops waiting; infinity if it has not said."""
        return self._deadline

    def __repr__(self) -> str:
        return f"<CurrentRequest {self.method!r} of pid {self.peer.pid}{', cancelled' if self._cancelled else ''}>"


_current: contextvars.ContextVar[CurrentRequest | None] = contextvars.ContextVar("harness_ipc_request", default=None)


def current_request() -> CurrentRequest:
    """Return the request that this task or thread is handling.

    It has `peer`, the process that asks, with `pid` and `uid`; `method`; `deadline`, the monotonic time in seconds at which the
    caller stops waiting; and `cancelled`, whether nobody waits any more. Raises `LookupError` outside of a handler.
    """
    request = _current.get()
    if request is None:
        raise LookupError("no request is being handled here: call current_request() in a handler, or in a task that it started")
    return request


async def report(value: Any) -> None:
    """Send `value`, which must be JSON, to the caller of the current request as progress; wait while it does not read.

    Does nothing if the caller has not asked for progress, or if no request is being handled. Raises `ProtocolError`.
    """
    request = _current.get()
    if request is not None and request._more and not request._cancelled:
        await request._caller.send_item(messages.encode(messages.item_reply(value)))


class Counters:
    """How much the handler is used. The channel's own requests don't count. May be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._requests = 0
        self._errors = 0
        self._last_used = time.monotonic()

    def begin(self) -> None:
        """Count a request in flight."""
        with self._lock:
            self._in_flight += 1

    def end(self, is_error: bool) -> None:
        """Count its reply."""
        with self._lock:
            self._in_flight -= 1
            self._requests += 1
            self._errors += is_error
            self._last_used = time.monotonic()

    def usage(self) -> Usage:
        """Return all of it, of one moment."""
        with self._lock:
            idle = 0.0 if self._in_flight else time.monotonic() - self._last_used
            return Usage(self._in_flight, self._requests, self._errors, idle)


class Hooks(NamedTuple):
    """What requests need of others: the app's health, and calls around each reply."""

    health: Callable[[], Awaitable[Message]] | None
    before_reply: Callable[[], None] | None
    after_reply: Callable[[], None]


class Requests:
    """The handler and its requests in flight, in the event loop's thread."""

    def __init__(
        self,
        handler: Handler,
        hooks: Hooks,
        max_message: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = RateLimitedLogger(logger)
        # Without what belongs to the caller of the server's start.
        self._context = contextvars.copy_context()
        self._handler = handler
        self._hooks = hooks
        self._max_message = max_message
        self._pid = os.getpid()
        # The application's requests in flight.
        self.tasks: dict[asyncio.Task[None], CurrentRequest] = {}
        self.counters = Counters()

    def start(self, caller: Caller, message: Message) -> asyncio.Task[None]:
        """Handle `message` in a task of its own, which always ends with a final reply."""
        request = CurrentRequest(caller, message)
        context = self._context.copy()
        if request._is_app_request:
            self.counters.begin()
            context.run(_current.set, request)
        task = self._loop.create_task(self._run(request), context=context)
        # An eager one, which the app's task factory may make, has perhaps ended already.
        if not task.done():
            request._task = task
            self.tasks[task] = request
            # A task that is cancelled before its first step runs nothing of `_run`.
            task.add_done_callback(self._on_done)
        return task

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel a request of the application's, once: a second cancel would break clean-up that awaits."""
        request = self.tasks.get(task)
        if request is not None and request._is_app_request and not request._cancelled:
            request._cancelled = True
            task.cancel()

    def cancel_all(self) -> None:
        """Cancel all requests: those whose callers have gone for the second time."""
        for task, request in list(self.tasks.items()):
            request._cancelled = True
            task.cancel()

    async def _run(self, request: CurrentRequest) -> None:
        try:
            reply = await (self._call_handler(request) if request._is_app_request else self._ask_health())
        except (asyncio.CancelledError, GeneratorExit):
            reply = _cancelled_reply(request)
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a task that ends with them ends the loop.
            end_child(self._pid, error)
            reply = messages.error_reply(error)
            if request._is_app_request:
                self._log.exception("the handler failed", error)
            else:
                # A monitor asks often: no traceback each time.
                self._log.warning("health check failed: %s: %s", *reply["error"].values(), error=error)
        end_child(self._pid)
        if request._task is not None and self.tasks.pop(request._task, None) is not None:
            request._task.remove_done_callback(self._on_done)
        self._finish(request, reply)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        # An abandoned one is in nobody's way any more.
        if (request := self.tasks.pop(task, None)) is not None:
            self._finish(request, _cancelled_reply(request))

    def _finish(self, request: CurrentRequest, reply: Message) -> None:
        # A task that the handler has left behind can't report into the next request.
        request._more = False
        if request._is_app_request:
            self.counters.end("error" in reply)
        if self._hooks.before_reply is not None:
            self._hooks.before_reply()
        request._caller.send_reply(self._encode(reply))
        self._hooks.after_reply()

    async def _call_handler(self, request: CurrentRequest) -> Message:
        answer: Any = self._handler(request._message)
        is_coroutine = not hasattr(answer, "__anext__")
        if is_coroutine:
            answer = await answer
            if not hasattr(answer, "__anext__"):
                return messages.check_reply(answer)
        # An iterator that is no generator has nothing to close.
        async with contextlib.aclosing(answer) if hasattr(answer, "aclose") else contextlib.nullcontext():
            if not request._more:
                error = ExpectedMore(f"{request.method or 'this request'} is answered by a stream: call it with stream()")
                return messages.error_reply(error) if is_coroutine else messages.not_executed(error)
            async for item in answer:
                if request._cancelled:  # and it goes on: it is closed where it is
                    raise asyncio.CancelledError
                frame = messages.encode(messages.item_reply(item), self._max_message)
                await request._caller.send_item(frame)
        return {"result": None}

    async def _ask_health(self) -> Message:
        answer: Any = None
        if self._hooks.health is not None and (answer := await self._hooks.health()) is None:
            answer = {}  # there is a health, and it has found no fault
        if not isinstance(answer, (dict, type(None))):
            raise TypeError(f"health returned {type(answer).__name__}: return a dict, or raise an error")
        return {"health": answer}

    def _encode(self, reply: Message) -> bytes:
        """Return the frame of `reply`, or of the error that it can't be one."""
        try:
            return messages.encode(reply, self._max_message)
        except BaseException as error:  # of the reply's own methods too, where it is no plain dict
            sorry = messages.error_reply(error)
            self._log.error("the reply can't be sent: %s: %s", *sorry["error"].values(), error=error)
            # Without a limit: the error is short, and there has to be a reply.
            return messages.encode(sorry)


def unreadable_reply(error: ProtocolError) -> bytes:
    """Return the reply to a request that can't be read."""
    return messages.encode(messages.not_executed(error))


def _cancelled_reply(request: CurrentRequest) -> Message:
    if request._cancelled:
        return messages.stopping_reply()
    return messages.error_reply(asyncio.CancelledError("the request was cancelled"))
