"""The base class of the parts of the browser daemon: see `BrowserApp`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from . import CALL_TIMEOUT, LONGEST
from .errors import BrowserTimeout, CDPError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
    from typing import TypeVar

    from .connection import Connection
    from .daemon import BrowserApp
    from .errors import BrowserError

    T = TypeVar("T")
    Message = dict[str, Any]
    # Takes a request, returns the reply.
    Verb = Callable[[Message], Awaitable[Message]]
    # Takes the parameters of a request, yields the items of its stream. Closed when the client disconnects.
    Stream = Callable[[Message], AsyncIterator[Any]]
    # Takes the parameters and the timeout in seconds of a CDP call, returns the result.
    Method = Callable[[Message, float], Awaitable[Message]]

# JSON-RPC's "Invalid Request".
INVALID_REQUEST = -32600


class Changing:
    """A state whose changes can be awaited: get `changed` before checking the state, then wait for it."""

    def __init__(self) -> None:
        # Set, and replaced, with each change.
        self.changed = asyncio.Event()

    def notify(self) -> None:
        """Wake all that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Part:
    """One part of the daemon. A subclass overrides the methods that it needs."""

    def __init__(self, app: BrowserApp) -> None:
        self.app = app
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` in a background task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests ``{"meta": verb}`` that this part answers."""
        return {}

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The requests ``{"method": name, "params": object, "more": true}`` that it answers. Names have no dot."""
        return {}

    @property
    def methods(self) -> Mapping[str, Method]:
        """The CDP methods that it implements, for requests without a session."""
        return {}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Process an event of a known session, or of the browser itself. Must not raise."""

    def on_connected(self, connection: Connection) -> None:
        """Called with each new connection."""

    def on_unreachable(self, error: BrowserError) -> None:
        """Called with the error if reconnecting to the browser failed."""

    def on_drain(self) -> None:
        """End all streams, since the daemon stops."""

    def on_lost(self) -> None:
        """Forget the state of a lost connection."""


def bad_request(text: str) -> CDPError:
    """Return the error for an invalid request."""
    return CDPError(text, code=INVALID_REQUEST)


def timeout_of(message: Message) -> float:
    """Return the timeout of a request in seconds. Raises `CDPError`."""
    timeout = message.get("timeout")
    if timeout is None:
        return CALL_TIMEOUT
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise bad_request("a timeout must be a number of seconds from 0 on")
    return min(timeout, LONGEST)


def bounded(verb: Verb) -> Verb:
    """Return the verb with its ``timeout`` enforced: it raises `BrowserTimeout`."""

    async def read(message: Message) -> Message:
        timeout = timeout_of(message)
        try:
            async with asyncio.timeout(timeout):
                return await verb(message)
        except TimeoutError as error:
            if isinstance(error, BrowserTimeout):
                raise
            raise BrowserTimeout(f"the page has not been read within {timeout:g} s: allow a longer timeout") from None

    return read


def named_session(message: Message) -> str | None:
    """Return the session of a request, or None. Raises `CDPError`."""
    session = message.get("session_id")
    if session is not None and not isinstance(session, str):
        raise bad_request(f"a session_id must be a text, not {type(session).__name__}")
    return session or None
