"""A lock for daemons that share a browser: one at a time chooses a page, so that two do not choose the same one."""

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

# Seconds to wait for another daemon, which may be suspended.
_TIMEOUT = 10.0
# Seconds between two attempts to lock.
_POLL_INTERVAL = 0.01


@contextlib.asynccontextmanager
async def exclusive() -> AsyncIterator[None]:
    """Keep other daemons of this user from choosing a page during the block.

    If one of them has been choosing for ten seconds, a warning is logged, and the block runs nevertheless.
    """
    lock = filelock.FileLock(runtime_path("harness-browser", "choosing"), mode=0o600, thread_local=False)
    try:
        async with asyncio.timeout(_TIMEOUT):
            await _acquire(lock)
    except TimeoutError:
        logger.warning("another daemon has been choosing a page for %g s: both may have the same one", _TIMEOUT)
    try:
        yield
    finally:
        lock.release()


async def _acquire(lock: filelock.BaseFileLock) -> None:
    while True:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            await asyncio.sleep(_POLL_INTERVAL)
        else:
            return
