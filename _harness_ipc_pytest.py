"""The pytest fixtures of harness_ipc. Outside the package, which is not imported before a fixture is used."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness_ipc import Namespace
    from harness_ipc.testing import RunningDaemon

# Characters to show of each log: pytest keeps them for all tests.
_LOG_TAIL = 16_384


@pytest.fixture
def ipc_namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """A private `Namespace`, whose daemons end with the test.

    During the test it is the default, also for processes that the test starts, and namespaces of applications are below it. If
    the test fails, the logs of its daemons are shown.
    """
    from harness_ipc.testing import private_namespace

    with private_namespace() as namespace:
        monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", namespace.runtime_dir)
        monkeypatch.setenv("HARNESS_IPC_LOG_DIR", namespace.log_dir)
        try:
            yield namespace
        finally:
            _print_logs(namespace.log_dir)


@pytest.fixture
def ipc_daemon(ipc_namespace: Namespace) -> Iterator[Callable[..., RunningDaemon]]:
    """A function that runs a daemon until the end of the test: `harness_ipc.testing.running`, by default in `ipc_namespace`."""
    from harness_ipc.testing import running

    with contextlib.ExitStack() as stack:

        def run(app: Any, name: str = "test", *, namespace: Namespace | None = None, **options: Any) -> RunningDaemon:
            return stack.enter_context(running(app, name, namespace=namespace or ipc_namespace, **options))

        yield run


def _print_logs(directory: str) -> None:
    """Print the logs: pytest shows them if the test fails."""
    for place, _, files in os.walk(directory):
        for file in sorted(files):
            with open(os.path.join(place, file), encoding="utf-8", errors="backslashreplace") as log:
                print(f"--- {file}\n{log.read()[-_LOG_TAIL:]}")
