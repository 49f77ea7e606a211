"""Process identity: the same process is found, another one with its pid is not, and unknown ones are reported as unknown."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from harness_ipc import is_same_process, process_identity
from harness_ipc._registry import processes
from tests.support.managed import spawn_bystander
from tests.support.marks import needs_linux, needs_root
from tests.support.processes import run_python


def test_a_process_is_found_by_its_identity() -> None:
    with spawn_bystander() as bystander:
        identity = process_identity(bystander.pid)
        assert identity is not None
        assert is_same_process(identity)
        found = processes.find_process(identity)
        assert found is not None
        assert found.pid == bystander.pid
    assert not is_same_process(identity)
    assert process_identity(bystander.pid) is None


def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    identity = process_identity(child.pid)
    assert identity is not None
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    # It has ended, but is not reaped yet.
    assert child.stdout.read() == b""
    if sys.platform != "win32":
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_same_process(identity)
    child.wait()
    assert not is_same_process(identity)
    child.stdout.close()


@pytest.mark.parametrize("pid", [True, 0, -1, 1.5, "1", None, 2**31 - 1, 10**30])
def test_an_invalid_pid_matches_no_process(pid: Any) -> None:
    assert not is_same_process({**processes.own_identity(), "pid": pid})


def test_an_empty_identity_matches_no_process() -> None:
    assert not is_same_process({})


@needs_linux
@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"create_time": 1.5}, True),
        ({"start_ticks": 1}, False),
        ({"start_ticks": None}, False),
        ({"boot_id": "another"}, False),
        ({"pid_namespace": "pid:[1]"}, False),
        ({"time_namespace": "time:[1]"}, False),
    ],
    ids=str,
)
def test_the_clock_does_not_change_an_identity(change: dict[str, Any], same: bool) -> None:
    assert is_same_process({**processes.own_identity(), **change}) is same


@needs_linux
@pytest.mark.parametrize(
    ("change", "why"),
    [({}, None), ({"pid_namespace": "pid:[1]"}, "another PID namespace"), ({"time_namespace": "x"}, "another time namespace")],
    ids=str,
)
def test_an_identity_of_another_namespace_is_unknown(change: dict[str, Any], why: str | None) -> None:
    found = processes.why_unknown({**processes.own_identity(), **change})
    assert found is None if why is None else why in str(found)


@needs_linux
def test_an_identity_without_its_start_is_unknown() -> None:
    identity = processes.own_identity()
    del identity["start_ticks"]
    assert processes.why_unknown(identity) is not None
    assert not is_same_process(identity)


@needs_linux
def test_own_identity_agrees_with_psutil() -> None:
    import psutil

    identity = processes.own_identity()
    assert identity["pid"] == os.getpid()
    assert abs(identity["create_time"] - psutil.Process().create_time()) < 2.0
    assert processes.process_identity(os.getpid()) is not None


@needs_root
@needs_linux
@pytest.mark.parametrize(
    ("namespace", "why"), [("--pid --fork", "another PID namespace"), ("--mount", "not mounted")], ids=["foreign", "none"]
)
def test_without_a_usable_proc_no_process_is_identified(namespace: str, why: str) -> None:
    program = f"""
import os, sys
from harness_ipc import StartFailed
from harness_ipc._registry import processes
assert {why!r} in processes.why_identity_is_unavailable(), processes.why_identity_is_unavailable()
assert processes.process_identity({os.getpid()}) is None
assert not processes.is_same_process({processes.own_identity()!r})
try:
    identity = processes.own_identity()
except StartFailed:
    assert {"mount" in namespace}
else:
    # By its own pid, not by the one that the foreign /proc has for it.
    assert identity["pid"] == os.getpid() and identity["start_ticks"] > 0
"""
    hide = "mount -t tmpfs none /proc && " if namespace == "--mount" else ""
    shell = f'{hide}exec "$0" -c "$1"'
    run = subprocess.run(
        ["unshare", *namespace.split(), "sh", "-c", shell, sys.executable, program], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_importing_it_imports_no_psutil() -> None:
    run = run_python("-c", "import sys, harness_ipc._registry.processes; print('psutil' in sys.modules)")
    assert run.stdout == "False\n", run.stderr
