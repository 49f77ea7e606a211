"""Fixtures of the integration tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness_ipc._server.server
from harness_ipc import request
from tests.conftest import set_directories, temporary_directory
from tests.support.managed import end_daemons
from tests.support.marks import needs_posix
from tests.support.processes import DaemonProcess, serves, spawn_daemon, wait_until


@pytest.fixture
def base(private_directories: Path) -> Iterator[Path]:
    """The directory above the runtime directory. The test's daemons are stopped at the end."""
    yield private_directories
    end_daemons(private_directories)


class SharedDaemon:
    """The daemon `test` in directories of its own, for one test after another."""

    def __init__(self) -> None:
        self._running = contextlib.ExitStack()
        self._directory = ""
        self._daemon: DaemonProcess | None = None

    @contextlib.contextmanager
    def lend(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaemonProcess]:
        """Point the package at it. Fail if it is not as it was at the end; the next test then gets a new one."""
        if self._daemon is None:
            self._directory = self._running.enter_context(temporary_directory())
        set_directories(monkeypatch, self._directory)
        if self._daemon is None:
            self._daemon = self._running.enter_context(spawn_daemon("test"))
        try:
            yield self._daemon
            assert serves()
            wait_until(lambda: request("test", {"meta": "ping"})["connections"] == 1)
            assert request("test", {"method": "forget"}) == {"result": None}
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self._daemon = None
        self._running.close()


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[SharedDaemon]:
    shared = SharedDaemon()
    yield shared
    shared.end()


@pytest.fixture
def daemon(shared_daemon: SharedDaemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaemonProcess]:
    """The daemon `test`, which the tests of a module share."""
    with shared_daemon.lend(monkeypatch) as daemon:
        yield daemon


@pytest.fixture(params=[pytest.param("loop", marks=needs_posix), "pump"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with each of the two drivers of connections; on Windows only with the pump."""
    monkeypatch.setattr(harness_ipc._server.server, "USE_PUMP", request.param == "pump")
    return str(request.param)
