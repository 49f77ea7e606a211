"""The connections of a client: which are open, which are kept, for which process; and how an exchange waits for one.

It knows no request.
"""

from __future__ import annotations

import os
import threading

from . import _transport
from ._protocol.session import IDLE
from ._registry import records
from ._transport import serving_threads
from .errors import DaemonNotRunning, IncompatibleDaemon

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any, TypeVar

    from ._calls import ErrorClasses
    from ._protocol.session import ClientProtocol
    from ._registry.namespace import Namespace
    from ._transport import Connection
    from .errors import HarnessIPCError

    Command = str | Sequence[str | os.PathLike[str]]
    Start = Command | Callable[[], object]
    T = TypeVar("T")


class WrongVersion(DaemonNotRunning):
    """A daemon of another version than the wanted one runs, and may be replaced."""


class Link:
    """An open connection: its transport, its protocol, the record of the generation behind it, and its limit of a request."""

    __slots__ = ("connection", "limit", "protocol", "record")

    def __init__(self, connection: Connection, protocol: ClientProtocol, record: records.Record, limit: int) -> None:
        self.connection = connection
        self.protocol = protocol
        self.record = record
        self.limit = limit


class State:
    """What belongs to one process: a forked child has another one, with no connection and no lock of its parent's.

    `guard` is held for a few instructions, never across a wait. It is re-entrant, because a signal handler may call or close
    the client between any two of them.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closed = False
        self.guard = threading.RLock()
        # Links that an exchange uses, and those that none uses, the last one used at the end. One that is in neither, because
        # an exception came in between, closes itself.
        self.busy: set[Link] = set()
        self.idle: list[Link] = []


class Pool:
    """The connections of one client, for any number of exchanges at once. At most `max_idle` are kept between them.

    With `generation`, no other one is asked. With `start`, a daemon that is absent or says goodbye is started: by a command
    line, an app or a function. `start_options` are arguments of `ensure_daemon`: `timeout`, and `version`, which also a daemon
    that runs must have, with `on_mismatch`.
    """

    def __init__(
        self,
        name: str,
        *,
        namespace: Namespace | None,
        connect_timeout: float,
        max_message: int,
        any_schema: bool = False,
        generation: str | None = None,
        start: Start | None = None,
        start_options: dict[str, Any] | None = None,
        error_classes: ErrorClasses | None = None,
        max_idle: int = 8,
    ) -> None:
        self.name = name
        self.namespace = namespace
        self.connect_timeout = connect_timeout
        self.max_message = max_message
        self.any_schema = any_schema
        self.generation = generation
        self.start = start
        self.start_options = start_options or {}
        self.error_classes = error_classes or {}
        self.max_idle = max_idle
        # Of the generation that was connected last.
        self.record: records.Record
        self.state = State()

    def own_state(self) -> State:
        """Return the state of this process."""
        if self.state.pid != os.getpid():
            # The inherited connections close themselves.
            inherited, self.state = self.state, State()
            self.state.closed = inherited.closed
        return self.state

    def close(self) -> None:
        """Close all connections; exchanges end with `ClientClosed`. It waits for none of them."""
        state = self.own_state()
        state.closed = True
        with state.guard:
            # A copy: a signal handler may change it.
            for link in list(state.busy):
                link.connection.abort()
            while state.idle:
                state.idle.pop().connection.close()

    def load(self, *, again: bool, refused: dict[str, HarnessIPCError] | None = None) -> records.Record:
        """Return the record of the daemon to ask.

        Raises what `records.load` does, and for a generation in `refused` the error there.
        """
        record = records.load(self.name, again=again, any_schema=self.any_schema, namespace=self.namespace)
        if self.generation not in (None, record.generation):
            raise DaemonNotRunning(f"the daemon {self.name!r} has been replaced by another generation")
        if refused and record.generation in refused:
            raise refused[record.generation]
        wanted = self.start_options.get("version")
        if wanted is not None and (found := record.public().get("app_version")) != wanted:
            found = found or "None (its run_daemon has no app_version)"
            text = f"the daemon {self.name!r} that runs has version {found}, not {wanted}"
            if self.start_options.get("on_mismatch") == "restart":
                raise WrongVersion(text)
            raise IncompatibleDaemon(f"{text}: restart it, or use that version")
        return record

    def check_in(self, state: State, link: Link) -> None:
        """Keep a link that is no longer used, or close it. Call it under the guard."""
        # A late reply must not be taken for the next request's: only a link that waits for nothing is kept.
        is_idle = link.protocol.state == IDLE and not link.protocol.buffered
        if is_idle and not state.closed and len(state.idle) < self.max_idle:
            state.idle.append(link)
        else:
            # Under the guard, so that nobody aborts a descriptor that has become another file's.
            link.connection.close()


class IO:
    """How an exchange waits: by blocking. Errors are those of `_transport`."""

    async def connect(self, address: str, deadline: float) -> Connection:
        return _transport.connect(address, deadline)

    async def send(self, connection: Connection, chunks: list[bytes]) -> None:
        connection.send(chunks)

    async def receive(self, connection: Connection, limit: int) -> bytes:
        return connection.receive(limit)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function that blocks."""
        return function()

    def check(self, record: records.Record) -> None:
        """Raise `RuntimeError` if waiting for this daemon here would never end."""
        if record.pid == os.getpid() and serving_threads.get(record.address) == threading.get_ident():
            raise RuntimeError(
                f"a blocking call to the daemon {record.name!r} in the thread of its own event loop would wait for itself: use "
                "`await aconnect_daemon(...)`, or run the call in a thread with `await asyncio.to_thread(...)`"
            )


BLOCKING = IO()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine of an exchange that blocks."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a blocking coroutine waited")
