"""Daemon threads for blocking calls: the interpreter would wait for those of an executor at exit."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from .errors import ClientClosed, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

    Jobs = queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]

# Idle threads to keep.
_MAX_IDLE = 8


class Workers:
    """Threads of one process, named `name`. At most 8 are kept idle; the most recently used is used first."""

    def __init__(self, name: str = "harness-ipc-client") -> None:
        self._name = name
        self.pid = os.getpid()
        # Guards the fields below; held for a few instructions.
        self._guard = threading.RLock()
        self._closed = False
        self._idle: list[Jobs] = []
        # One per thread, done when it has ended.
        self._ends: set[Future[None]] = set()

    async def run(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, which continues if this is cancelled.

        Raises `ResourceExhausted` if no thread can be started, and `ClientClosed`.
        """
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()
        with self._guard:
            if self._closed:
                raise ClientClosed("this client is closed: connect again")
            jobs = self._idle.pop() if self._idle else self._start()
            jobs.put((function, done))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Tell the threads to end after their current functions."""
        with self._guard:
            self._closed = True
            while self._idle:
                self._idle.pop().put(None)

    async def wait_closed(self) -> None:
        """Wait until all threads have ended."""
        with self._guard:
            ends = [asyncio.wrap_future(end) for end in self._ends]
        await asyncio.gather(*ends)

    def _start(self) -> Jobs:
        jobs: Jobs = queue.SimpleQueue()
        end: Future[None] = Future()
        end.set_running_or_notify_cancel()
        try:
            threading.Thread(target=self._work, args=(jobs, end), name=self._name, daemon=True).start()
        except RuntimeError as error:
            text = f"no thread can be started for the request ({error}): raise the limit of processes (ulimit -u)"
            raise ResourceExhausted(text) from error
        self._ends.add(end)
        return jobs

    def _work(self, jobs: Jobs, end: Future[None]) -> None:
        is_kept = True
        while is_kept and (job := jobs.get()) is not None:
            function, done = job
            try:
                result = function()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
                del result
            del job, function, done
            with self._guard:
                is_kept = not self._closed and len(self._idle) < _MAX_IDLE
                if is_kept:
                    self._idle.append(jobs)
        with self._guard:
            self._ends.discard(end)
        end.set_result(None)
