"""What all connections share: peer credentials, the arithmetic of a deadline, and the error of a connection that broke."""

from __future__ import annotations

import time
from collections import namedtuple
from math import inf

from ..errors import ConnectionLost, DaemonTimeout

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

# The threads of this process whose event loop serves an address: a blocking call from there would wait for itself.
serving_threads: dict[str, int] = {}

# Seconds; poll(2) and Windows' waits take milliseconds in 31 bits. Longer timeouts are treated as infinite.
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


def lost(error: OSError) -> ConnectionLost:
    """Return the one error for the many ways in which a socket or a pipe breaks."""
    return ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}")
