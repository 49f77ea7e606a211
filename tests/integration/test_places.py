"""The directories without a home, with a squatter, and created by another tool."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import UnsafeDirectory, daemon_status, ensure_daemon, request
from tests.support.managed import command, end_daemons
from tests.support.marks import needs_linux, needs_posix, needs_root
from tests.support.processes import run_python

STRANGER = 12345

# Run as another user, with a forked child as the daemon. Modules are imported before, since that user may have no access.
AS_USER = """
import importlib, json, os, sys, time, traceback
for module in "asyncio filelock platformdirs psutil queue shlex tempfile harness_ipc._server.pump encodings.ascii".split():
    importlib.import_module(module)
import harness_ipc
import harness_ipc._cli.logs, harness_ipc._cli.report
from harness_ipc import cli, doctor, manager, run_daemon
from harness_ipc._registry import trust

uid, home = int(sys.argv[1]), sys.argv[2]
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
for variable in ("HARNESS_IPC_RUNTIME_DIR", "HARNESS_IPC_LOG_DIR", "XDG_STATE_HOME"):
    os.environ.pop(variable, None)
if home:
    trust.home = lambda: home

async def handle(message):
    return {"result": 1}

if (child := os.fork()) == 0:
    try:
        run_daemon(handle, "x")
    except BaseException:
        traceback.print_exc()
    os._exit(0)
deadline = time.monotonic() + 20
while not harness_ipc.ping("x") and time.monotonic() < deadline:
    time.sleep(0.01)
status = harness_ipc.daemon_status("x")
found = {
    "state": status.state,
    "log": status.log_path,
    "logged": os.path.exists(status.log_path),
    "directory": str(harness_ipc.runtime_dir()),
    "result": harness_ipc.request("x", {}),
    "commands": [cli.main([*words, "--name", "x"]) for words in (["status"], ["ping"], ["logs"], ["stop"])],
    "doctor": [finding.level for finding in doctor.examine() if finding.topic.endswith("directory")],
    "ended": harness_ipc.daemon_status("x").state,
}
print()
print(json.dumps(found), flush=True)
# Skip exit handlers: coverage cannot write its data as that user.
os._exit(0)
"""


@pytest.fixture
def uid() -> Iterator[int]:
    """A user without a passwd entry; the directory is removed at the end."""
    uid = 2_100_000_000 + os.getpid()
    yield uid
    shutil.rmtree(f"/tmp/harness-ipc-runtime-{uid}", ignore_errors=True)


def as_user(uid: int, home: Path | str = "") -> dict[str, Any]:
    done = run_python("-c", AS_USER, str(uid), str(home))
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_linux
@needs_root
@pytest.mark.parametrize("home", [None, "/", "", "relative"])
def test_a_user_without_a_home_has_daemons_too(
    home: str | None, uid: int, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_directories.chmod(0o777)
    monkeypatch.chdir(private_directories)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    directory = f"/tmp/harness-ipc-runtime-{uid}"
    assert as_user(uid) == {
        "state": "running",
        "log": f"{directory}/.log/x.log",
        "logged": True,
        "directory": directory,
        "result": {"result": 1},
        "commands": [0, 0, 0, 0],
        "doctor": ["ok", "ok"],
        "ended": "absent",
    }
    assert list(private_directories.iterdir()) == []


@needs_linux
@needs_root
def test_behind_a_squatter_the_fallback_is_made_and_kept(
    uid: int, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squatted = Path(f"/tmp/harness-ipc-runtime-{uid}")
    squatted.mkdir()
    os.chown(squatted, STRANGER, STRANGER)
    private_directories.chmod(0o755)
    home = private_directories / "home"
    home.mkdir(0o755)
    os.chown(home, uid, uid)
    monkeypatch.setenv("HOME", str(home))
    fallback = home / ".local" / "state" / "harness-ipc" / "run"
    for _ in ("squatted", "free again"):
        found = as_user(uid, home)
        assert (found["state"], found["directory"]) == ("running", str(fallback))
        if squatted.exists():
            squatted.rmdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (fallback, *list(fallback.parents)[:3])] == [0o700] * 4


@needs_posix
def test_the_directories_of_another_tool_are_taken_over(private_directories: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, log = private_directories / "run", private_directories / "log" / "test.log"
    run.mkdir(0o755)
    log.parent.mkdir(0o755)
    log.write_text("the tool's\n")
    log.chmod(0o644)
    assert daemon_status("test").state == "forbidden"
    try:
        with caplog.at_level(logging.WARNING):
            assert ensure_daemon("test", command()).state == "running"
        assert request("test", {"method": "echo", "params": 1}) == {"result": 1}
        assert [stat.S_IMODE(path.stat().st_mode) for path in (run, log.parent, log)] == [0o700, 0o755, 0o600]
        assert log.read_text().startswith("the tool's\n")
        assert [record.getMessage().partition(" was open")[0] for record in caplog.records] == [str(run), str(log)]
    finally:
        end_daemons(private_directories)


@needs_posix
def test_writers_refuse_a_record_that_others_could_read(private_directories: Path) -> None:
    run = private_directories / "run"
    run.mkdir(0o700)
    (run / "test.json").touch()
    (run / "test.json").chmod(0o644)
    with pytest.raises(UnsafeDirectory, match="chmod 600"):
        ensure_daemon("test", [sys.executable, "-c", "pass"])
    assert stat.S_IMODE((run / "test.json").stat().st_mode) == 0o644
