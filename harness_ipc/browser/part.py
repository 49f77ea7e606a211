"""What the parts of the browser daemon have in common. A part does one job: see `BrowserApp`."""

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
    # From a request to its reply.
    Verb = Callable[[Message], Awaitable[Message]]
    # From a request's parameters to the items of its stream. It is closed when the client leaves.
    Stream = Callable[[Message], AsyncIterator[Any]]
    # From the parameters and the timeout in seconds of a CDP call to its result.
    Method = Callable[[Message, float], Awaitable[Message]]

# JSON-RPC's "Invalid Request".
INVALID_REQUEST = -32600


class Changing:
    """Something that requests wait for a change of: they take `changed` before they look, and wait for it after."""

    def __init__(self) -> None:
        # Set, and replaced, with each change.
        self.changed = asyncio.Event()

    def notify(self) -> None:
        """Wake those that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Part:
    """One job of the daemon's. All that it may do is optional."""

    def __init__(self, app: BrowserApp) -> None:
        self.app = app
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do `work` in a task that nobody has to keep."""
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
        """The requests ``{"method": name, "params": object, "more": true}`` that it answers. No name has a dot: CDP's have."""
        return {}

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods of CDP that it calls itself, for requests that name no session."""
        return {}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Take note of an event of the browser: of a session that is known, or of the browser itself. May not raise."""

    def on_connected(self, connection: Connection) -> None:
        """Make use of a connection that was made, the first or a later one."""

    def on_unreachable(self, error: BrowserError) -> None:
        """Take note that the browser could not be connected again, and why."""

    def on_drain(self) -> None:
        """End the streams: the daemon stops."""

    def on_lost(self) -> None:
        """Forget what was of the connection that was lost."""


def bad_request(text: str) -> CDPError:
    """Return the error for a request that the browser was not asked."""
    return CDPError(text, code=INVALID_REQUEST)


def timeout_of(message: Message) -> float:
    """Return the timeout of a request in seconds. Raises `CDPError`."""
    timeout = message.get("timeout")
    if timeout is None:
        return CALL_TIMEOUT
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise bad_request("a timeout is a number of seconds from 0 on")
    return min(timeout, LONGEST)


def bounded(verb: Verb) -> Verb:
    """Return the request that reads a page for its ``timeout`` at most. It raises `BrowserTimeout` then."""

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
    """Return the session that a request names, or None. Raises `CDPError`."""
    session = message.get("session_id")
    if session is not None and not isinstance(session, str):
        raise bad_request(f"a session_id is a text, not {type(session).__name__}")
    return session or None
