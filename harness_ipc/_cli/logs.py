"""The command `harness-ipc logs`."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from .._registry import files
from .._registry.namespace import log_path
from ..errors import ConnectionLost, DaemonNotRunning
from .output import escape

if TYPE_CHECKING:
    import argparse

# Seconds between two reads of a log: no portable call waits for an append.
_LOG_POLL = 0.1


def logs(options: argparse.Namespace) -> int:
    """Print the last lines of a log, and with `-f` what is appended."""
    log = _Log(str(log_path(options.name, namespace=options.namespace)))
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    try:
        data = log.tail(options.lines)
    except FileNotFoundError:
        raise DaemonNotRunning(f"there is no log {log.path}: the daemon {options.name!r} has not been started yet") from None
    while True:
        sys.stdout.write(escape(decoder.decode(data, final=not options.follow).replace("\r\n", "\n")))
        sys.stdout.flush()
        if not options.follow:
            return 0
        time.sleep(_LOG_POLL)
        data = log.appended()


class _Log:
    """A log that a daemon appends to. When it is too long, the daemon copies it to its predecessor and truncates it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._read = 0
        self._predecessor = self._identify_predecessor()

    def tail(self, count: int) -> bytes:
        """Return the last `count` lines."""
        with files.open_log_for_reading(self.path) as file:
            lines = deque(file, count)
            self._read = file.tell()
        return b"".join(lines)

    def appended(self) -> bytes:
        """Return what was appended since the last read, also if the log was truncated meanwhile."""
        data = b""
        # It may be missing, or on Windows locked, for a moment.
        with contextlib.suppress(FileNotFoundError, ConnectionLost), files.open_log_for_reading(self.path) as file:
            if file.seek(0, os.SEEK_END) < self._read:
                data = self._read_rest()
                self._read = 0
            file.seek(self._read)
            data += file.read()
            self._read = file.tell()
        return data

    def _read_rest(self) -> bytes:
        """Return the rest of the log that was moved to a new predecessor."""
        previous, self._predecessor = self._predecessor, self._identify_predecessor()
        if self._predecessor != previous:
            with contextlib.suppress(FileNotFoundError, ConnectionLost), files.open_log_for_reading(f"{self.path}.1") as file:
                file.seek(self._read)
                return file.read()
        return b""

    def _identify_predecessor(self) -> tuple[int, ...]:
        with contextlib.suppress(FileNotFoundError, ConnectionLost):
            return files.file_fingerprint(f"{self.path}.1")
        return ()
