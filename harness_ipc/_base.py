"""What the two transports share: peer credentials, the arithmetic of a deadline, and the limit of a message."""

from __future__ import annotations

import errno
import time
from collections import namedtuple
from math import inf

from .errors import DaemonTimeout, MessageTooLarge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    class PeerCredentials(NamedTuple):
        """The process id and user id of a peer when it connected; None where the kernel does not tell."""

        pid: int | None
        uid: int | None

else:
    # typing costs a client 2 ms to import.
    PeerCredentials = namedtuple("PeerCredentials", "pid uid")


# What this process, or the whole system, has run out of: descriptors, memory, buffers.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

# Seconds; poll(2) and Windows' waits take milliseconds in 31 bits. Whoever waits longer waits for ever.
_LONGEST_WAIT = 2_000_000.0


def deadline_after(timeout: float) -> float:
    """Return the monotonic time `timeout` seconds from now, or infinity if that is more than three weeks away.

    Raises `ValueError` unless it is a number of seconds >= 0.
    """
    if not timeout >= 0:
        raise ValueError(f"a timeout is a number of seconds from 0 to infinity, not {timeout!r}")
    return time.monotonic() + timeout if timeout < _LONGEST_WAIT else inf


def remaining(deadline: float) -> float:
    """Return the seconds left until `deadline`. Raises `DaemonTimeout` when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DaemonTimeout("the deadline passed")
    return seconds


def check_size(size: int, limit: int | None) -> None:
    """Raise `MessageTooLarge` if the peer's message of `size` bytes is above `limit`, if there is one."""
    if limit is not None and size > limit:
        raise MessageTooLarge(
            f"the peer sent a message of {size} bytes, above the limit of {limit} bytes: raise max_message on both sides",
            size=size,
            limit=limit,
        )
