"""Progress of an app's start: sent to the starter at once, and written to the record once a second."""

from __future__ import annotations

import asyncio
import contextvars
import time
from math import inf
from typing import TYPE_CHECKING, Any

from ._protocol import messages

if TYPE_CHECKING:
    from ._registry.lifetime import Registration
    from .startup import ReadyPipe

# Bytes of one report as JSON: with its envelope, a write to a Linux pipe is atomic (PIPE_BUF is 4096).
_MAX_REPORT = 4000

_starting: contextvars.ContextVar[StartProgress | None] = contextvars.ContextVar("harness_ipc_start", default=None)


def report_start(value: Any) -> None:
    """Report `value` if this task is, or was created by, an app's start. Raises `ProtocolError` and `MessageTooLarge`."""
    if (progress := _starting.get()) is not None:
        progress.report(value)


class StartProgress:
    """A context manager, used in the event loop around an app's start, in which `report_start` sends and records values.

    `interval`: seconds between two writes of the record.
    """

    def __init__(self, pipe: ReadyPipe, registration: Registration, *, interval: float = 1.0) -> None:
        self._pipe = pipe
        self._registration = registration
        self._interval = interval
        self._value: Any = None
        self._written = -inf
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def report(self, value: Any) -> None:
        """Send `value`, and write the latest value to the record at most once in an interval."""
        if self._ended:
            return
        frame = messages.encode({"value": value}, _MAX_REPORT)
        # A copy: the app may mutate the value later.
        self._value = messages.decode(frame)["value"]
        self._pipe.send_progress(self._value)
        wait = self._written + self._interval - time.monotonic()
        if wait <= 0:
            self._write()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._write)

    def _write(self) -> None:
        self._cancel()
        self._written = time.monotonic()
        self._registration.report(self._value)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> None:
        self._token = _starting.set(self)

    def __exit__(self, *_: object) -> None:
        _starting.reset(self._token)
        # Background tasks of the app may still report.
        self._ended = True
        self._cancel()
