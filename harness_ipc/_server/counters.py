"""Counters of a daemon's requests."""

from __future__ import annotations

import time


class Counters:
    """Requests to the app: in flight, answered, and answered with an error.

    Written only in the event loop's thread, each atomically; readable in any thread.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests = 0
        self.errors = 0
        self._last_used = time.monotonic()

    def end(self, is_error: bool) -> None:
        """Count a reply."""
        self._last_used = time.monotonic()
        self.in_flight -= 1
        self.requests += 1
        self.errors += is_error

    @property
    def idle(self) -> float:
        """Seconds since the last reply; 0 while a request is in flight."""
        return 0.0 if self.in_flight else time.monotonic() - self._last_used
