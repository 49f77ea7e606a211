"""The client for coroutines: each call blocks in a thread of the client's own, never in the loop's executor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections import deque
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from ._blocking import blocking, run
from ._calls import call_message, check_request, result_of
from ._exchange import Exchange
from ._protocol import messages
from ._transport import deadline_after
from .client import CONNECT_TIMEOUT, REQUEST_TIMEOUT, Client
from .errors import ClientClosed, DaemonTimeout, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ._protocol.messages import Message
    from ._registry.namespace import Namespace

# Calls of one client at once; more wait in their order.
_MAX_THREADS = 64
# Seconds for an idle thread.
_IDLE_PERIOD = 10.0


async def aconnect_daemon(
    name: str,
    *,
    timeout: float = CONNECT_TIMEOUT,
    request_timeout: float = REQUEST_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    namespace: Namespace | None = None,
) -> AsyncClient:
    """Connect as `connect_daemon` does, without blocking the event loop."""
    deadline = deadline_after(timeout)
    client = AsyncClient(
        Client(name, timeout=timeout, request_timeout=request_timeout, max_message=max_message, namespace=namespace)
    )
    try:
        await client._run(None, deadline)
    except BaseException:
        # Not waited for: a caller that cancels this wants it to end.
        client._begin_close()
        raise
    return client


class AsyncClient:
    """A `Client` for coroutines, made by `aconnect_daemon`, for any number of tasks at once and in any event loop.

    At most 64 calls run at once; more wait in order. A cancelled call closes its connection.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._workers = _Workers()

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
        """See `Client.request`; the timeout also counts the wait for a thread where 64 calls run."""
        return await self._run(check_request(message), self._client.deadline_for(timeout))

    async def call(self, method: str, params: Message | None = None, /, *, timeout: float | None = None, **kwargs: Any) -> Any:
        """See `Client.call`."""
        deadline = self._client.deadline_for(timeout)
        return result_of(await self._run(call_message(method, params, kwargs, deadline), deadline))

    async def close(self) -> None:
        """See `Client.close`. It returns when the connections are closed and the threads have ended."""
        self._begin_close()
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._workers.when_ended(partial(_settle_from_thread, ended, None, False))
        await ended

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _begin_close(self) -> None:
        self._client.close()
        self._workers.close()

    async def _run(self, message: Message | None, deadline: float) -> Message:
        if self._workers.pid != os.getpid():
            # Threads don't survive a fork.
            self._workers = _Workers()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Message] = loop.create_future()
        exchange: Exchange | None = None
        cancelled = False

        def job() -> None:
            nonlocal exchange
            outcome: Any
            try:
                exchange = Exchange(self._client._pool, blocking, message, deadline)
                if cancelled:
                    exchange.cancel()
                outcome, failed = run(exchange.reply()), False
            except BaseException as error:
                outcome, failed = error, True
            _settle_from_thread(done, outcome, failed)

        timer = None
        if not self._workers.submit(job) and deadline != inf:
            timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, job, done)
        try:
            return await done
        except asyncio.CancelledError:
            self._workers.discard(job)
            cancelled = True
            if exchange is not None:
                exchange.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _expire(self, job: Callable[[], None], done: asyncio.Future[Any]) -> None:
        # One that runs already keeps its deadline by itself, and knows whether its request may have run.
        if self._workers.discard(job):
            text = (
                f"{_MAX_THREADS} other calls of this client were running until the deadline: use another client, or wait longer"
            )
            _settle(done, DaemonTimeout(text), True)


def _settle_from_thread(done: asyncio.Future[Any], outcome: Any, failed: bool) -> None:
    # A loop that was closed meanwhile has nobody waiting.
    with contextlib.suppress(RuntimeError):
        done.get_loop().call_soon_threadsafe(_settle, done, outcome, failed)


def _settle(done: asyncio.Future[Any], outcome: Any, failed: bool) -> None:
    if not done.done():
        done.set_exception(outcome) if failed else done.set_result(outcome)


class _Workers:
    """Daemon threads that run jobs in order: not an executor's, which the interpreter would wait for at its end."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._guard = threading.RLock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads = 0
        # Threads that wait and that nobody has woken yet, and what wakes one.
        self._idle = 0
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        self._on_end: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> bool:
        """Run `job` in a thread; return False if it waits for one. Raises `ClientClosed` or `ResourceExhausted`."""
        with self._guard:
            if self._closed:
                raise ClientClosed("this client is closed: connect again")
            self._jobs.append(job)
            if self._idle:
                self._idle -= 1
                self._wake.put(None)
            elif self._threads < _MAX_THREADS:
                self._start_thread(job)
            else:
                return False
            return True

    def _start_thread(self, job: Callable[[], None]) -> None:
        self._threads += 1
        try:
            threading.Thread(target=self._work, name="harness-ipc-client", daemon=True).start()
        except RuntimeError as error:
            self._threads -= 1
            self._jobs.remove(job)
            raise ResourceExhausted(
                f"no thread can be started for the request ({error}): raise the limit of processes (ulimit -u)"
            ) from error

    def discard(self, job: Callable[[], None]) -> bool:
        """Return whether `job` had not begun: then it never will."""
        with self._guard:
            try:
                self._jobs.remove(job)
            except ValueError:
                return False
            return True

    def close(self) -> None:
        """Have the threads end when they have run what was submitted."""
        with self._guard:
            self._closed = True
            for _ in range(self._idle):
                self._wake.put(None)
            self._idle = 0

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call `callback` once no thread is left, from whichever thread sees it."""
        with self._guard:
            if self._threads:
                self._on_end.append(callback)
                return
        callback()

    def _work(self) -> None:
        while True:
            with self._guard:
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._closed:
                    break
                self._idle += job is None
            if job is not None:
                job()
                del job
            elif not self._wait():
                break
        self._end_thread()

    def _wait(self) -> bool:
        """Wait for the next job. Return False if there was none for a while."""
        try:
            self._wake.get(timeout=_IDLE_PERIOD)
        except queue.Empty:
            with self._guard:
                if self._idle:
                    self._idle -= 1
                    return False
            # Somebody has just woken one of those that wait, and there is no other.
            self._wake.get()
        return True

    def _end_thread(self) -> None:
        with self._guard:
            self._threads -= 1
            callbacks = [] if self._threads else self._on_end
        for callback in callbacks:
            callback()
