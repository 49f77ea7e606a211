"""A daemon inherits nothing by accident from any starter or wrapper."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import StartFailed, daemon_status, ensure_daemon, request, stop_daemon
from tests.support.managed import assert_none_left, assert_one_daemon, at_once, command, live_processes
from tests.support.marks import needs_linux, needs_posix, needs_root
from tests.support.processes import PATIENCE, run_python

pytestmark = [needs_posix, pytest.mark.usefixtures("base")]

# Methods that return inherited settings and open a terminal device.
INSPECT = """
import resource, signal, subprocess
async def inspect(self, message):
    if message.get("method") == "open":
        self.terminal = os.open(message["path"], os.O_RDWR)
    elif message.get("method") != "inspect":
        return await _handle(self, message)
    umask = os.umask(0)
    os.umask(umask)
    return {"result": {
        "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "exit": subprocess.run(["sh", "-c", "exit 7"]).returncode,
        "umask": umask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
        "leads": os.getsid(0) == os.getpid(),
        "terminal": os.path.exists("/dev/tty") and open_terminal(),
    }}
def open_terminal():
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
_handle, App.handle = App.handle, inspect
"""

STARTER = """
import json, os, resource, signal, sys
from harness_ipc import ensure_daemon
{}
ensure_daemon("test", json.loads(sys.argv[1]))
"""


def start_after(preparation: str) -> dict[str, Any]:
    """Return the settings of a daemon whose starter has run `preparation`."""
    done = run_python("-c", STARTER.format(preparation), json.dumps(command(then=INSPECT)))
    assert (done.returncode, done.stderr) == (0, "")
    return inspect()


def inspect() -> dict[str, Any]:
    found = request("test", {"method": "inspect"}, timeout=PATIENCE)["result"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "preparation",
    [
        "pass",
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    ],
    ids=["plain", "ignored signals", "blocked signals"],
)
def test_signals_have_their_default_effect(preparation: str) -> None:
    found = start_after(preparation)
    # CPython ignores these two signals in each process.
    assert set(found["ignored"]) <= {signal.SIGPIPE, getattr(signal, "SIGXFSZ", None)}
    assert found["blocked"] == []
    assert found["exit"] == 7
    os.kill(daemon_status("test").pid or 0, signal.SIGTERM)
    assert_none_left()


@pytest.mark.parametrize(("umask", "expected"), [(0, 0o022), (0o002, 0o022), (0o077, 0o077), (0o027, 0o027)])
def test_the_umask_is_the_starters_and_denies_others_to_write(umask: int, expected: int) -> None:
    assert start_after(f"os.umask({umask})")["umask"] == expected


@needs_root
def test_the_daemon_has_the_nice_level_0() -> None:
    assert start_after("os.nice(5)")["nice"] == 0


def test_the_soft_descriptor_limit_is_the_hard_one() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    found = start_after("resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))")
    assert found["descriptors"] == [hard, hard]


@needs_linux
def test_a_terminal_opened_by_the_app_is_not_controlling() -> None:
    found = start_after("pass")
    assert (found["leads"], found["terminal"]) == (False, False)
    master, slave = os.openpty()
    request("test", {"method": "open", "path": os.ttyname(slave)}, timeout=PATIENCE)
    assert inspect()["terminal"] is False
    os.close(slave)
    os.close(master)
    # As the controlling terminal, its end would have sent SIGHUP.
    assert inspect()["leads"] is False
    assert_one_daemon()


def test_start_leaves_no_child_thread_or_warning() -> None:
    assert ensure_daemon("test", command()).state == "running"
    assert [process.pid for process in live_processes()] == [daemon_status("test").pid]
    assert [thread.name for thread in threading.enumerate() if "harness" in thread.name] == []
    assert psutil.Process().children() == []
    code = """
import json, os, sys, threading, warnings
from harness_ipc import ensure_daemon
ensure_daemon("test", json.loads(sys.argv[1]))
assert threading.active_count() == 1
warnings.simplefilter("error")
if (pid := os.fork()) == 0:
    os._exit(0)
os.waitpid(pid, 0)
"""
    stop_daemon("test")
    done = run_python("-c", code, json.dumps(command()))
    assert (done.returncode, done.stderr) == (0, "")
    assert_one_daemon()


CLOSES = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
# It keeps the pipe open, and removes the variable that names it.
FORGETS = (
    "import os, subprocess, sys; os.environ.pop('HARNESS_IPC_START'); sys.exit(subprocess.call(sys.argv[1:], close_fds=False))"
)
# The classic double fork: a new session, all descriptors closed.
DAEMONIZES = """
import os
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.closerange(3, 256)
"""
OPENS = """
import os
files = [open(os.path.join(os.environ["HARNESS_IPC_RUNTIME_DIR"], "..", f"data{n}"), "w+") for n in range(12)]
"""
INDIRECT = {
    "closes descriptors": lambda: [sys.executable, "-c", CLOSES, *command(first=OPENS)],
    "says nothing": lambda: [sys.executable, "-c", FORGETS, *command()],
    "daemonizes itself": lambda: command(first=DAEMONIZES + OPENS),
    "daemonizes itself slowly": lambda: command(first=DAEMONIZES + "import time; time.sleep(0.5)\n"),
    "is run by a shell": lambda: ["sh", "-c", '"$@" & exit 0', "sh", *command()],
}


@pytest.mark.parametrize("kind", INDIRECT)
def test_a_daemon_without_its_pipe_is_found_by_its_record(kind: str, base: Path) -> None:
    with at_once():
        status = ensure_daemon("test", INDIRECT[kind]())
    assert status.state == "running"
    # The descriptor number of the pipe is that of a file now: nothing was written to it.
    assert [path.name for path in base.glob("data*") if path.stat().st_size] == []
    assert stop_daemon("test") is True
    assert_none_left()


def test_a_failure_behind_a_wrapper_is_reported_at_once() -> None:
    with at_once(), pytest.raises(StartFailed, match="status 3"):
        ensure_daemon("test", [sys.executable, "-c", CLOSES, sys.executable, "-c", "raise SystemExit(3)"])
    with at_once(), pytest.raises(StartFailed, match="SIGKILL"):
        ensure_daemon("test", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


# Patched interpreters, where blocking calls yield to a hub.
PATCHED = """
import warnings; warnings.simplefilter("ignore")
{}
import json, sys, time
from harness_ipc import DaemonTimeout, StartFailed, ensure_daemon
argv, slow, bad = map(json.loads, sys.argv[1:])
assert ensure_daemon("test", argv, timeout=60).state == "running"
begin = time.monotonic()
try:
    ensure_daemon("slow", slow, timeout=1)
except DaemonTimeout:
    assert time.monotonic() - begin < 20
else:
    raise AssertionError
try:
    ensure_daemon("bad", bad, timeout=60)
except StartFailed as error:
    assert "status 3" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize(
    "patch", ["import gevent.monkey; gevent.monkey.patch_all()", "import eventlet; eventlet.monkey_patch()"]
)
def test_a_start_is_bounded_in_a_patched_interpreter(patch: str) -> None:
    library = patch.split()[1].strip(";").partition(".")[0]
    # Not imported here: eventlet warns of each later fork.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library}: it is not installed")
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    bad = [sys.executable, "-c", "raise SystemExit(3)"]
    words = [json.dumps(argv) for argv in (command(), silent, bad)]
    done = subprocess.run(
        [sys.executable, "-c", PATCHED.format(patch), *words], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    for process in live_processes():
        if "time.sleep(60)" in process.cmdline()[-1]:
            process.kill()
    assert_one_daemon()
