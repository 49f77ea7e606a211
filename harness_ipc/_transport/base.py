"""Peer credentials, deadlines, and the error for a broken connection."""

from __future__ import annotations

import time
from collections import namedtuple
from math import inf

from ..errors import ConnectionLost, DaemonTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    class PeerCredentials(NamedTuple):
        """The process id and user id of a peer at the time it connected; None if the kernel does not provide them."""

        pid: int | None
        uid: int | None

else:
    # Importing typing would take 2 ms.
    PeerCredentials = namedtuple("PeerCredentials", "pid uid")

# By address, the thread whose event loop serves it: a blocking call to it from there would deadlock.
serving_threads: dict[str, int] = {}

# Seconds. poll(2) and the waits of Windows take milliseconds in 31 bits; longer timeouts are treated as infinite.
_LONGEST_WAIT = 2_000_000.0


def deadline_after(timeout: float) -> float:
    """Return the monotonic time `timeout` seconds from now, or infinity if that is more than three weeks away.

    Raises `ValueError` unless it is a number of seconds >= 0.
    """
    if not timeout >= 0:
        raise ValueError(f"a timeout must be a number of seconds from 0 to infinity, not {timeout!r}")
    return time.monotonic() + timeout if timeout < _LONGEST_WAIT else inf


def remaining(deadline: float) -> float:
    """Return the seconds left until `deadline`. Raises `DaemonTimeout` when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DaemonTimeout("the deadline passed")
    return seconds


def connection_lost(error: OSError) -> ConnectionLost:
    """Return the error for a broken socket or pipe."""
    return ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}")
