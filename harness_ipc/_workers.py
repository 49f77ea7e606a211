"""Daemon threads for what blocks: not an executor's, which the interpreter would wait for at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from typing import TYPE_CHECKING

from .errors import ClientClosed, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

# Seconds for an idle thread.
_IDLE_PERIOD = 10.0


class Workers:
    """Threads that are kept for a while when they have run a function. They belong to one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Guards what follows; held for a few instructions. Each put of `_jobs` has one thread that takes it.
        self._guard = threading.RLock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._closed = False
        self._on_end: list[Callable[[], None]] = []

    async def run(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, which goes on if this is cancelled.

        Raises `ResourceExhausted` if no thread can be started, and `ClientClosed`.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def job() -> None:
            outcome: Any
            try:
                outcome, failed = function(), False
            except BaseException as error:
                outcome, failed = error, True
            _settle_from_thread(done, outcome, failed)

        self._submit(job)
        return await done

    def close(self) -> None:
        """Have the threads end when they have run what was submitted."""
        with self._guard:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)
            self._idle = 0

    async def wait_closed(self) -> None:
        """Wait until no thread is left."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._guard:
            if not self._threads:
                return
            self._on_end.append(lambda: _settle_from_thread(ended, None, False))
        await ended

    def _submit(self, job: Callable[[], None]) -> None:
        with self._guard:
            if self._closed:
                raise ClientClosed("this client is closed: connect again")
            if self._idle:
                self._idle -= 1
            else:
                self._threads += 1
                try:
                    threading.Thread(target=self._work, name="harness-ipc-client", daemon=True).start()
                except RuntimeError as error:
                    self._threads -= 1
                    text = f"no thread can be started for the request ({error}): raise the limit of processes (ulimit -u)"
                    raise ResourceExhausted(text) from error
            self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            job()
            del job
            with self._guard:
                if self._closed:
                    break
                self._idle += 1
        with self._guard:
            self._threads -= 1
            callbacks = [] if self._threads else self._on_end
        for callback in callbacks:
            callback()

    def _next_job(self) -> Callable[[], None] | None:
        try:
            return self._jobs.get(timeout=_IDLE_PERIOD)
        except queue.Empty:
            with self._guard:
                if self._idle:
                    self._idle -= 1
                    return None
        # It has just been given to one of those that wait, and there is no other.
        return self._jobs.get()


def _settle_from_thread(done: asyncio.Future[Any], outcome: Any, failed: bool) -> None:
    # A loop that was closed meanwhile has nobody waiting.
    with contextlib.suppress(RuntimeError):
        done.get_loop().call_soon_threadsafe(_settle, done, outcome, failed)


def _settle(done: asyncio.Future[Any], outcome: Any, failed: bool) -> None:
    if not done.done():
        done.set_exception(outcome) if failed else done.set_result(outcome)
