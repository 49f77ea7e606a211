"""What the README shows is run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness_ipc import errors, ping, request
from tests.marks import needs_network, needs_posix
from tests.processes import PATIENCE, spawn_python, wait_until

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", _README, re.DOTALL))
_COMMANDS = dict(re.findall(r"<!-- (\w+) -->\n```sh\n(.*?)```", _README, re.DOTALL))


@pytest.fixture
def snippets(tmp_path: Path) -> Path:
    for name, text in _FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def _run(script: Path) -> str:
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_every_python_block_is_a_file_that_a_test_runs() -> None:
    assert _README.count("```python") == len(_FILES)
    assert sorted(_FILES) == ["ask.py", "careful.py", "embedded.py", "index.py", "service.py", "wire.py"]
    assert sorted(_COMMANDS) == ["demo", "tests"]
    assert _README.count("```sh") == len(_COMMANDS)


def test_a_server_and_a_client_have_under_fifteen_lines() -> None:
    for name in ("service.py", "ask.py"):
        assert len(_FILES[name].splitlines()) < 15


def test_the_service_its_client_and_a_client_of_the_standard_library_alone(snippets: Path) -> None:
    with spawn_python(str(snippets / "service.py")) as daemon:
        wait_until(lambda: ping("words"))
        assert _run(snippets / "ask.py") == "4\n"
        assert "harness_ipc" not in re.sub("harness-ipc/1", "", _FILES["wire.py"])
        assert _run(snippets / "wire.py") == "{'result': 3}\n"
        assert request("words", {"meta": "shutdown"}) == {"shutdown": True}
        assert daemon.wait() == 0


def test_the_object_app(snippets: Path) -> None:
    with spawn_python(str(snippets / "index.py")) as daemon:
        wait_until(lambda: ping("index"))
        reply = request("index", {"params": {"word": "fox"}})
        assert reply["result"] is True
        assert reply["asked_by"] in (os.getpid(), None)
        assert request("index", {"meta": "health"}) == {"health": {"words": 2}}
        if sys.platform != "win32":
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0


def test_the_embedded_server(snippets: Path) -> None:
    assert _run(snippets / "embedded.py") == "{'text': 'hello'}\n"


def test_the_careful_client(snippets: Path) -> None:
    assert _run(snippets / "careful.py").startswith("start it: no daemon 'nobody' is running")


def test_the_table_of_errors_is_complete() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", _README, re.MULTILINE))
    leaves = {error.__name__: error for error in errors.HarnessIPCError.__subclasses__()}
    assert rows.keys() == leaves.keys()
    for name, builtin in rows.items():
        assert builtin in [base.__name__ for base in leaves[name].__mro__]


@needs_posix
@needs_network
def test_the_set_up_command_on_a_fresh_checkout(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "harness_ipc"):
        source = _ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    # `python3` is the interpreter under test, found as a user's is.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        ["/bin/sh", "-c", _COMMANDS["demo"]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing: no process, no file" in result.stdout
    assert "dropped after" in result.stdout
