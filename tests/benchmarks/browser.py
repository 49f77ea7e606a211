"""What the browser harness costs: a helper against the CDP call alone, a pipe against a WebSocket, a command against Python.

``python -m tests.benchmarks.browser`` starts two browsers of its own, and ends them. The contestants take turns in one run.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness_ipc import stop_daemon
from harness_ipc.browser import helpers
from harness_ipc.browser.connection import Connection
from harness_ipc.browser.launcher import ManagedBrowser
from harness_ipc.browser.profile import read_active_port

CALLS = 2000
# A contestant's calls in one turn.
TURN = 50
PROCESSES = 25
# Bytes, and rounds in which each transport carries them once each way.
LARGE = 20 * 1024 * 1024
TRANSPORT_TURNS = 10


class Direct:
    """A browser of this process, driven as the daemon drives its own; and over a WebSocket too, by a port that it opens."""

    def __init__(self) -> None:
        self.browser = ManagedBrowser("direct")
        self.connections: dict[str, tuple[Connection, str]] = {}

    async def start(self) -> None:
        pipe = await self.browser.connect(lambda *_: None)
        while (active := read_active_port(self.browser.profile)) is None:
            await asyncio.sleep(0.01)
        websocket = await Connection.open(f"ws://127.0.0.1:{active[0]}{active[1]}", lambda *_: None)
        for name, connection in (("pipe", pipe), ("WebSocket", websocket)):
            target = (await connection.call("Target.createTarget", {"url": "about:blank"}))["targetId"]
            attached = await connection.call("Target.attachToTarget", {"targetId": target, "flatten": True})
            self.connections[name] = connection, attached["sessionId"]

    async def stop(self) -> None:
        for name, (connection, _) in reversed(self.connections.items()):
            if name == "pipe":
                await self.browser.close(connection)
            await connection.close()

    async def evaluate(self, name: str, expression: str, count: int, times: list[float]) -> None:
        """Time so many calls over one connection."""
        connection, session = self.connections[name]
        params = {"expression": expression, "returnByValue": True}
        for _ in range(count):
            begun = time.perf_counter()
            await connection.call("Runtime.evaluate", params, session=session)
            times.append(time.perf_counter() - begun)


def show(times: dict[str, list[float]]) -> None:
    for what, seconds in times.items():
        ordered = sorted(seconds)
        print(f"{what:40} p50 {median(ordered) * 1000:.3f} ms   p99 {ordered[int(len(ordered) * 0.99)] * 1000:.3f} ms")


def compare_calls(runner: asyncio.Runner, direct: Direct) -> None:
    times: dict[str, list[float]] = {"the CDP call in a daemon": [], "the same by helpers._send": []}
    called, sent = times.values()
    for _ in range(CALLS // TURN):
        runner.run(direct.evaluate("pipe", "1", TURN, called))
        for _ in range(TURN):
            begun = time.perf_counter()
            helpers._send({"method": "Runtime.evaluate", "params": {"expression": "1", "returnByValue": True}})
            sent.append(time.perf_counter() - begun)
    show(times)
    print(f"{'_send adds':40} p50 {(median(sent) - median(called)) * 1000:.3f} ms")


def compare_transports(runner: asyncio.Runner, direct: Direct) -> None:
    calls = {"1": ("1", TURN), "20 MiB sent": (f"'{'x' * LARGE}'.length", 1), "20 MiB received": (f"'x'.repeat({LARGE})", 1)}
    times: dict[str, list[float]] = {f"{call}, {name}": [] for call in calls for name in direct.connections}
    for _ in range(TRANSPORT_TURNS):
        for call, (expression, count) in calls.items():
            for name in direct.connections:
                runner.run(direct.evaluate(name, expression, count, times[f"{call}, {name}"]))
    show(times)


def compare_processes() -> None:
    commands: dict[str, list[str]] = {
        "import the helpers, print a constant": [sys.executable, "-c", "import harness_ipc.browser.helpers\nprint(1)"],
        'harness-browser -c "print(page_info())"': [
            sys.executable,
            "-m",
            "harness_ipc.browser.cli",
            "-c",
            "print(page_info())",
        ],
    }
    times: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(PROCESSES):
        for what, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[what].append(time.perf_counter() - begun)
    for what, seconds in times.items():
        print(f"{what:40} p50 {median(seconds) * 1000:.1f} ms")
    bare, full = (median(seconds) for seconds in times.values())
    print(f"{'ratio':40}     {full / bare:.2f}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="hb-") as directory:
        base = Path(directory)
        settings: dict[str, Any] = {"HARNESS_IPC_RUNTIME_DIR": base / "run", "HARNESS_IPC_LOG_DIR": base / "log"}
        settings |= {"HARNESS_CHROME_PROFILE": base / "profile", "HARNESS_CHROME_OWN": "1", "BU_NAME": "browser"}
        # Its sandbox is off, and all that it visits is blank.
        settings |= {"HARNESS_CHROME_ROOT": "1"}
        os.environ.update({name: str(value) for name, value in settings.items()})
        try:
            helpers.page_info()
            os.environ |= {"HARNESS_CHROME_PROFILE": str(base / "direct"), "HARNESS_CHROME_ARGS": "--remote-debugging-port=0"}
            direct = Direct()
            with asyncio.Runner() as runner:
                runner.run(direct.start())
                try:
                    compare_calls(runner, direct)
                    compare_transports(runner, direct)
                finally:
                    runner.run(direct.stop())
            compare_processes()
        finally:
            helpers.disconnect()
            stop_daemon("browser")


if __name__ == "__main__":
    main()
