"""Descriptors that forked children must not keep: a killed daemon's clients and successors would wait for its workers."""

from __future__ import annotations

import contextlib
import os

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
