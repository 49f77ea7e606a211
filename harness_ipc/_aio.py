"""What `AsyncClient` needs of a loop: the I/O of an exchange, where the loop can watch it, and turns for its calls."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from ._transport import remaining
from ._workers import Workers
from .errors import DaemonTimeout

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from ._registry.records import Record

    T = TypeVar("T")

# Calls of one client at once in one loop; more wait in their order.
_MAX_CALLS = 64
# Seconds until a daemon that has no room for a connection is asked again: nothing announces that it has.
_CONNECT_INTERVAL = 0.01

if sys.platform != "win32":
    from ._transport.dial import Connection, connect_now

    class LoopIO:
        """The `IO` of `AsyncClient`: the running loop watches a socket while it is waited for. Idle ones belong to no loop."""

        async def connect(self, address: str, deadline: float) -> Connection:
            while (connection := connect_now(address)) is None:
                await asyncio.sleep(min(_CONNECT_INTERVAL, remaining(deadline)))
            return connection

        async def send(self, connection: Connection, chunks: list[bytes]) -> None:
            while not connection.send_now(chunks):
                chunks = []
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_writer, loop.remove_writer, connection)

        async def receive(self, connection: Connection, limit: int) -> bytes:
            while (data := connection.receive_now(limit)) is None:
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_reader, loop.remove_reader, connection)
            return data

        async def run(self, function: Callable[[], T]) -> T:
            workers = Workers()
            try:
                return await workers.run(function)
            finally:
                workers.close()

        def check(self, record: Record) -> None:
            """Do nothing: the loop turns while it waits for a daemon of its own."""

        async def _wait(self, watch: Callable[..., object], unwatch: Callable[[int], object], connection: Connection) -> None:
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            timer = expire_at(connection.deadline, ready, DaemonTimeout("the deadline passed"))
            descriptor = connection.fileno()
            watch(descriptor, finish, ready)
            try:
                await ready
            finally:
                unwatch(descriptor)
                if timer is not None:
                    timer.cancel()


class Turns:
    """At most 64 calls at once, in the order in which they came. It belongs to one loop."""

    def __init__(self) -> None:
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, deadline: float) -> None:
        """Wait for a turn. Raises `DaemonTimeout`."""
        if self._running < _MAX_CALLS:
            self._running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        text = f"{_MAX_CALLS} other calls of this client were running until the deadline: use another client, or wait longer"
        timer = expire_at(deadline, turn, DaemonTimeout(text))
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # Not if the deadline has come together with the cancellation.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def give_back(self) -> None:
        """Give the turn to the next one that still waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._running -= 1


def expire_at(deadline: float, future: asyncio.Future[None], error: DaemonTimeout) -> asyncio.TimerHandle | None:
    """Have `future` fail with `error` at `deadline`, a monotonic time."""
    if deadline == inf:
        return None
    return asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), finish, future, error)


def finish(future: asyncio.Future[None], error: DaemonTimeout | None = None) -> None:
    if not future.done():
        future.set_result(None) if error is None else future.set_exception(error)
