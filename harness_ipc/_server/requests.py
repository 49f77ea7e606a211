"""The handling of requests: handler, `health`, errors and counters. Independent of connections."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .._descriptors import close_in_child, end_child
from .._progress import report_start
from .._protocol import messages
from .._rate_limit import RateLimitedLogger
from .._transport import deadline_after
from ..errors import ExpectedMore, RemoteError
from .counters import Counters

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
    from json import JSONEncoder

    from .._protocol.messages import Message
    from .._transport import PeerCredentials

    Handler = Callable[[Message], Awaitable[Message] | AsyncIterator[Any]]

    class Caller(Protocol):
        """The receiver of the replies to a request."""

        @property
        def peer(self) -> PeerCredentials:
            """The process of the client."""

        async def send_item(self, frame: bytes) -> None:
            """Send a reply that is not the final one, and wait while 64 KiB or more are unsent."""

        def send_reply(self, frame: bytes) -> None:
            """Send the final reply. It is dropped if the caller has disconnected."""


logger = logging.getLogger(__name__)


class Dispatcher:
    """The interface of a handler with methods, such as `Service`. This one has none.

    If a call raises `RemoteError` synchronously, before its result is awaited, the request has not run.
    """

    # Methods that are not cancelled when their caller disconnects.
    uninterrupted: frozenset[str] = frozenset()

    def describe_methods(self) -> list[Message]:
        """Return the description of each method."""
        return []

    def encode_result(self, value: Any) -> Any:
        """Convert a value that is not JSON. Raises `TypeError` if it can't be sent."""
        return messages.to_json(value)


class CurrentRequest:
    """The current request, read-only: see `current_request`."""

    __slots__ = (
        *("_caller", "_cancelled", "_deadline", "_encoder", "_is_app_request", "_message", "_more", "_runs_to_end"),
        "_task",
    )

    def __init__(self, caller: Caller, message: Message, encoder: JSONEncoder) -> None:
        self._caller = caller
        self._message = message
        self._encoder = encoder
        self._is_app_request = message.get("meta") != messages.HEALTH
        # Whether it is not cancelled when its caller disconnects.
        self._runs_to_end = False
        # Reserved for the channel: hidden from the handler.
        self._more = message.pop("more", False) is True
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None
        seconds = message.get("timeout")
        self._deadline = deadline_after(seconds) if isinstance(seconds, (int, float)) and seconds >= 0 else inf

    @property
    def peer(self) -> PeerCredentials:
        """The process of the caller."""
        return self._caller.peer

    @property
    def method(self) -> str | None:
        """The name of the method, or None if the message has no "method"."""
        method = self._message.get("method")
        return method if isinstance(method, str) else None

    @property
    def cancelled(self) -> bool:
        """Whether the caller has disconnected, or a stopping daemon no longer waits: the result will be discarded."""
        return self._cancelled

    @property
    def deadline(self) -> float:
        """The monotonic time in seconds at which the caller stops waiting (a stream's: for its first item), or infinity."""
        return self._deadline

    def __repr__(self) -> str:
        return f"<CurrentRequest {self.method!r} of pid {self.peer.pid}{', cancelled' if self._cancelled else ''}>"


_current: contextvars.ContextVar[CurrentRequest | None] = contextvars.ContextVar("harness_ipc_request", default=None)


def current_request() -> CurrentRequest:
    """Return the request that this task or thread is handling.

    It has `peer`, the caller's process, with `pid` and `uid`; `method`; `deadline`, the monotonic time in seconds at which the
    caller stops waiting; and `cancelled`, whether its result will be discarded. Raises `LookupError` outside a handler.
    """
    request = _current.get()
    if request is None:
        raise LookupError("there is no current request: call current_request() in a handler, or in a task that it created")
    return request


async def report(value: Any) -> None:
    """Send `value`, any JSON, to the caller of the current request as progress. Waits while the caller reads too slowly.

    In an app's `start` the value goes to the processes that wait for the start (`on_progress` of `ensure_daemon`), and may have
    at most 4000 bytes of JSON. Does nothing if the caller did not ask for progress. Raises `ProtocolError`, and in `start`
    `MessageTooLarge`.
    """
    request = _current.get()
    if request is None:
        report_start(value)
    elif request._more and not request._cancelled:
        await request._caller.send_item(messages.encode(messages.item_reply(value), encoder=request._encoder))


@contextlib.contextmanager
def outliving_caller() -> Iterator[None]:
    """Do not cancel the current request, if any, when its caller disconnects. A stopping daemon still cancels it."""
    request = _current.get()
    if request is None:
        yield
        return
    before, request._runs_to_end = request._runs_to_end, True
    try:
        yield
    finally:
        request._runs_to_end = before


class Hooks(NamedTuple):
    """The app's `health`, and a callback before each reply."""

    health: Callable[[], Awaitable[Message]] | None
    before_reply: Callable[[], None] | None


