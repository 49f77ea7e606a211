"""The connections of a client, in use or idle, and the blocking I/O of an exchange."""

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
    """The running daemon has another version, and may be replaced."""


class Link:
    """An open connection: transport, protocol, the record of its generation, and the size limit of a request."""

    __slots__ = ("connection", "limit", "protocol", "record")

    def __init__(self, connection: Connection, protocol: ClientProtocol, record: records.Record, limit: int) -> None:
        self.connection = connection
        self.protocol = protocol
        self.record = record
        self.limit = limit


class State:
    """The connections of one process: a forked child gets a new state, without its parent's connections and lock.

    `guard` is held for a few instructions, never across a wait. It is re-entrant: a signal handler may call or close the
    client at any time.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closed = False
        self.guard = threading.RLock()
        # Links in use, and idle links, the most recently used last. A link in neither, after an exception, closes itself.
        self.busy: set[Link] = set()
        self.idle: list[Link] = []


class Pool:
    """The connections of one client, for any number of concurrent exchanges. At most `max_idle` are kept between them.

    With `generation`, requests go to no other generation. With `start`, a command line, an app or a function, a daemon that is
    absent or stopping is started. `start_options` are arguments of `ensure_daemon`: `timeout`, `version` (also required of a
    running daemon) and `on_mismatch`.
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
        # The record of the generation that was connected to last.
        self.record: records.Record
        self.state = State()

    def own_state(self) -> State:
        """Return the state of this process."""
        if self.state.pid != os.getpid():
            # The connections inherited by a fork close themselves.
            inherited, self.state = self.state, State()
            self.state.closed = inherited.closed
        return self.state

    def close(self) -> None:
        """Close all connections; exchanges end with `ClientClosed`. Waits for none of them."""
        state = self.own_state()
        state.closed = True
        with state.guard:
            # A copy: a signal handler may change it.
            for link in list(state.busy):
                link.connection.abort()
            while state.idle:
                state.idle.pop().connection.close()

    def load(self, *, again: bool, refused: dict[str, HarnessIPCError] | None = None) -> records.Record:
        """Return the record of the daemon.

        Raises what `records.load` does, the error in `refused` if its generation has one, and `IncompatibleDaemon` or
        `WrongVersion` for another version than `start_options` require.
        """
        record = records.load(self.name, again=again, any_schema=self.any_schema, namespace=self.namespace)
        if self.generation not in (None, record.generation):
            raise DaemonNotRunning(f"the daemon {self.name!r} has been replaced by another generation")
        if refused and record.generation in refused:
            raise refused[record.generation]
        wanted = self.start_options.get("version")
        if wanted is not None and (found := record.public().get("app_version")) != wanted:
            found = found or "None (its run_daemon has no app_version)"
            text = f"the running daemon {self.name!r} has version {found}, not {wanted}"
            if self.start_options.get("on_mismatch") == "restart":
                raise WrongVersion(text)
            raise IncompatibleDaemon(f"{text}: restart it, or use that version")
        return record

    def check_in(self, state: State, link: Link) -> None:
        """Make a link idle, or close it. The caller holds the guard."""
        # Only a link without an outstanding reply: a late one would be taken for the reply to the next request.
        is_idle = link.protocol.state == IDLE and not link.protocol.buffered
        if is_idle and not state.closed and len(state.idle) < self.max_idle:
            state.idle.append(link)
        else:
            # Under the guard: otherwise an abort may hit a descriptor that has been reused.
            link.connection.close()


class IO:
    """The blocking I/O of an exchange. Raises the errors of `_transport`."""

    async def connect(self, address: str, deadline: float) -> Connection:
        return _transport.connect(address, deadline)

    async def send(self, connection: Connection, chunks: list[bytes]) -> None:
        connection.send(chunks)

    async def receive(self, connection: Connection, limit: int) -> bytes:
        return connection.receive(limit)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a blocking function."""
        return function()

    def check(self, record: records.Record) -> None:
        """Raise `RuntimeError` if waiting for this daemon would deadlock."""
        if record.pid == os.getpid() and serving_threads.get(record.address) == threading.get_ident():
            raise RuntimeError(
                f"a blocking call to the daemon {record.name!r} in the thread of its own event loop would deadlock: use "
                "`await aconnect_daemon(...)`, or run the call in a thread with `await asyncio.to_thread(...)`"
            )


BLOCKING = IO()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a blocking coroutine waited")
