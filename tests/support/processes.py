"""Daemons in new processes: `with spawn_daemon("name") as daemon`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from harness_ipc import current_request, request, run_daemon, runtime_dir
from harness_ipc._registry import records

# Seconds: far above the time of a start or a stop on a loaded machine.
PATIENCE = 60.0


class UnprintableError(Exception):
    """An error whose text raises."""

    def __str__(self) -> str:
        raise ValueError("no text")


class UnreadableReply(dict[str, Any]):
    """A reply that raises when it is read."""

    def items(self) -> Any:
        raise LookupError("no items")


class App:
    """An app with a method for each behavior that tests need."""

    def __init__(self) -> None:
        self.started = False
        self.sick = False
        self.log: list[Any] = []
        self.meetings: dict[int, asyncio.Barrier] = {}

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        print("stopped", flush=True)

    async def health(self) -> dict[str, Any]:
        if self.sick:
            raise LookupError("not well")
        return {"started": self.started}

    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        params = message.get("params", {})
        match message.get("method"):
            case "echo":
                return {"result": params}
            case "sleep":
                self.log.append(("begin", params.get("tag")))
                await asyncio.sleep(params["seconds"])
                self.log.append(("end", params.get("tag")))
                return {"result": params.get("tag")}
            case "log":
                return {"result": self.log}
            case "meet":  # wait until `of` requests run at the same time
                size = params.get("of", 2)
                await self.meetings.setdefault(size, asyncio.Barrier(size)).wait()
                return {"result": params.get("tag")}
            case "block":  # block the event loop
                import time

                time.sleep(params["seconds"])
                return {"result": None}
            case "reply":  # the given reply
                return dict(params["reply"])
            case "fill":
                return {"result": "x" * params["size"]}
            case "forget":  # what earlier requests have left
                self.sick = False
                self.log.clear()
                self.meetings.clear()
                return {"result": None}
            case "raise":
                raise ValueError(params.get("text", "as told"))
            case "fail health":
                self.sick = True
                return {"result": None}
            case "log this":
                logging.getLogger("tests.app").error(params["text"])
                return {"result": None}
            case "raise unprintable":
                raise UnprintableError
            case "return unreadable":
                return UnreadableReply(result=None)
            case "return":
                return {"set": {"result": {1, 2}}, "nan": {"result": float("nan")}, "list": [1]}[params["what"]]  # type: ignore[return-value]
            case "peer":
                peer = current_request().peer
                return {"result": None if peer is None else list(peer)}
            case _:
                return {"raw": message}


class DaemonProcess:
    """A daemon, or another Python process, started by a test."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.process = process
        self.name = name
        self.pid = process.pid

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def write_line(self, line: str) -> None:
        """Write to standard input, which must be a pipe."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        """End the process if it still runs, even if it is suspended, and close its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def spawn_daemon(name: str, **options: Any) -> Iterator[DaemonProcess]:
    """Start a daemon with `App` and the options of `run_daemon`. Yield it when it is ready."""
    with spawn_python("-m", "tests.support.processes", name, json.dumps(options)) as daemon:
        daemon.name = name
        line = daemon.read_line()
        assert line == "ready", f"the daemon said {line!r}"
        if sys.platform == "win32":
            # The python.exe of a venv is another process, which starts the interpreter.
            daemon.pid = records.load(name).pid
        yield daemon


@contextlib.contextmanager
def spawn_python(*arguments: str, stdin: int = subprocess.DEVNULL) -> Iterator[DaemonProcess]:
    """Start this interpreter with `arguments`, with warnings as errors. Standard error is that of the test."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    daemon = DaemonProcess(process, "")
    try:
        yield daemon
    finally:
        daemon.end()


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with `arguments`, with warnings as errors, to its end."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        # On Windows, the output may be in the system's code page.
        errors="backslashreplace",
        timeout=PATIENCE,
    )
    # With -X dev, asyncio warns of each callback that takes 0.1 s, which happens on a loaded machine.
    done.stderr = re.sub(r"^Executing <.*> took [\d.]+ seconds\n", "", done.stderr, flags=re.MULTILINE)
    return done


def runtime_files(ending: str = "") -> list[str]:
    """Return the names of the files in the runtime directory that end with `ending`, except locks."""
    return [name for name in sorted(os.listdir(runtime_dir())) if name.endswith(ending) and not name.endswith(".lock")]


@contextlib.contextmanager
def stopped(daemon: DaemonProcess) -> Iterator[None]:
    """Suspend the process, as SIGSTOP does, during the block."""
    if sys.platform == "win32":
        import psutil

        process = psutil.Process(daemon.pid)
        process.suspend()
        try:
            yield
        finally:
            process.resume()
    else:
        daemon.signal(signal.SIGSTOP)
        os.waitpid(daemon.pid, os.WUNTRACED)
        try:
            yield
        finally:
            daemon.signal(signal.SIGCONT)


def wait_until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Poll until `condition` is true; fail after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"still false after {patience:g} s"
        time.sleep(0.01)


def serves(name: str = "test") -> bool:
    """Return whether the daemon, with an app like `App`, answers a request."""
    return request(name, {"method": "echo", "params": {"n": 1}}, timeout=PATIENCE) == {"result": {"n": 1}}


def lives(pid: int) -> bool:
    """Return whether the process is running. A zombie is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    run_daemon(App(), sys.argv[1], on_ready=lambda _: print("ready", flush=True), **json.loads(sys.argv[2]))
