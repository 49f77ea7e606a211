"""The log of a daemon is bounded for all writers, and a failed write does not end the daemon."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness_ipc import StartFailed, connect_daemon, daemon_status, ensure_daemon, log_path, request
from tests.support.marks import needs_linux, needs_posix, needs_root
from tests.support.processes import PATIENCE, run_python, wait_until

LOG_BYTES = 5 * 2**20

PROGRAM = """
import asyncio, logging, os, subprocess, sys
from harness_ipc import run_daemon

CHILD = "import sys; [sys.stdout.write('x' * 999_999 + chr(10)) for _ in range(int(sys.argv[1]))]"

class App:
    async def start(self):
        self.children = []

    async def handle(self, message):
        match message.get("how"):
            case "print": print("x" * 999_999)
            case "error": print("x" * 999_999, file=sys.stderr)
            case "native": os.write(1, b"x" * 999_999 + b"\\n")
            case "child": subprocess.run([sys.executable, "-c", CHILD, "1"])
            case "log": logging.getLogger("app").info("x" * 999_999)
            case "living child":
                self.children.append(subprocess.Popen([sys.executable, "-c", "while True: print('x' * 99_999)"]))
            case "say": print(message["text"]); logging.getLogger("app").info("logged")
        return {"result": 1}

    async def stop(self):
        for child in self.children:
            child.kill()
            child.wait()

