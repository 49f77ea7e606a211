"""The message of a call, and its replies as a result, an error, or the items of a stream.

Imports no asyncio and does no I/O.
"""

from __future__ import annotations

from math import inf

from ._pool import run
from .errors import (
    Busy,
    ConnectionLost,
    ExpectedMore,
    HarnessIPCError,
    InvalidParams,
    MethodNotFound,
    ProtocolError,
    RemoteError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from types import TracebackType
    from typing import Any, Self

    from ._exchange import Exchange
    from ._protocol.messages import Message

    ErrorClasses = dict[str, type[RemoteError]]
    # Awaits a coroutine function that uses the exchange.
    Run = Callable[[Exchange, Callable[[], Coroutine[Any, Any, bool]]], Coroutine[Any, Any, bool]]


def check_request(message: Message) -> Message:
    """Return `message`. Raises `ProtocolError` if it is not a dict, or asks for more than one reply."""
    if not isinstance(message, dict):
        raise ProtocolError(f"a message must be a dict, not {type(message).__name__}")
    if "more" in message:
        raise ProtocolError('the key "more" is reserved: use stream()')
    return message


def call_message(method: str, params: Message | None, kwargs: Message, timeout: float, *, more: bool = False) -> Message:
    """Return the message of a call with `timeout` seconds; with `more`, of a stream.

    Raises `TypeError` if `params` is not a dict or shares a name with `kwargs`.
    """
    if params is not None:
        if not isinstance(params, dict):
            raise TypeError(f"the parameters of a call must be a dict, not {type(params).__name__}")
        if twice := [key for key in params if key in kwargs]:
            raise TypeError(f"the parameter {twice[0]!r} is given twice")
        kwargs = {**params, **kwargs}
    message: Message = {"method": method, "params": kwargs}
    if timeout < inf:
        message["timeout"] = float(timeout)
    if more:
        message["more"] = True
    return message


def error_classes(errors: Iterable[type[RemoteError]]) -> ErrorClasses:
    """Return `errors` by name. Raises `TypeError` for other classes, and `ValueError` if two have the same name."""
    classes: ErrorClasses = {}
    if isinstance(errors, type):
        raise TypeError(f"errors must be a list of classes: write errors=[{errors.__name__}]")
    for kind in errors:
        if not (isinstance(kind, type) and issubclass(kind, RemoteError)):
            raise TypeError(f"errors has {kind!r}, which is not a subclass of RemoteError")
        if classes.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"errors has two classes named {kind.__name__!r}: a reply identifies an error by name alone")
    return classes


def result_of(reply: Message, classes: ErrorClasses) -> Any:
    """Return ``reply["result"]``.

    Raises for ``reply["error"]`` the class of its type in `classes`, or `RemoteError`; `ProtocolError` if it has neither.
    """
    if "error" in reply:
        raise _remote_error(reply["error"], classes)
    if "result" not in reply:
        raise ProtocolError(
            'the reply has neither "result" nor "error": use request() for replies of another form', maybe_executed=True
        )
    return reply["result"]


def description_of(reply: Message) -> Message:
    """Return the daemon's description of itself. Raises `ProtocolError`."""
    description = reply.get("describe")
    if not isinstance(description, dict):
        raise ProtocolError("the daemon does not describe itself: it is of another version")
    return description


def error_of_channel(reply: Message, name: str) -> HarnessIPCError | None:
    """Return the error in `reply` if the channel of the daemon `name` sent it, not its handler; else None."""
    error: Any = reply.get("error")
    if not isinstance(error, dict) or "executed" not in error:
        return None
    if error["executed"] is False and error.get("type") == Busy.__name__:
        return Busy(f"the daemon {name!r} refuses requests for now: {error.get('message')}; try again later")
    if error["executed"] is True and error.get("type") == "DaemonStopping":
        return ConnectionLost(str(error.get("message")))
    return None


# Only the channel can say that a request did not run, so such an error has one of its types.
_NOT_EXECUTED = {kind.__name__: kind for kind in (ExpectedMore, InvalidParams, MethodNotFound)}


def _remote_error(error: Any, classes: ErrorClasses) -> RemoteError:
    if not isinstance(error, dict):
        return RemoteError(str(error))
    text, kind, data = str(error.get("message", error)), str(error.get("type", "")), error.get("data")
    if error.get("executed") is False:
        return _NOT_EXECUTED.get(kind, RemoteError)(text, type=kind, data=data, maybe_executed=False)
    known = classes.get(kind, RemoteError)
    # Not known(...): an application's class may have another signature. Not known.__new__: for a class that also derives from
    # OSError, that is RuntimeError's, which Python refuses.
    base: Any = known
    while "__new__" not in vars(base):
        base = base.__base__
    made: RemoteError = base.__new__(known, text)
    RemoteError.__init__(made, text, type=kind, data=data)
    return made


class _Items:
    """The position of a stream, its last item and its result. `timeout` is in seconds, for each item."""

    def __init__(self, exchange: Exchange, timeout: float | None = None) -> None:
        self.result: Any = None
        self._exchange = exchange
        self._timeout = timeout
        self._item: Any = None
        self._ended = False
        self._receiving = False

    async def _advance(self) -> bool:
        """Receive the next item. Return False at the end, when `result` is set. Raises what `call` does."""
        if self._ended:
            return False
        if self._timeout is not None:
            self._exchange.set_timeout(self._timeout)
        # Also if this fails.
        self._ended = self._receiving = True
        try:
            reply = await self._exchange.reply()
        finally:
            self._receiving = False
        self._ended = reply.get("continues") is not True
        if self._ended:
            self.result = self._exchange.result_of(reply)
        else:
            self._item = reply.get("result")
        return not self._ended

    def _end(self) -> None:
        self._ended = True
        if self._receiving:
            # Another task, or the code that a signal handler interrupted, waits for an item: it closes the connection itself.
            self._exchange.cancel()
        else:
            self._exchange.close()


class Stream(_Items):
    """The items of a stream: an iterator, and a context manager that closes it. Returned by `Client.stream`; for one thread.

    `result` is the final result once there are no more items: None for a method that yields.
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if run(self._advance()):
            return self._item
        raise StopIteration

    def close(self) -> None:
        """End the stream, and its connection if items are left. Closing twice is no error."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


class AsyncStream(_Items):
    """The items of a stream: an asynchronous iterator and context manager. Returned by `AsyncClient.stream`.

    `result` is the final result once there are no more items: None for a method that yields.
    """

    def __init__(self, run: Run, exchange: Exchange, timeout: float | None = None) -> None:
        super().__init__(exchange, timeout)
        self._run = run

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if await self._run(self._exchange, self._advance):
            return self._item
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the stream, and its connection if items are left. Closing twice is no error."""
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
