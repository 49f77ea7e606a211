"""The descriptors of this process: closed in forked children, opened for the standard streams, and their limit.

Forked workers that kept a killed daemon's sockets and lock would block its clients and its successor.
"""

from __future__ import annotations

import contextlib
import os
import sys

# Not weakref, which takes each client longer to import: threading imports this module anyway.
from _weakrefset import WeakSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Inherited(Protocol):
        def close_inherited(self) -> None:
            """Close the copies in a forked child, without an effect on the parent: no unlock, shutdown or unlink."""


_tracked: WeakSet[Inherited] = WeakSet()


def close_in_child(holder: Inherited) -> None:
    """Call ``holder.close_inherited()`` in each forked child, for as long as `holder` is referenced."""
    _tracked.add(holder)


def _after_fork() -> None:
    for holder in list(_tracked):
        with contextlib.suppress(Exception):
            holder.close_inherited()
    _tracked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def end_child(error: BaseException | None) -> None:
    """End this forked process, with an exit status that fits `error`.

    It must not run the event loop of its parent: the two would share an epoll and a wake-up pipe.
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
    """Open the null device for those of descriptors 0, 1 and 2 that are closed, before a file or a pipe gets their number."""
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
