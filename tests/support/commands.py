"""Runs the command line in the test's process, for tests of its output."""

from __future__ import annotations

import pytest

from harness_ipc.cli import main


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()
