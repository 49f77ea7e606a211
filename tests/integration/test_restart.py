"""The start command: checked and kept by a restart, and compared by `ensure_daemon`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from harness_ipc import DaemonStatus, StartFailed, daemon_status, ensure_daemon, request, restart_daemon, stop_daemon
from tests.support.managed import PROGRAM, assert_one_daemon, command, ensure
from tests.support.marks import needs_posix

pytestmark = pytest.mark.usefixtures("base")

RUN = "\nrun_daemon(App(), name)\n"


def script(folder: Path) -> Path:
    path = folder / "service.py"
    path.write_text(PROGRAM + RUN)
    return path


def where() -> list[object]:
    found = request("test", {"method": "where"})["result"]
    assert isinstance(found, list)
    return found


def root() -> str:
    return os.environ["SYSTEMROOT"] if sys.platform == "win32" else "/"


def assert_refused(status: DaemonStatus, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(StartFailed, match=f"was not stopped.*{reason}"):
            restart_daemon("test")
        assert daemon_status("test").pid == status.pid
    assert_one_daemon()


def test_a_restart_stops_nothing_if_the_script_is_gone(base: Path) -> None:
    path = script(base)
    status = ensure_daemon("test", [sys.executable, "-W", "error", str(path), "test"])
    path.rename(base / "moved.py")
    assert_refused(status, "script .* is gone")
    (base / "moved.py").rename(path)
    assert restart_daemon("test").pid != status.pid
    assert_one_daemon()


@pytest.mark.parametrize("kind", ["module", "app"])
def test_a_restart_stops_nothing_if_the_module_is_gone(kind: str, base: Path) -> None:
    (base / "package").mkdir()
    program = f"{PROGRAM}app = App()\nif __name__ == '__main__': run_daemon(app, name)\n".replace("sys.argv[1]", "'test'")
    (base / "package" / "service.py").write_text(program)
    words = {"module": ["package.service"], "app": ["harness_ipc", "serve", "package.service:app", "--name=test"]}[kind]
    status = ensure_daemon("test", [sys.executable, "-m", *words], cwd=str(base))
    for name in ("package/service.py", "package"):
        (base / name).rename(base / "moved")
        assert_refused(status, r"module 'package\.service' is gone")
        (base / "moved").rename(base / name)
    assert restart_daemon("test").pid != status.pid
    assert_one_daemon()


@needs_posix
def test_a_restart_stops_nothing_if_the_interpreter_is_gone(base: Path) -> None:
    interpreter, program = base / "python-of-ours", base / "program"

    def install() -> None:
        interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)

    program.write_text(f"#!{interpreter}\n{PROGRAM}{RUN}")
    program.chmod(0o755)
    for argv, reason in (([str(interpreter), *command()[1:]], "program"), ([str(program), "test"], "interpreter")):
        install()
        status = ensure_daemon("test", argv)
        interpreter.unlink()
        assert_refused(status, f"{reason} .* is gone")
        install()
        assert restart_daemon("test").pid != status.pid
        assert stop_daemon("test") is True


# On Windows, the directory cannot be removed: the daemon's console process is in it.
@needs_posix
def test_a_restart_stops_nothing_if_the_directory_is_gone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = base / "place"
    place.mkdir()
    script(place)
    monkeypatch.chdir(place)
    status = ensure_daemon("test", [sys.executable, "service.py", "test"])
    # The daemon has left the directory of its start.
    assert (status.cwd, where()[0]) == (os.path.realpath(place), root())
    monkeypatch.chdir(base)
    shutil.rmtree(place)
    assert_refused(status, "directory .*place is gone")
    place.mkdir()
    script(place)
    assert restart_daemon("test").pid != status.pid
    assert (daemon_status("test").cwd, where()[0]) == (os.path.realpath(place), root())
    assert_one_daemon()


def test_a_restart_that_fails_can_be_tried_again(base: Path) -> None:
    then = "if (folder / 'broken').exists(): raise SystemExit(3)"
    ensure_daemon("test", command(then=then), env={"COLOUR": "green"})
    (base / "broken").touch()
    for _ in range(2):
        with pytest.raises(StartFailed, match="status 3"):
            restart_daemon("test")
        assert daemon_status("test").state == "stale"
    (base / "broken").unlink()
    restart_daemon("test")
    assert where()[2] == "green"
    assert_one_daemon()


def test_modules_are_found_in_the_directory_of_the_start(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "lazy.py").write_text("value = 'green'\n")
    monkeypatch.chdir(base)
    then = "async def start(self): import lazy; os.environ['COLOUR'] = lazy.value\nApp.start = start"
    ensure(then=then)
    assert (where()[0], where()[2]) == (root(), "green")
    restart_daemon("test")
    assert where()[2] == "green"
    assert_one_daemon()


def test_daemon_started_by_another_command(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(base)
    monkeypatch.chdir(base)
    argv = [sys.executable, "service.py", "test"]
    first = ensure_daemon("test", argv, env={"COLOUR": "green", "SIZE": "1"})
    assert first.problem is None

    def problem(argv: list[str], **env: str) -> str:
        status = ensure_daemon("test", argv, env=env)
        assert (status.state, status.pid) == ("running", first.pid)
        return status.problem or ""

    assert problem(argv, COLOUR="green", SIZE="1") == ""
    assert problem([sys.executable, str(base / "service.py"), "test"], COLOUR="green", SIZE="1") == ""
    assert "command line is" in problem([*argv, "--fast"], COLOUR="green", SIZE="1")
    other = str(base / "python-of-ours")
    assert f"not by {other}" in problem([other, *argv[1:]], COLOUR="green", SIZE="1")
    text = problem(argv, COLOUR="red", SIZE="1", EXTRA="secret")
    assert "other values of COLOUR, EXTRA" in text
    assert "red" not in text
    assert "secret" not in text
    # The directory matters only to a command line with a module.
    monkeypatch.chdir("/")
    assert "directory" not in problem([sys.executable, str(base / "service.py"), "test"], COLOUR="green", SIZE="1")


def test_a_module_of_another_directory_is_another_daemon(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two"):
        (base / folder).mkdir()
        script(base / folder)
    argv = [sys.executable, "-m", "service", "test"]
    status = ensure_daemon("test", argv, cwd=str(base / "one"))
    assert where()[0] == os.path.realpath(base / "one")
    monkeypatch.chdir(base / "two")
    found = ensure_daemon("test", argv)
    assert found.pid == status.pid
    assert f"directory is {base / 'one'}, not {os.path.realpath(base / 'two')}" in (found.problem or "")
