"""Every test has a runtime and a log directory of its own, and sees that nothing is left in them."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them, and all that they start, ignore what Ctrl-C sends.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def private_directories(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the package at a short new directory: pytest's own tmp_path may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="hi-", ignore_cleanup_errors=os.name == "nt") as directory:
        base = Path(directory)
        monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(base / "run"))
        monkeypatch.setenv("HARNESS_IPC_LOG_DIR", str(base / "log"))
        monkeypatch.delenv("HARNESS_IPC_NAME", raising=False)
        yield base
