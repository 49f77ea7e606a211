"""Daemons started by `ensure_daemon`: their program, checks and cleanup."""

from __future__ import annotations

import contextlib
import ntpath
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from harness_ipc import (
    DaemonStatus,
    ensure_daemon,
    identify,
    log_path,
    stop_daemon,
)
from harness_ipc._registry import records
from tests.support.processes import PATIENCE, DaemonProcess, runtime_files, serves, spawn_python, wait_until

# Seconds: below the 60 s timeout of a start, far above the time that it takes.
AT_ONCE = 45.0
# On Windows, a pipe has no file.
SOCKETS = 1 if os.name == "posix" else 0

# The program of a daemon. It records its start, and checks that no two run at the same time.
PROGRAM = """
import asyncio, os, sys, time
from pathlib import Path
import filelock
from harness_ipc import run_daemon
from harness_ipc._registry import records

name = sys.argv[1]
folder = Path(os.environ["HARNESS_IPC_RUNTIME_DIR"]).parent
with open(folder / "started", "a") as file:
    file.write(f"{os.getpid()}\\n")

class App:
    async def start(self):
        self.alone = filelock.FileLock(folder / f"{name}.alone")
        try:
            self.alone.acquire(timeout=0)
        except filelock.Timeout:
            (folder / "two at once").touch()
            raise

    async def handle(self, message):
        match message.get("method"):
            case "echo":
                return {"result": message.get("params")}
            case "where":
                return {"result": [os.getcwd(), sys.argv, os.environ.get("COLOUR")]}
            case "raise":
                raise ValueError("as told")
            case "hang":
                (folder / "hanging").touch()
                await asyncio.Event().wait()
            case "wedge":
                (folder / "wedged").touch()
                while True:
                    pass
            case "block":
                (folder / "blocked").touch()
                time.sleep(3600)

    async def stop(self):
        pass

    async def health(self):
        return {"well": True}

"""


def command(name: str = "test", *words: str, first: str = "", then: str = "", options: str = "") -> list[str]:
    """Return the command line of the daemon `name`: `first` runs before everything else, `then` may change the program."""
    return [sys.executable, "-W", "error", "-c", f"{first}{PROGRAM}{then}\nrun_daemon(App(), name, {options})", name, *words]


def ensure(name: str = "test", **changes: str) -> DaemonStatus:
    return ensure_daemon(name, command(name, **changes))


def the_log(name: str = "test") -> str:
    return log_path(name).read_text(encoding="utf-8")


def started(base: Path) -> list[int]:
    """Return the pids of all daemons that were started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(line) for line in (base / "started").read_text().split()]
    return []


def all_processes() -> Iterator[psutil.Process]:
    """Yield each process. `psutil.process_iter` leaves one out for a while if another one had its pid before."""
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            yield psutil.Process(pid)


def live_processes() -> list[psutil.Process]:
    """Return all other processes with the runtime directory of this test.

    On Windows, without consoles and redirectors: the python.exe of a venv starts the interpreter with the same arguments and
    waits for it.
    """
    found: dict[int, tuple[psutil.Process, list[str], int]] = {}
    for process in all_processes():
        with contextlib.suppress(psutil.Error, OSError):
            here = process.environ().get("HARNESS_IPC_RUNTIME_DIR") == os.environ["HARNESS_IPC_RUNTIME_DIR"]
            if here and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process, process.cmdline(), process.ppid()
    if sys.platform == "win32":
        consoles = {pid for pid, (_, words, _) in found.items() if ntpath.basename(words[0]).lower() == "conhost.exe"}
        redirectors = {parent for _, words, parent in found.values() if parent in found and found[parent][1][1:] == words[1:]}
        return [process for pid, (process, _, _) in found.items() if pid not in consoles | redirectors]
    return [process for process, _, _ in found.values()]


def assert_one_daemon(name: str = "test") -> None:
    """Assert that there are only one process, one record and one socket, and that the daemon serves."""
    assert serves(name)
    assert identify(name) == records.load(name).pid
    # Another process may still be ending.
    wait_until(lambda: [process.pid for process in live_processes()] == [identify(name)])
    files = [file for file in runtime_files() if not file.endswith(".start")]
    sockets = [file for file in files if file.endswith(".sock")]
    assert len(sockets) == SOCKETS
    assert sorted(files) == sorted([f"{name}.json", *sockets])


def assert_none_left() -> None:
    """Assert that there is no process, and no file except locks."""
    wait_until(lambda: not live_processes())
    assert [file for file in runtime_files() if not file.endswith(".start")] == []


def kill_all() -> None:
    for process in live_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(PATIENCE)


def end_daemons(base: Path) -> None:
    """Stop all daemons of a test, and fail if anything is left."""

    def ended() -> bool:
        # A start that timed out may acquire its name only now.
        for lock in sorted((base / "run").glob("*.lock")):
            stop_daemon(lock.name.partition(".")[0], timeout=1.0)
        return not live_processes()

    try:
        wait_until(ended)
    finally:
        kill_all()
    assert not (base / "two at once").exists()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < AT_ONCE


@contextlib.contextmanager
def in_thread(function: Any, *arguments: Any, **options: Any) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(function, *arguments, **options)
        except BaseException:
            # The thread waits for these processes.
            kill_all()
            raise


@contextlib.contextmanager
def spawn_bystander() -> Iterator[DaemonProcess]:
    """Run an idle process that is unrelated to daemons."""
    with spawn_python("-c", "import time; print('here', flush=True); time.sleep(3600)") as bystander:
        assert bystander.read_line() == "here"
        yield bystander


def waits_for_go(*, blocking: bool = False) -> str:
    """Return code for `then` of `command`: the app's start waits until the test has created the file "go"."""
    wait = "time.sleep(0.01)" if blocking else "await asyncio.sleep(0.01)"
    return f"""
class App(App):
    async def start(self):
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            {wait}
        await super().start()
"""
