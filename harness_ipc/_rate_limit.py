"""A rate limit for log entries that clients can cause: one of each kind in ten seconds, with a count of the suppressed."""

from __future__ import annotations

import logging
import threading
import time
from math import inf

# One entry of a kind is logged in this many seconds.
_PERIOD = 10.0
# The number of kinds to remember; the one that was logged longest ago is evicted.
_MAX_KINDS = 1000


class RateLimitedLogger:
    """A logger that suppresses an entry if one of the same kind was logged in the last ten seconds.

    The next entry of that kind says how many were suppressed. Entries are of the same kind if they have the same unformatted
    message, and their exceptions, if any, the same types and lines of code.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        # When each kind was last logged, and how many entries were suppressed since; the oldest first.
        self._kinds: dict[object, tuple[float, int]] = {}

    def warning(self, message: str, *values: object, error: BaseException | None = None) -> None:
        """Log a warning about `error`, without a traceback."""
        self._log(logging.WARNING, message, values, error)

    def error(self, message: str, *values: object, error: BaseException | None = None) -> None:
        """Log an error about `error`, without a traceback."""
        self._log(logging.ERROR, message, values, error)

    def exception(self, message: str, error: BaseException) -> None:
        """Log an error with the traceback of `error`."""
        self._log(logging.ERROR, message, (), error, traceback=True)

    def _log(
        self, level: int, message: str, values: tuple[object, ...], error: BaseException | None, *, traceback: bool = False
    ) -> None:
        kind = message if error is None else (message, *_lines_of(error))
        now = time.monotonic()
        with self._lock:
            logged_at, suppressed = self._kinds.get(kind, (-inf, 0))
            if now - logged_at < _PERIOD:
                self._kinds[kind] = logged_at, suppressed + 1
                return
            # Reinserted, to keep the order by time.
            self._kinds.pop(kind, None)
            if len(self._kinds) >= _MAX_KINDS:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[kind] = now, 0
        more = f" (and {suppressed} more like this since the last one was logged)" if suppressed else ""
        self._logger.log(level, f"{message}{more}", *values, exc_info=error if traceback else None)


def _lines_of(error: BaseException) -> list[object]:
    """Return the types and lines of code of `error` and its causes; each line once, since the depth of a recursion varies."""
    kinds: dict[object, None] = {}
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        kinds[f"{type(one).__module__}.{type(one).__qualname__}"] = None
        trace = one.__traceback__
        while trace is not None:
            kinds[trace.tb_frame.f_code.co_filename, trace.tb_lineno] = None
            trace = trace.tb_next
        pending.append(one.__cause__ if one.__suppress_context__ else one.__context__)
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions
    return list(kinds)
