"""The items of a stream, for threads and for coroutines. It imports no asyncio, and does no I/O of its own."""

from __future__ import annotations

from ._pool import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Any, Self

    from ._exchange import Exchange

    # Runs a coroutine function of an exchange, where that is waited for.
    Run = Callable[[Exchange, Callable[[], Coroutine[Any, Any, bool]]], Coroutine[Any, Any, bool]]


class _Items:
    """Where a stream is, its last item, and its result. With `timeout`, each item has as many seconds."""

    def __init__(self, exchange: Exchange, timeout: float | None = None) -> None:
        self.result: Any = None
        self._exchange = exchange
        self._timeout = timeout
        self._item: Any = None
        self._ended = False
        self._receiving = False

    def __del__(self) -> None:
        self._exchange.close()

    async def _advance(self) -> bool:
        """Receive the next item. Return False if there is none: the result is known then. Raises what `call` does."""
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
            # A task, or the frame below a signal handler, that waits for an item closes the connection itself.
            self._exchange.cancel()
        else:
            self._exchange.close()


class Stream(_Items):
    """The items of a stream: an iterator, and a context manager that closes it. Made by `Client.stream`, for one thread.

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
    """The items of a stream: an asynchronous iterator and context manager. Made by `AsyncClient.stream`.

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