class Requests:
    """The handler and its requests in flight. Belongs to the event loop's thread."""

    def __init__(self, handler: Handler, hooks: Hooks, max_message: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = RateLimitedLogger(logger)
        # Each request runs in a copy of the context in which the server was started.
        self._context = contextvars.copy_context()
        self._handler = handler
        self._dispatcher = handler if isinstance(handler, Dispatcher) else Dispatcher()
        self._encoder = messages.Encoder(self._dispatcher.encode_result)
        self._hooks = hooks
        self._max_message = max_message
        # Whether this is a forked child's copy: a handler that forks returns in both processes.
        self._is_inherited = False
        close_in_child(self)
        # Requests to the app in flight.
        self.tasks: dict[asyncio.Task[None], CurrentRequest] = {}
        # Called when `tasks` becomes empty.
        self.when_idle: Callable[[], None] | None = None
        self.counters = Counters()

    def close_inherited(self) -> None:
        """Mark a forked child's copy."""
        self._is_inherited = True

    def start(self, caller: Caller, message: Message) -> asyncio.Task[None]:
        """Handle `message` in a new task, which always ends with a final reply."""
        request = CurrentRequest(caller, message, self._encoder)
        context = self._context.copy()
        if request._is_app_request:
            self.counters.in_flight += 1
            context.run(_current.set, request)
            if self._dispatcher.uninterrupted:
                request._runs_to_end = request.method in self._dispatcher.uninterrupted
        task = self._create_task(self._run(request), context)
        # An eager task may be done already.
        if not task.done():
            request._task = task
            self.tasks[task] = request
            # Not in `_run`: it never runs if the task is cancelled before its first step.
            task.add_done_callback(self._on_done)
        return task

    def _create_task(self, run: Coroutine[Any, Any, None], context: contextvars.Context) -> asyncio.Task[None]:
        if sys.version_info >= (3, 12) and self._loop.get_task_factory() is None:
            # Saves an iteration of the loop for handlers that do not wait.
            return asyncio.Task(run, loop=self._loop, context=context, eager_start=True)
        return self._loop.create_task(run, context=context)

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel a request whose caller has disconnected, once: a second cancel would interrupt its cleanup."""
        request = self.tasks.get(task)
        if request is not None and request._is_app_request and not request._cancelled:
            request._cancelled = True
            if not request._runs_to_end:
                task.cancel()

    def cancel_all(self) -> None:
        """Cancel all requests, also those that `cancel` has cancelled."""
        for task, request in list(self.tasks.items()):
            request._cancelled = True
            task.cancel()

    async def _run(self, request: CurrentRequest) -> None:
        try:
            reply = await (self._call_handler(request) if request._is_app_request else self._ask_health())
        except (asyncio.CancelledError, GeneratorExit):
            reply = _cancelled_reply(request)
        except BaseException as error:
            # BaseException: SystemExit and KeyboardInterrupt would stop the loop.
            if self._is_inherited:
                end_child(error)
            reply = messages.error_reply(error)
            if not request._is_app_request:
                # Without a traceback: monitors ask often.
                self._log.warning("health check failed: %(type)s: %(message)s", reply["error"], error=error)
            elif not isinstance(error, RemoteError):  # that is expected
                self._log.exception("the handler failed", error)
        if self._is_inherited:
            end_child(None)
        if request._task is not None and self.tasks.pop(request._task, None) is not None:
            request._task.remove_done_callback(self._on_done)
        self._finish(request, reply)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        # It may have been abandoned.
        if (request := self.tasks.pop(task, None)) is not None:
            self._finish(request, _cancelled_reply(request))

    def _finish(self, request: CurrentRequest, reply: Message) -> None:
        # Background tasks of the handler must not report progress any more.
        request._more = False
        # Its context refers to the request.
        request._task = None
        if request._is_app_request:
            self.counters.end("error" in reply)
        if self._hooks.before_reply is not None:
            self._hooks.before_reply()
        request._caller.send_reply(self._encode(reply))
        if self.when_idle is not None and not self.tasks:
            self.when_idle()

    async def _call_handler(self, request: CurrentRequest) -> Message:
        try:
            answer: Any = self._handler(request._message)
        except RemoteError as error:
            if not isinstance(self._handler, Dispatcher):
                raise
            return messages.not_executed(error)
        is_coroutine = not hasattr(answer, "__anext__")
        if is_coroutine:
            answer = await answer
            if not hasattr(answer, "__anext__"):
                return messages.check_reply(answer)
        # An iterator that is not a generator may have no aclose().
        async with contextlib.aclosing(answer) if hasattr(answer, "aclose") else contextlib.nullcontext():
            if not request._more:
                refusal = ExpectedMore(f"{request.method or 'this request'} is answered by a stream: call it with stream()")
                return messages.error_reply(refusal) if is_coroutine else messages.not_executed(refusal)
            async for item in answer:
                if request._cancelled and not request._runs_to_end:  # it ignored the cancellation
                    raise asyncio.CancelledError
                frame = messages.encode(messages.item_reply(item), self._max_message, self._encoder)
                await request._caller.send_item(frame)
        return {"result": None}

    def describe(self) -> list[Message]:
        """Return the description of each method, from any thread."""
        return self._dispatcher.describe_methods()

    async def _ask_health(self) -> Message:
        answer: Any = None
        if self._hooks.health is not None and (answer := await self._hooks.health()) is None:
            answer = {}  # healthy
        if not isinstance(answer, (dict, type(None))):
            raise TypeError(f"health returned {type(answer).__name__}: return a dict, or raise an error")
        return {"health": answer}

    def _encode(self, reply: Message) -> bytes:
        """Return the frame of `reply`, or of an error reply if it can't be encoded."""
        try:
            return messages.encode(reply, self._max_message, self._encoder)
        except BaseException as error:  # a dict subclass may raise anything
            unsendable = messages.error_reply(error)
            self._log.error("the reply can't be sent: %(type)s: %(message)s", unsendable["error"], error=error)
            failed = reply.get("error") if isinstance(reply, dict) else None
            if isinstance(failed, dict) and failed.pop("data", None) is not None:
                # Send the error without its data.
                return self._encode(reply)
            # Without a limit: the error is short, and the request needs a reply.
            return messages.encode(unsendable)


def _cancelled_reply(request: CurrentRequest) -> Message:
    if request._cancelled:
        return messages.stopping_reply()
    return messages.error_reply(asyncio.CancelledError("the request was cancelled"))