run_daemon(App(), "test")
"""


@pytest.fixture
def daemon(base: Path) -> int:
    """Start the daemon, and return its pid."""
    pid = ensure_daemon("test", [sys.executable, "-W", "error", "-c", PROGRAM]).pid
    assert pid is not None
    return pid


def sizes() -> dict[str, int]:
    return {file.name: file.stat().st_size for file in log_path("test").parent.iterdir()}


@pytest.mark.parametrize("how", ["print", "error", "native", "child", "log"])
def test_log_and_predecessor_keep_their_bound(daemon: int, how: str) -> None:
    with connect_daemon("test") as client:
        for _ in range(12):
            assert client.request({"how": how}, timeout=PATIENCE) == {"result": 1}
            assert all(size <= LOG_BYTES for size in sizes().values())
    found = sizes()
    assert sorted(found) == ["test.log", "test.log.1"]
    assert found["test.log.1"] > LOG_BYTES - 1_100_000


@needs_posix
def test_the_log_is_bounded_if_a_child_keeps_writing(daemon: int) -> None:
    request("test", {"how": "living child"}, timeout=PATIENCE)
    predecessor = log_path("test").with_name("test.log.1")
    times = set()

    def is_copied_again() -> bool:
        with contextlib.suppress(FileNotFoundError):
            times.add(predecessor.stat().st_ctime_ns)
        return len(times) > 2

    wait_until(is_copied_again)
    assert predecessor.stat().st_size <= LOG_BYTES
    assert request("test", {"how": "say", "text": "between"}, timeout=PATIENCE) == {"result": 1}


def test_prints_and_entries_are_in_the_log_in_their_order(daemon: int) -> None:
    request("test", {"how": "say", "text": "first größer"}, timeout=PATIENCE)
    request("test", {"how": "say", "text": "second"}, timeout=PATIENCE)
    lines = log_path("test").read_text(encoding="utf-8").splitlines()
    assert [line.rpartition(" app: ")[2] for line in lines[-4:]] == ["first größer", "logged", "second", "logged"]


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """Mount a disk of 128 KiB at `directory`, and yield the path of a file to fill it with."""
    directory.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "none", str(directory)], check=True)
    try:
        yield directory / "other"
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as full:
        while True:
            full.write(bytes(4096))


@needs_linux
@needs_root
def test_running_daemon_outlives_a_full_disk(base: Path) -> None:
    with small_disk(base / "log") as other:
        ensure_daemon("test", [sys.executable, "-c", PROGRAM])
        fill(other)
        for how in ("print", "error", "log", "say"):
            assert request("test", {"how": how, "text": "lost"}, timeout=PATIENCE) == {"result": 1}
        assert daemon_status("test").state == "running"
        other.unlink()
        assert request("test", {"how": "say", "text": "after"}, timeout=PATIENCE) == {"result": 1}
        assert log_path("test").read_text(encoding="utf-8").endswith("logged\n")
        request("test", {"meta": "shutdown"})
        wait_until(lambda: daemon_status("test").pid is None)


@needs_linux
@needs_root
def test_start_on_a_full_disk_names_it(base: Path) -> None:
    with small_disk(base / "log") as other:
        fill(other)
        with pytest.raises(
            StartFailed, match=f"{log_path('test')} can't be written: No space left .*; make room in "
        ) as caught:
            ensure_daemon("test", [sys.executable, "-c", PROGRAM])
        assert "HARNESS_IPC_LOG_DIR" in str(caught.value)
        failed = run_python("-c", PROGRAM)
        assert failed.returncode == 1
        assert "test.log can't be written: No space left" in failed.stderr.splitlines()[-1]
        found = run_python("-m", "harness_ipc", "doctor").stdout
        assert [line for line in found.splitlines() if line.startswith("WARNING  log directory") and "its disk is full" in line]


def test_log_that_can_not_be_opened_is_the_only_error(base: Path) -> None:
    log_path("test").mkdir(parents=True)
    failed = run_python("-c", PROGRAM)
    assert failed.returncode == 1
    assert re.search(r"test\.log is (not|of another type)", failed.stderr.splitlines()[-1])
    assert "atexit" not in failed.stderr


@needs_linux
@needs_root
def test_start_with_a_full_runtime_directory_names_it(base: Path) -> None:
    with small_disk(base / "run") as other:
        fill(other)
        with pytest.raises(StartFailed, match=f"{base / 'run'}.*No space left.*HARNESS_IPC_RUNTIME_DIR"):
            ensure_daemon("test", [sys.executable, "-c", PROGRAM])


@needs_posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "by itself"])
def test_daemon_without_standard_streams_serves(base: Path, closed: str) -> None:
    program = PROGRAM
    if closed == "by itself":
        closed, program = "", f"import sys; sys.stdout.close(); sys.stderr.close(){PROGRAM}"
    command = f'"{sys.executable}" -c "$1" {closed}'
    with subprocess.Popen(["sh", "-c", command, "sh", program], stdin=subprocess.DEVNULL) as process:
        wait_until(lambda: daemon_status("test").state == "running")
        for how in ("print", "error", "native", "child"):
            assert request("test", {"how": how}, timeout=PATIENCE) == {"result": 1}
        request("test", {"meta": "shutdown"})
        assert process.wait(PATIENCE) == 0


@needs_posix
def test_starter_without_standard_streams_starts_a_daemon(base: Path) -> None:
    code = "import sys, harness_ipc; harness_ipc.ensure_daemon('test', [sys.executable, '-c', sys.argv[1]])"
    subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$1" "$2" <&- >&- 2>&-', "sh", code, PROGRAM], check=True)
    assert request("test", {"how": "say", "text": "here"}, timeout=PATIENCE) == {"result": 1}
    assert "here\n" in log_path("test").read_text(encoding="utf-8")


@needs_posix
def test_daemon_outlives_the_reader_of_its_output(base: Path) -> None:
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=writer, stderr=writer) as process:
        os.close(writer)
        os.close(reader)
        wait_until(lambda: daemon_status("test").state == "running")
        for how in ("print", "error"):
            assert request("test", {"how": how}, timeout=PATIENCE) == {"result": 1}
        request("test", {"meta": "shutdown"})
        assert process.wait(PATIENCE) == 0


@needs_linux
def test_output_that_can_not_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "harness_ipc", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "standard output can't be used: No space left on device" in done.stderr
