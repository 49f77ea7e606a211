"""Runs a command line in the test's process, for tests of its output."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Callable, Sequence

from harness_ipc import cli


def run_command(*arguments: str, main: Callable[[Sequence[str]], int] = cli.main) -> subprocess.CompletedProcess[str]:
    """Return what a process of the command with these arguments returns."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    for stream in streams:
        stream.seek(0)
    return subprocess.CompletedProcess(arguments, status, *(stream.read() for stream in streams))
