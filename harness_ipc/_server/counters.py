"""How much a daemon's handler is used. It knows no request."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class Usage(NamedTuple):
    """Requests in flight, requests answered so far, how many of the answers were errors, and seconds since the last one."""

    in_flight: int
    requests: int
    errors: int
    idle: float


class Counters:
    """How much the handler is used. The channel's own requests don't count. May be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._requests = 0
        self._errors = 0
        self._last_used = time.monotonic()

    def begin(self) -> None:
        """Count a request in flight."""
        with self._lock:
            self._in_flight += 1

    def end(self, is_error: bool) -> None:
        """Count its reply."""
        with self._lock:
            self._in_flight -= 1
            self._requests += 1
            self._errors += is_error
            self._last_used = time.monotonic()

    def usage(self) -> Usage:
        """Return all of it, of one moment."""
        with self._lock:
            idle = 0.0 if self._in_flight else time.monotonic() - self._last_used
            return Usage(self._in_flight, self._requests, self._errors, idle)
