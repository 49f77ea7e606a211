"""Starts a daemon for a client's request. Imported only by a client that starts one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ._pool import WrongVersion
from ._registry import processes, records
from ._registry.namespace import Namespace
from ._start import TERMINATED
from ._transport import remaining
from .errors import DaemonNotRunning, DaemonTimeout, IncompatibleDaemon, StartFailed
from .manager import ensure_daemon, stop_daemon

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._pool import Pool


def start_daemon(pool: Pool, deadline: float) -> float:
    """Start the daemon of `pool`, and return `deadline` extended by the time that the start took.

    The wait for a draining predecessor does not extend it. Raises what `ensure_daemon` or the start function raises.
    """
    assert pool.start is not None
    _wait_for_predecessor(pool, deadline)
    begin = time.monotonic()
    namespace = pool.namespace or Namespace()
    if callable(pool.start):
        _call_start(pool, pool.start, namespace)
    else:
        try:
            ensure_daemon(pool.name, pool.start, **pool.start_options, namespace=namespace)
        except StartFailed as error:
            # Stopped while starting: the caller finds no daemon, as if it had been stopped a moment later.
            if error.type != TERMINATED:
                raise
    return deadline + time.monotonic() - begin


def _call_start(pool: Pool, start: Callable[[], object], namespace: Namespace) -> None:
    try:
        pool.load(again=True)
    except WrongVersion:
        stop_daemon(pool.name, namespace=namespace)
    except DaemonNotRunning:
        pass
    if hasattr(result := start(), "__await__"):
        if hasattr(result, "close"):
            result.close()  # otherwise Python warns that it was never awaited
        raise TypeError(f"start must return once the daemon runs, and returned {type(result).__name__}: use a plain function")
    try:
        pool.load(again=True)
    except DaemonNotRunning as error:
        kind = IncompatibleDaemon if isinstance(error, WrongVersion) else DaemonNotRunning
        raise kind(f"the start function has returned, but {error}") from None


def _wait_for_predecessor(pool: Pool, deadline: float) -> None:
    while True:
        try:
            record = records.read(pool.name, again=True, namespace=pool.namespace)
        except DaemonNotRunning:
            return
        if record.state != records.DRAINING or processes.find_process(record.public()) is None:
            return
        try:
            time.sleep(min(0.01, remaining(deadline)))
        except DaemonTimeout:
            text = f"the daemon {pool.name!r}, pid {record.pid}, was still stopping at the deadline: allow a longer timeout"
            raise DaemonTimeout(text) from None
