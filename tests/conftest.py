"""Each test has its own runtime and log directory, which is removed with its content."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that starts the tests in the background makes them ignore SIGINT, and nohup makes them ignore SIGHUP; child processes
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform != "win32":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the needs (see `tests.support.marks`) that were not met, and the number of skipped tests."""
    needs: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        needs[reason.removeprefix("Skipped: ").partition(":")[0]] += 1
    if needs:
        counts = ", ".join(f"{need} {count}" for need, count in needs.most_common())
        terminalreporter.write_line(f"skipped because these are missing: {counts}")


@pytest.fixture(autouse=True)
def private_directories(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the package at a short new directory: pytest's own tmp_path may be too long for a socket."""
    with temporary_directory() as directory:
        yield set_directories(monkeypatch, directory)


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Make a directory with a short name."""
    return tempfile.TemporaryDirectory(prefix="hi-", ignore_cleanup_errors=os.name == "nt")


def set_directories(monkeypatch: pytest.MonkeyPatch, directory: str) -> Path:
    """Point the package, in this process and in those that it starts, at `directory`; return that."""
    base = Path(directory)
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(base / "run"))
    monkeypatch.setenv("HARNESS_IPC_LOG_DIR", str(base / "log"))
    monkeypatch.delenv("HARNESS_IPC_NAME", raising=False)
    return base
