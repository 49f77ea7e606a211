"""The command line run by the test's own process, for tests of what it prints rather than of a process."""

from __future__ import annotations

import pytest

from harness_ipc.cli import main


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit status, and what was written to stdout and stderr."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()
