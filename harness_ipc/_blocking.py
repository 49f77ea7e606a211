"""The blocking driver: the I/O of an exchange, and a stream over one. It decides nothing."""

from __future__ import annotations

import os
import threading

from . import _transport
from ._calls import Items

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Any, Self, TypeVar

    from ._registry.records import Record
    from ._transport import Connection

    T = TypeVar("T")


class Stream(Items):
    """The items of a stream: an iterator, and a context manager that closes it. Made by `Client.stream`, for one thread.

    `result` is the final result once there are no more items: None for a method that yields.
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._may_begin() and self._has_item(run(self._exchange.reply())):
            return self._item
        raise StopIteration

    def close(self) -> None:
        """End the stream, and its connection if items are left. Closing twice is no error."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


class BlockingIO:
    """The `IO` of `Client`: each coroutine blocks, and never waits in a loop."""

    async def connect(self, address: str, deadline: float) -> Connection:
        return _transport.connect(address, deadline)

    async def send(self, connection: Connection, chunks: list[bytes]) -> None:
        connection.send(chunks)

    async def receive(self, connection: Connection, limit: int) -> bytes:
        return connection.receive(limit)

    async def run(self, function: Callable[[], T]) -> T:
        return function()

    def check(self, record: Record) -> None:
        serving = _transport.serving_threads
        if serving and record.pid == os.getpid() and serving.get(record.address) == threading.get_ident():
            raise RuntimeError(
                f"a blocking call to the daemon {record.name!r} in the thread of its own event loop would wait for itself: use "
                "`await aconnect_daemon(...)`, or run the call in a thread with `await asyncio.to_thread(...)`"
            )


blocking = BlockingIO()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a blocking coroutine waited")
