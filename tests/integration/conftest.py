"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import harness_ipc._server.server
from tests.support.managed import end_daemons
from tests.support.marks import needs_posix
from tests.support.processes import DaemonProcess, serves, spawn_daemon


@pytest.fixture
def base(private_directories: Path) -> Iterator[Path]:
    """The directory above the runtime directory. The test's daemons are stopped at the end."""
    yield private_directories
    end_daemons(private_directories)


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    """The daemon `test`. It must still serve at the end."""
    with spawn_daemon("test") as daemon:
        yield daemon
        assert serves()


@pytest.fixture(params=[pytest.param("loop", marks=needs_posix), "pump"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with each of the two drivers of connections; on Windows only with the pump."""
    monkeypatch.setattr(harness_ipc._server.server, "USE_PUMP", request.param == "pump")
    return str(request.param)
