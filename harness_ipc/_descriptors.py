"""A process's descriptors: which ones its forked children must not keep, which ones it must have, and how many it may have.

A killed daemon's clients and successors would wait for workers that have its sockets and its lock.
"""

from __future__ import annotations

import contextlib
import os
import sys

# The module of `weakref.WeakSet`, which threading has imported: weakref itself would cost each client its import.
from _weakrefset import WeakSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Inherited(Protocol):
        def close_inherited(self) -> None:
            """Close a forked child's copies. The parent's must stay as they are: no unlock, no shutdown, no unlink."""


_tracked: WeakSet[Inherited] = WeakSet()


def close_in_child(holder: Inherited) -> None:
    """Have each child that this process forks call ``holder.close_inherited()``, for as long as `holder` is referenced."""
    _tracked.add(holder)


def _after_fork() -> None:
    for holder in list(_tracked):
        with contextlib.suppress(Exception):
            holder.close_inherited()
    _tracked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def end_child(error: BaseException | None) -> None:
    """End this process, which was forked, as `error` says.

    It must not go on with the event loop of its parent: both would change what one epoll watches, and read one wake-up pipe.
    """
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        import logging

        logging.getLogger(__name__).error("a forked process failed", exc_info=error)
        status = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status & 0xFF)


def open_standard_streams() -> None:
    """Open those of descriptors 0, 1 and 2 that are closed on the null device, before a file or a pipe gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(opened, number)
                os.close(opened)
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one, where the system has one."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS refuses more than OPEN_MAX, which is 10240 (setrlimit(2)).
        for limit in (hard, max(soft, 10240)):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return
