"""What a call sends, and what its replies mean to the caller. No I/O."""

from __future__ import annotations

import time
from math import inf

from ._transport import deadline_after
from .errors import Busy, ConnectionLost, ExpectedMore, HarnessIPCError, ProtocolError, RemoteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from ._exchange import Exchange
    from ._protocol.messages import Message

    ErrorClasses = dict[str, type[RemoteError]]


def check_request(message: Message) -> Message:
    """Return `message`. Raises `ProtocolError` if it is none, or asks for more than one reply."""
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a dict, not {type(message).__name__}")
    if "more" in message:
        raise ProtocolError('a message has no "more", which belongs to the channel: use stream()')
    return message


def call_message(method: str, params: Message | None, kwargs: Message, deadline: float, *, more: bool = False) -> Message:
    """Return the message of a call, or with `more` of a stream.

    Raises `TypeError` if `params` is no dict, or has a name that `kwargs` has.
    """
    if params is not None:
        if not isinstance(params, dict):
            raise TypeError(f"the parameters of a call are a dict, not {type(params).__name__}")
        if twice := [key for key in params if key in kwargs]:
            raise TypeError(f"the parameter {twice[0]!r} is given twice")
        kwargs = {**params, **kwargs}
    message: Message = {"method": method, "params": kwargs}
    if deadline != inf:
        message["timeout"] = round(max(0.0, deadline - time.monotonic()), 3)
    if more:
        message["more"] = True
    return message


def error_classes(errors: Iterable[type[RemoteError]]) -> ErrorClasses:
    """Return `errors` by their names. Raises `TypeError` for other classes, and `ValueError` if two have the same name."""
    classes: ErrorClasses = {}
    for kind in errors:
        if not (isinstance(kind, type) and issubclass(kind, RemoteError)):
            raise TypeError(f"errors has {kind!r}, which is not a subclass of RemoteError")
        if classes.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"errors has two classes {kind.__name__!r}: the daemon's reply names an error by that alone")
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


def error_of_channel(reply: Message, name: str) -> HarnessIPCError | None:
    """Return the error that the channel of the daemon `name`, and not its handler, has sent, if that is what `reply` is."""
    error: Any = reply.get("error")
    if not isinstance(error, dict) or "executed" not in error:
        return None
    if error["executed"] is False and error.get("type") == Busy.__name__:
        return Busy(f"the daemon {name!r} takes no request now, {error.get('message')}: try again later")
    if error["executed"] is True and error.get("type") == "DaemonStopping":
        return ConnectionLost(str(error.get("message")))
    return None


def _remote_error(error: Any, classes: ErrorClasses) -> RemoteError:
    if not isinstance(error, dict):
        return RemoteError(str(error))
    text, kind = str(error.get("message", error)), str(error.get("type", ""))
    if error.get("executed") is not False:
        known = classes.get(kind, RemoteError)
        # Not known(...): an application's class may take other arguments.
        made = known.__new__(known, text)
        RemoteError.__init__(made, text, type=kind, data=error.get("data"))
        return made
    # Only the channel says that a request did not run, so such an error is of its own types.
    known = ExpectedMore if kind == ExpectedMore.__name__ else RemoteError
    return known(text, type=kind, maybe_executed=False)


class Items:
    """What the blocking and the asynchronous iterator over a stream share: where the stream is, and its result."""

    def __init__(self, exchange: Exchange, timeout: float | None) -> None:
        self.result: Any = None
        self._exchange = exchange
        # Seconds between two items; None if the exchange has a deadline for them all.
        self._timeout = timeout
        self._item: Any = None
        self._ended = False
        self._receiving = False

    def __del__(self) -> None:
        self._exchange.close()

    def _may_begin(self) -> bool:
        """Return whether there may be another reply, and give it its time. What fails meanwhile ends the stream."""
        if self._ended:
            return False
        if self._timeout is not None:
            self._exchange.deadline = deadline_after(self._timeout)
        self._ended = self._receiving = True
        return True

    def _has_item(self, reply: Message) -> bool:
        """Take a reply. Return whether it was an item, now in `_item`. Raises as `result_of` does."""
        self._receiving = False
        self._ended = not self._exchange.is_streaming
        if self._ended:
            self.result = result_of(reply, self._exchange.error_classes)
            return False
        self._item = reply.get("result")
        return True

    def _end(self) -> None:
        self._ended = True
        if self._receiving:
            # A task, or the frame below a signal handler, that waits for an item closes the connection itself.
            self._exchange.cancel()
        else:
            self._exchange.close()
