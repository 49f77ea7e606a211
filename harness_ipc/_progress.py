"""What an app reports while it starts: at once to its starter, and once a second in the record, where everybody sees it."""

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

# Seconds between two writes of the record.
_WRITE_INTERVAL = 1.0
# Bytes of one report as JSON: with what goes around it, a pipe of Linux takes it whole or not at all (PIPE_BUF is 4096).
_MAX_REPORT = 4000

_starting: contextvars.ContextVar[StartProgress | None] = contextvars.ContextVar("harness_ipc_start", default=None)


def report_start(value: Any) -> None:
    """Pass `value` on if this task is an app's start, or belongs to it. Raises `ProtocolError` and `MessageTooLarge`."""
    if (progress := _starting.get()) is not None:
        progress.report(value)


class StartProgress:
    """In its block, `report_start` passes values on: `with StartProgress(...)`, in the event loop, around the app's start."""

    def __init__(self, pipe: ReadyPipe, registration: Registration) -> None:
        self._pipe = pipe
        self._registration = registration
        self._value: Any = None
        self._written = -inf
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def report(self, value: Any) -> None:
        """Send `value`, and write it, or the last one of several, when the record may be written again."""
        if self._ended:
            return
        frame = messages.encode({"value": value}, _MAX_REPORT)
        # A copy: the app may change what it has reported.
        self._value = messages.decode(frame)["value"]
        self._pipe.send_progress(self._value)
        wait = self._written + _WRITE_INTERVAL - time.monotonic()
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
        # Tasks that the start has left behind may go on to report.
        self._ended = True
        self._cancel()
