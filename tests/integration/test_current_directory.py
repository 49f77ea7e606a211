"""No command imports a module from the current directory, except the app that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness_ipc import log_path, stop_daemon
from harness_ipc._registry import processes
from tests.support.planted import PlantedModules, imported_names
from tests.support.processes import PATIENCE, run_python, spawn_python

APP = """
async def handle(message):
    if message.get("method") == "raise":
        raise LookupError("as told")
    import sibling  # not before it is needed
    return {"result": sibling.VALUE}
"""
# Seconds for a command. The demo's requests take about ten, and minutes on an overloaded machine.
TOUR = 5 * PATIENCE
# The script that pip creates for an entry point.
SCRIPT = "import sys\nfrom harness_ipc.cli import main\nsys.exit(main())\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory: an app, and a sibling that it imports."""
    directory = tmp_path / "checkout"
    directory.mkdir()
    (directory / "app.py").write_text(APP, encoding="utf-8")
    (directory / "sibling.py").write_text("VALUE = 42\n", encoding="utf-8")
    monkeypatch.chdir(directory)
    yield directory
    stop_daemon("default")


@pytest.fixture
def planted(checkout: Path) -> PlantedModules:
    return PlantedModules(checkout, imported_names())


@pytest.fixture
def command(tmp_path: Path) -> str:
    """The installed command."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "harness-ipc"
    script.write_text(SCRIPT, encoding="utf-8")
    return str(script)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=TOUR,
    )


# Commands in this order, and their exit statuses. What the doctor finds depends on the machine.
COMMANDS: list[tuple[list[str], int | None]] = [
    (["--nonsense"], 2),
    (["start", "nosuchmodule:app"], 6),
    (["start", "app:handle"], 0),
    (["start", "app:handle"], 0),
    (["call", '{"method": "raise"}'], 1),
    (["call", "{nonsense"], 2),
    (["ping"], 0),
    (["status"], 0),
    (["list"], 0),
    (["logs"], 0),
    (["doctor"], None),
    (["restart"], 0),
    (["stop"], 0),
]


@pytest.mark.timeout(2 * TOUR)
def test_no_command_imports_a_planted_module(planted: PlantedModules, command: str) -> None:
    for words, status in COMMANDS:
        done = run(command, *words)
        assert planted.imported() == [], words
        assert status in (None, done.returncode), (words, done.stderr)


@pytest.mark.timeout(2 * TOUR)
def test_the_tour_succeeds_leaves_nothing_and_imports_no_planted_module(
    planted: PlantedModules, command: str, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = private_directories / "t"
    temporary.mkdir()
    for variable in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(variable, str(temporary))
    shown = run(command, "demo", "--json")
    assert planted.imported() == []
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["ok"] is True
    assert report["requests"] == 3000
    assert report["wrong_replies"] == 0
    assert report["intruder"]["refused"] is report["silent"]["refused"] is True
    assert 0 < report["kept"]["p50_ms"] <= report["kept"]["p99_ms"]
    assert "3000 requests from 4 processes answered" in shown.stderr
    assert list(temporary.iterdir()) == []


def test_an_installed_app_is_found_before_the_current_directory(planted: PlantedModules, command: str) -> None:
    assert run(command, "start", "harness_ipc.demo:handle").returncode == 0
    called = run(command, "call", '{"params": 1}')
    assert (json.loads(called.stdout), planted.imported()) == ({"result": 1}, [])


def test_serve_in_the_foreground_imports_no_planted_module(planted: PlantedModules, command: str) -> None:
    with spawn_python(command, "serve", "app:handle") as daemon:
        assert daemon.read_line().startswith("default: pid ")
        assert json.loads(run(command, "call", "{}").stdout) == {"result": 42}
        assert run(command, "stop").returncode == 0
        assert daemon.wait() == 0
    assert planted.imported() == []


def test_an_app_imports_its_siblings_at_any_time(checkout: Path, command: str) -> None:
    assert run(command, "start", "app:handle").returncode == 0
    assert json.loads(run(command, "call", "{}").stdout) == {"result": 42}
    assert run(command, "restart").returncode == 0
    assert json.loads(run(command, "call", "{}").stdout) == {"result": 42}


def test_the_error_for_a_wrong_module_names_its_file(checkout: Path, command: str) -> None:
    (checkout / "json.py").write_text("async def handle(message): return {}\n", encoding="utf-8")
    failed = run(command, "start", "json:handle")
    assert failed.returncode == 6
    assert f"from {json.__file__}: AttributeError" in failed.stderr


def test_as_a_module_it_imports_nothing_from_there_once_it_runs(checkout: Path) -> None:
    """`python -m` puts the current directory on the path, which affects only imports before the command runs."""
    source = "import json, sys, runpy, harness_ipc.__main__; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python("-P", "-c", source).stdout))
    later = {name for name in imported_names() - loaded if name not in sys.builtin_module_names and find_spec(name)}
    assert {"filelock", "platformdirs", "psutil"} <= later
    planted = PlantedModules(checkout, later)
    for words, status in [(["status"], 3), (["list"], 0), (["doctor"], None), (["start", "app:handle"], 0)]:
        done = run("-m", "harness_ipc", *words)
        assert planted.imported() == [], words
        assert status in (None, done.returncode), (words, done.stderr)


def test_the_process_is_identified_without_the_current_directory(planted: PlantedModules, command: str) -> None:
    """Checking the process of a stale record imports psutil."""
    with spawn_python(command, "serve", "app:handle") as daemon:
        assert daemon.read_line().startswith("default: pid ")
        identity = processes.process_identity(daemon.process.pid)
        daemon.process.kill()
        daemon.wait()
    assert identity is None or not processes.is_same_process(identity)
    assert "stale" in run(command, "status").stdout
    assert planted.imported() == []
    assert log_path("default").exists()
