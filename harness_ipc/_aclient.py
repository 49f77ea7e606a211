"""The asyncio client: the running event loop waits on its sockets; on Windows, threads do."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from math import inf
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._calls import AsyncStream, call_message, check_request, description_of
from ._exchange import Exchange
from ._pool import BLOCKING, IO, run
from ._protocol import messages
from ._transport import remaining
from ._workers import Workers
from .client import CONNECT_TIMEOUT, REQUEST_TIMEOUT, START_TIMEOUT, Client
from .errors import DaemonTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from types import TracebackType
    from typing import Literal, Self, TypeVar

    from ._pool import Start
    from ._protocol.messages import Message
    from ._registry.namespace import Namespace
    from ._registry.records import Record
    from .errors import RemoteError

    T = TypeVar("T")

# Concurrent calls of one client in one event loop; further calls queue in order.
_MAX_CALLS = 64
# Seconds between attempts to connect while the daemon's accept queue is full: nothing signals that it has room.
_CONNECT_INTERVAL = 0.01
# None where threads do the I/O: an event loop can't watch a pipe that it did not open.
_LOOP_IO: IO | None = None

if sys.platform != "win32":
    from ._transport.dial import Connection, connect_now

    class LoopIO(IO):
        """Waits in the running event loop. A socket is registered only during a wait: an idle one belongs to no loop."""

        async def connect(self, address: str, deadline: float) -> Connection:
            while (connection := connect_now(address)) is None:
                await asyncio.sleep(min(_CONNECT_INTERVAL, remaining(deadline)))
            return connection

        async def send(self, connection: Connection, chunks: list[bytes]) -> None:
            while not connection.send_now(chunks):
                chunks = []
                loop = asyncio.get_running_loop()
                await _wait(connection, loop.add_writer, loop.remove_writer)

        async def receive(self, connection: Connection, limit: int) -> bytes:
            while (data := connection.receive_now(limit)) is None:
                loop = asyncio.get_running_loop()
                await _wait(connection, loop.add_reader, loop.remove_reader)
            return data

        async def run(self, function: Callable[[], T]) -> T:
            workers = Workers()
            try:
                return await workers.run(function)
            finally:
                workers.close()

        def check(self, record: Record) -> None:
            """Do nothing: a coroutine can wait for a daemon that its own loop serves."""

    async def _wait(connection: Connection, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        # By time.monotonic(): an event loop may use another clock.
        seconds = connection.deadline - time.monotonic()
        timer = None if seconds == inf else loop.call_later(max(0.0, seconds), _settle, ready, True)
        descriptor = connection.fileno()
        watch(descriptor, _settle, ready)
        try:
            await ready
        finally:
            unwatch(descriptor)
            if timer is not None:
                timer.cancel()

    def _settle(ready: asyncio.Future[None], is_late: bool = False) -> None:
        if not ready.done():
            ready.set_exception(DaemonTimeout("the deadline passed")) if is_late else ready.set_result(None)

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
        exchange = client._exchange(None, timeout)
        await client._run(exchange, exchange.reply)
    except BaseException:
        # Not awaited: a caller that cancels must not wait.
        client._begin_close()
        raise
    return client


class AsyncClient:
    """A `Client` for coroutines, made by `aconnect_daemon`, for any number of tasks at once and in any event loop.

    At most 64 calls run at once in one loop; more wait in order. Streams don't count. A cancelled call closes its connection.
    """

    def __init__(self, client: Client) -> None:
        self._workers = Workers()
        self._client = client
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    def __del__(self) -> None:
        # Connections close themselves; threads would wait for ever.
        self._workers.close()

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
        """See `Client.request`. The timeout includes the wait while 64 other calls run."""
        return await self._ask(self._exchange(check_request(message), timeout))

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
        timeout = self._client.request_timeout if timeout is None else timeout
        exchange = self._exchange(call_message(method, params, kwargs, timeout, more=on_progress is not None), timeout)
        if on_progress is None:
            return exchange.result_of(await self._ask(exchange))
        async with AsyncStream(self._run, exchange) as stream:
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
        message = call_message(method, params, kwargs, timeout, more=True)
        return AsyncStream(self._run, self._exchange(message, timeout), timeout)

    async def describe(self, *, timeout: float | None = None) -> Message:
        """See `Client.describe`."""
        return description_of(await self.request({"meta": messages.DESCRIBE}, timeout=timeout))

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

    def _exchange(self, message: Message | None, timeout: float | None) -> Exchange:
        timeout = self._client.request_timeout if timeout is None else timeout
        return Exchange(self._client._pool, message, timeout, _LOOP_IO or BLOCKING)

    async def _ask(self, exchange: Exchange) -> Message:
        loop = asyncio.get_running_loop()
        if (slots := self._slots.get(loop)) is None:
            slots = self._slots[loop] = asyncio.Semaphore(_MAX_CALLS)
        if slots.locked():
            try:
                async with asyncio.timeout(None if exchange.deadline == inf else remaining(exchange.deadline)):
                    await slots.acquire()
            except TimeoutError:
                raise DaemonTimeout(
                    f"{_MAX_CALLS} other calls of this client ran until the deadline: use another client, or wait longer"
                ) from None
        else:
            await slots.acquire()
        try:
            return await self._run(exchange, exchange.reply)
        finally:
            slots.release()

    async def _run(self, exchange: Exchange, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `function`, which uses `exchange`, does. When this is cancelled, the exchange ends at once."""
        if _LOOP_IO is not None:
            return await function()
        if self._workers.pid != os.getpid():
            # Threads don't survive a fork.
            self._workers = Workers()
        try:
            return await self._workers.run(lambda: run(function()))
        except asyncio.CancelledError:
            exchange.cancel()
            raise
