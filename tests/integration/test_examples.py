"""The examples, each copied and run unchanged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from harness_ipc import DaemonStatus, daemon_status, list_daemons, stop_daemon
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, spawn_python, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("ipc_namespace")


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    (tmp_path / "examples").mkdir()
    for file in EXAMPLES.glob("*.py"):
        shutil.copyfile(file, tmp_path / "examples" / file.name)
    return tmp_path / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The current directory of the caller."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def run(script: Path, *arguments: str, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, "-W", "error", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)


def only_daemon() -> DaemonStatus:
    [status] = list_daemons()
    return status


def wait_until_idle(name: str) -> None:
    """Wait until no request is in flight, apart from the status request itself."""
    wait_until(lambda: bool(daemon_status(name).idle))


def test_examples_have_the_documented_length() -> None:
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in EXAMPLES.glob("*.py")}
    assert lengths.keys() == {"formatter.py", "index.py", "web.py"}
    assert lengths["formatter.py"] <= 45
    assert lengths["index.py"] <= 50
    assert lengths["web.py"] <= 45


# The formatter.


def test_the_formatter_works_where_its_caller_is(examples: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "good.json").write_text('{"a": 1}')
    (folder / "bad.json").write_text("{")
    check = run(examples / "formatter.py", "--check", "good.json", cwd=folder)
    assert (check.returncode, check.stdout, check.stderr) == (1, "would reformat good.json\n", "")
    relative = os.path.join("folder", "good.json")
    done = run(examples / "formatter.py", relative, os.path.join("folder", "bad.json"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, f"reformatted {relative}\n")
    assert done.stderr.startswith(os.path.join("folder", "bad.json") + ": Expecting property name")
    assert (folder / "good.json").read_text() == '{\n    "a": 1\n}\n'
    again = run(examples / "formatter.py", "--check", "good.json", cwd=folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert only_daemon().requests == 3


@needs_posix
def test_ctrl_c_ends_the_formatters_work_in_the_daemon(examples: Path, folder: Path) -> None:
    text = json.dumps(list(range(10_000)))
    files = [folder / f"{number}.json" for number in range(300)]
    for file in files:
        file.write_text(text)
    command = [sys.executable, str(examples / "formatter.py"), *(file.name for file in files)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
        wait_until(lambda: files[0].stat().st_size > len(text))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == -signal.SIGINT
    wait_until_idle(only_daemon().name)
    assert files[-1].stat().st_size == len(text)


def test_a_new_version_of_the_formatter_replaces_the_daemon(examples: Path, folder: Path) -> None:
    script = examples / "formatter.py"
    (folder / "a.json").write_text("{}\n")
    assert run(script, "a.json", cwd=folder).returncode == 0
    first = only_daemon()
    script.write_text(script.read_text().replace('VERSION = "1"', 'VERSION = "2"'))
    assert run(script, "a.json", cwd=folder).returncode == 0
    second = only_daemon()
    assert [first.app_version, second.app_version] == ["1", "2"]
    assert first.name == second.name
    assert first.pid != second.pid


@needs_posix
def test_two_virtual_environments_have_a_formatter_each(examples: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "a.json").write_text("{}\n")
    other = tmp_path / "other"
    venv.create(other, symlinks=True)
    # Make the packages of this environment importable there.
    [packages] = other.glob("lib/python*/site-packages")
    (packages / "this.pth").write_text("\n".join(filter(os.path.isabs, sys.path)))
    for python in (sys.executable, str(other / "bin" / "python"), sys.executable):
        assert run(examples / "formatter.py", "a.json", cwd=folder, python=python).returncode == 0
    assert sorted(status.requests or 0 for status in list_daemons()) == [1, 2]


# The index.


def test_the_index_searches_adds_removes_and_counts(examples: Path, folder: Path) -> None:
    def ask(*arguments: str) -> Any:
        done = run(examples / "index.py", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    (folder / "a.txt").write_text("the quick brown fox")
    (folder / "b.txt").write_text("the lazy dog")
    ask("add", "a.txt")
    assert ask("search", "fox") == str([str(folder / "a.txt")])
    assert run(examples / "index.py", "reindex", ".", cwd=folder).stderr.splitlines() == ["1 of 2", "2 of 2"]
    assert ask("stats") == str({"files": 2, "words": 6})
    assert ask("remove", "b.txt") == "True"
    assert ask("search", "dog") == "[]"


def test_a_reindex_ends_with_its_caller(examples: Path, folder: Path) -> None:
    for number in range(3000):
        (folder / f"{number}.txt").write_text("fox")
    command = [sys.executable, str(examples / "index.py"), "reindex", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as caller:
        assert caller.stderr is not None
        assert caller.stderr.readline() == "1 of 3000\n"
        caller.kill()
    wait_until_idle("index")
    assert "'files': 3000," not in run(examples / "index.py", "stats", cwd=folder).stdout


# The web application.


def test_the_web_application_asks_the_daemon_and_starts_it(examples: Path, folder: Path) -> None:
    with spawn_python(str(examples / "web.py"), "0") as server:
        url = server.read_line()

        def get(query: str) -> Any:
            with urlopen(f"{url}?{query}", timeout=PATIENCE) as response:
                return json.load(response)

        assert get("word=fox") == []
        (folder / "a.txt").write_text("the quick brown fox")
        run(examples / "index.py", "add", "a.txt", cwd=folder)
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(get, ["word=fox"] * 64)) == [[str(folder / "a.txt")]] * 64
        with pytest.raises(HTTPError, match="400") as caught:
            get("wort=fox")
        assert "word" in json.load(caught.value)["error"]
        stop_daemon("index")
        assert get("word=fox") == []
