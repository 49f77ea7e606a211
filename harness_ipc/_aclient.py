"""The client for coroutines: the running loop watches its sockets while they are waited for; on Windows threads block."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._aio import Turns
from ._blocking import blocking, run
from ._calls import Items, call_message, check_request, result_of
from ._exchange import Exchange
from ._protocol import messages
from ._transport import deadline_after
from ._workers import Workers
from .client import CONNECT_TIMEOUT, REQUEST_TIMEOUT, START_TIMEOUT, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from types import TracebackType
    from typing import Literal, Self

    from ._exchange import IO
    from ._pool import Start
    from ._protocol.messages import Message
    from ._registry.namespace import Namespace
    from .errors import RemoteError

# None where threads block: a loop can't watch a pipe that it did not open.
_LOOP_IO: IO | None = None
if sys.platform != "win32":
    from ._aio import LoopIO

    _LOOP_IO = LoopIO()


async def aconnect_daemon(
    name: str,
    *,
    start: Start | None = None,
    start_timeout: float = START_TIMEOUT,
    version: str | None = None,
    on_mismatch: Literal["error", "restart"] = "error",
    errors: Iterable[type[RemoteError]] = (),
    timeout: float = CONNECT_TIMEOUT,
    request_timeout: float = REQUEST_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    namespace: Namespace | None = None,
) -> AsyncClient:
    """Connect as `connect_daemon` does, without blocking the event loop."""
    deadline = deadline_after(timeout)
    client = AsyncClient(
        Client(
            name,
            start=start,
            start_timeout=start_timeout,
            version=version,
            on_mismatch=on_mismatch,
            errors=errors,
            timeout=timeout,
            request_timeout=request_timeout,
            max_message=max_message,
            namespace=namespace,
        )
    )
    try:
        exchange = client._exchange(None, deadline)
        await client._run(exchange, exchange.only_reply)
    except BaseException:
        # Not waited for: a caller that cancels this wants it to end.
        client._begin_close()
        raise
    return client


class AsyncClient:
    """A `Client` for coroutines, made by `aconnect_daemon`, for any number of tasks at once and in any event loop.

    At most 64 calls run at once in one loop; more wait in order. Streams don't count. A cancelled call closes its connection.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()
        self._workers = Workers()

    @property
    def pid(self) -> int:
        """See `Client.pid`."""
        return self._client.pid

    @property
    def generation(self) -> str:
        """See `Client.generation`."""
        return self._client.generation

    @property
    def app_version(self) -> str | None:
        """See `Client.app_version`."""
        return self._client.app_version

    async def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """See `Client.request`; the timeout also counts the wait for a turn where 64 calls run."""
        return await self._ask(check_request(message), self._client.deadline_for(timeout))

    async def call(
        self,
        method: str,
        params: Message | None = None,
        /,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `Client.call`."""
        deadline = self._client.deadline_for(timeout)
        message = call_message(method, params, kwargs, deadline, more=on_progress is not None)
        if on_progress is None:
            return result_of(await self._ask(message, deadline), self._client._pool.error_classes)
        async with AsyncStream(self._exchange(message, deadline), None, self._run) as stream:
            async for item in stream:
                on_progress(item)
        return stream.result

    def stream(
        self, method: str, params: Message | None = None, /, *, timeout: float | None = None, **kwargs: Any
    ) -> AsyncStream:
        """Return an asynchronous iterator over the items: see `Client.stream`.

        ```python
        async with client.stream("reindex", folder="src") as progress:
            async for item in progress:
                print(item)
        ```
        """
        timeout = self._client.request_timeout if timeout is None else timeout
        deadline = deadline_after(timeout)
        message = call_message(method, params, kwargs, deadline, more=True)
        return AsyncStream(self._exchange(message, deadline), timeout, self._run)

    async def close(self) -> None:
        """See `Client.close`. It returns when the connections are closed and threads, if there were any, have ended."""
        self._begin_close()
        await self._workers.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _begin_close(self) -> None:
        self._client.close()
        self._workers.close()

    def _exchange(self, message: Message | None, deadline: float) -> Exchange:
        return Exchange(self._client._pool, _LOOP_IO or blocking, message, deadline)

    async def _ask(self, message: Message, deadline: float) -> Message:
        loop = asyncio.get_running_loop()
        if (turns := self._turns.get(loop)) is None:
            turns = self._turns[loop] = Turns()
        await turns.take(deadline)
        try:
            exchange = self._exchange(message, deadline)
            return await self._run(exchange, exchange.only_reply)
        finally:
            turns.give_back()

    async def _run(self, exchange: Exchange, receive: Callable[[], Coroutine[Any, Any, Message]]) -> Message:
        """Return what `receive`, a method of `exchange`, does. When this is cancelled, the exchange ends at once."""
        if _LOOP_IO is not None:
            return await receive()
        if self._workers.pid != os.getpid():
            # Threads don't survive a fork.
            self._workers = Workers()
        try:
            return await self._workers.run(lambda: run(receive()))
        except asyncio.CancelledError:
            exchange.cancel()
            raise


class AsyncStream(Items):
    """The items of a stream: an asynchronous iterator and context manager. Made by `AsyncClient.stream`.

    `result` is the final result once there are no more items: None for a method that yields.
    """

    def __init__(self, exchange: Exchange, timeout: float | None, run: Callable[..., Coroutine[Any, Any, Message]]) -> None:
        super().__init__(exchange, timeout)
        self._run = run

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._may_begin() and self._has_item(await self._run(self._exchange, self._exchange.reply)):
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
