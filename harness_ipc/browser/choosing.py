"""One daemon at a time takes a page of a browser that is not its own: the next one sees that the page is attached to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import filelock

from harness_ipc import runtime_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

logger = logging.getLogger(__name__)

# Seconds after which another daemon that has not chosen yet, such as one that is suspended, is not waited for any longer.
_PATIENCE = 10.0
# Seconds between two looks at the lock.
_POLL = 0.01


@contextlib.asynccontextmanager
async def alone() -> AsyncIterator[None]:
    """Have no other daemon of this user choose a page within the block."""
    lock = filelock.FileLock(runtime_path("harness-browser", "choosing"), mode=0o600, thread_local=False)
    try:
        async with asyncio.timeout(_PATIENCE):
            await _acquire(lock)
    except TimeoutError:
        logger.warning("another daemon has been choosing a page for %g s: both may have the same one", _PATIENCE)
    try:
        yield
    finally:
        lock.release()


async def _acquire(lock: filelock.BaseFileLock) -> None:
    while True:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            await asyncio.sleep(_POLL)
        else:
            return
