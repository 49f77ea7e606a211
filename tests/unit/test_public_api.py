"""The public names of the package, and its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import harness_ipc
from tests.support import scripted

ROOT = Path(harness_ipc.__file__).parents[1]
# Modules that clients don't need: each takes milliseconds of every short-lived process.
HEAVY = {
    *("asyncio", "dataclasses", "filelock", "logging", "multiprocessing", "pathlib", "platformdirs", "psutil", "subprocess"),
    *("tempfile", "typing"),
}
# Their own imports depend on the Python version.
GIVEN = "import hmac, json, socket, sys, threading; given = set(sys.modules)"
MODULES = "sorted(set(sys.modules) - given)"


def run_fresh(expression: str, module: str, directory: Path) -> Any:
    """Import `module` in a new interpreter, with warnings as errors and without site, and return `expression`."""
    source = f"{GIVEN}; sys.path.insert(0, {str(ROOT)!r}); import {module}; print(json.dumps({expression}))"
    environment = {**os.environ, "HOME": str(directory), "TMPDIR": str(directory), "XDG_RUNTIME_DIR": str(directory)}
    command = [sys.executable, "-I", "-S", "-B", "-W", "error", "-c", source]
    run = subprocess.run(
        command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60, check=True
    )
    return json.loads(run.stdout)


def test_every_public_name_is_there() -> None:
    assert [name for name in harness_ipc.__all__ if not hasattr(harness_ipc, name)] == []
    assert list(harness_ipc.__all__) == sorted(set(harness_ipc.__all__))
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = harness_ipc.nonesuch


def test_every_public_error_is_exported() -> None:
    leaves = {leaf.__name__ for leaf in harness_ipc.HarnessIPCError.__subclasses__()}
    assert leaves < set(harness_ipc.__all__)


LIGHT = ["harness_ipc", *(f"harness_ipc.{name}" for name in ("client", "_registry.records", "errors", "browser.helpers"))]


@pytest.mark.parametrize("module", LIGHT)
def test_the_import_is_light_and_leaves_no_trace(module: str, tmp_path: Path, private_directories: Path) -> None:
    loaded = run_fresh(MODULES, module, tmp_path)
    assert module in loaded
    assert HEAVY & set(loaded) == set()
    assert list(tmp_path.iterdir()) == []
    assert list(private_directories.iterdir()) == []


def test_looking_for_a_daemon_that_is_not_there_leaves_no_trace(tmp_path: Path, private_directories: Path) -> None:
    found = run_fresh('[harness_ipc.ping("d"), harness_ipc.identify("d")]', "harness_ipc", tmp_path)
    assert found == [False, None]
    assert list(tmp_path.iterdir()) == []
    assert list(private_directories.iterdir()) == []


def test_finding_connecting_and_asking_import_nothing_heavy(tmp_path: Path) -> None:
    with scripted.daemon(scripted.answer_all) as daemon:
        reply, loaded = run_fresh(f'[harness_ipc.request("test", {{"a": 1}}), {MODULES}]', "harness_ipc", tmp_path)
    assert daemon.requests == [{"a": 1}]
    assert reply == {"result": daemon.registration.record.generation}
    assert HEAVY & set(loaded) == set()
