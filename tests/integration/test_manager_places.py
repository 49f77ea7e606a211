"""A full, read-only or deleted runtime directory, and one of another user."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness_ipc import (
    HarnessIPCError,
    cleanup_endpoint,
    connect_daemon,
    daemon_alive,
    daemon_status,
    ensure_daemon,
    identify,
    list_daemons,
    ping,
    request,
    restart_daemon,
    runtime_dir,
    stop_daemon,
)
from harness_ipc._registry import records
from tests.support.managed import (
    AT_ONCE,
    assert_one_daemon,
    at_once,
    end_daemons,
    ensure,
    live_processes,
    started,
    the_log,
)
from tests.support.marks import needs_posix, needs_root
from tests.support.processes import PATIENCE, DaemonProcess, serves, spawn_python, wait_until

pytestmark = pytest.mark.usefixtures("base")


# Full and deleted directories.


def mount(directory: Path | str, options: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(directory)], capture_output=True, timeout=PATIENCE
    )
    return done.returncode == 0


def unmount(directory: Path | str) -> None:
    # Lazily: a process of a failed test may still use it.
    subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True, timeout=PATIENCE)


def _can_mount() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory(prefix="hi-") as directory:
        if not mount(directory, "size=64k"):
            return False
        unmount(directory)
    return True


needs_mount = pytest.mark.skipif(
    not _can_mount(), reason="no tmpfs can be mounted: not Linux, not root, or a sandbox forbids it"
)


@pytest.fixture
def small(private_directories: Path) -> Iterator[Path]:
    """Make the runtime directory a file system of its own, with room for 64 KiB and 12 files."""
    directory = private_directories / "run"
    directory.mkdir(mode=0o700)
    assert mount(directory, "size=64k,nr_inodes=12")
    try:
        yield directory
    finally:
        end_daemons(private_directories)
        unmount(directory)


@contextlib.contextmanager
def used_up(directory: Path, what: str) -> Iterator[None]:
    """Fill a file system, and free it at the end."""
    if what == "writing":
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True, timeout=PATIENCE)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True, timeout=PATIENCE)
        return
    fillers = [directory / f"filler{number}" for number in range(100)]
    with pytest.raises(OSError, match="No space"):
        fill(fillers, b"x" * (16 * 1024 if what == "room" else 0))
    try:
        yield
    finally:
        for path in fillers:
            path.unlink(missing_ok=True)


def fill(paths: list[Path], data: bytes) -> None:
    for path in paths:
        path.write_bytes(data)


@needs_mount
@pytest.mark.parametrize("used", ["before", "after a daemon"])
@pytest.mark.parametrize("what", ["room", "files", "writing"])
def test_a_full_runtime_directory_is_a_typed_error(small: Path, what: str, used: str) -> None:
    if used == "after a daemon":
        # The lock files exist already.
        ensure()
        assert stop_daemon("test") is True
    with used_up(small, what):
        for _ in range(2):
            with at_once(), pytest.raises(HarnessIPCError) as caught:
                ensure()
            assert "\n" not in str(caught.value)
            assert str(small) in str(caught.value)
        assert daemon_status("test").state == "absent"
        assert list_daemons() == []
        wait_until(lambda: not live_processes())
    with at_once():
        ensure()
    assert_one_daemon()


@needs_posix
def test_a_daemon_whose_directory_is_deleted_notices_it_and_ends(base: Path) -> None:
    pid = ensure().pid
    shutil.rmtree(runtime_dir())
    assert daemon_status("test").state == "absent"
    wait_until(lambda: not live_processes(), AT_ONCE)
    assert [line for line in the_log().splitlines() if " ERROR " in line and "reach" in line]
    with at_once():
        assert ensure().pid != pid
    assert_one_daemon()
    assert len(started(base)) == 2


# Another user.

STRANGER = 12345


def stranger(rounds: int) -> None:
    """Become another user, make all attempts `rounds` times, and print their results."""
    for module in ("asyncio", "shlex", "filelock", "platformdirs", "psutil", "queue", "harness_ipc.manager"):
        importlib.import_module(module)
    if sys.platform == "win32":
        raise AssertionError("for POSIX")
    attempts: list[Callable[[], object]] = [
        lambda: daemon_status("test").state,
        lambda: daemon_alive("test"),
        lambda: ping("test"),
        lambda: records.load("test").pid,
        lambda: request("test", {"method": "echo"}),
        lambda: connect_daemon("test"),
        lambda: stop_daemon("test"),
        lambda: restart_daemon("test"),
        lambda: ensure_daemon("test", [sys.executable, "-c", "pass"]),
        list_daemons,
        lambda: cleanup_endpoint("test"),
    ]
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    for _ in range(rounds):
        outcomes: list[object] = []
        for attempt in attempts:
            try:
                outcomes.append(attempt())
            except HarnessIPCError as error:
                outcomes.append(type(error).__name__ if "\n" not in str(error) else str(error))
        print(json.dumps(outcomes), flush=True)


@needs_root
@needs_posix
@pytest.mark.parametrize("reach", [0o700, 0o711, 0o755])
def test_another_user_gets_nothing_and_blocks_nobody(base: Path, reach: int) -> None:
    pid = ensure().pid
    base.chmod(reach)
    rounds = 100
    with spawn_python("-m", "tests.integration.test_manager_places", str(rounds)) as other:
        answered = watch(other, rounds)
        assert other.wait() == 0
    base.chmod(0o700)
    print(f"{answered} requests of the owner's were answered meanwhile")
    assert answered > 0
    assert identify("test") == pid
    assert_one_daemon()


def watch(other: DaemonProcess, rounds: int) -> int:
    """Check the stranger's results while sending requests, and return the number of replies."""
    answered = 0
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(lambda: [json.loads(other.read_line()) for _ in range(rounds)])
        while not results.done():
            begin = time.monotonic()
            assert serves()
            assert time.monotonic() - begin < 5.0
            answered += 1
    for outcomes in results.result():
        assert outcomes == ["forbidden", False, *["UnsafeDirectory"] * 9]
    return answered


if __name__ == "__main__":
    stranger(int(sys.argv[1]))
