"""What the browser harness costs: a helper against the same CDP call in the daemon, a command against a bare interpreter.

``python -m tests.benchmarks.browser`` starts a browser of its own, and ends it. The contestants take turns in one run.
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
from harness_ipc.browser import cdp, helpers

CALLS = 2000
# A contestant's calls in one turn.
TURN = 50
PROCESSES = 25


async def call_directly(url: str, session_of: str, count: int, times: list[float]) -> None:
    """Time the call as the daemon makes it: over a WebSocket of its own, in a loop."""
    connection = await cdp.Connection.open(url, lambda *_: None)
    try:
        attached = await connection.call("Target.attachToTarget", {"targetId": session_of, "flatten": True})
        for _ in range(count):
            begun = time.perf_counter()
            await connection.call("Runtime.evaluate", {"expression": "1", "returnByValue": True}, session=attached["sessionId"])
            times.append(time.perf_counter() - begun)
    finally:
        await connection.close()


def compare_calls(base: Path) -> None:
    helpers.page_info()
    port, path = (base / "profile" / "DevToolsActivePort").read_text().split()
    tab = helpers.current_tab()["targetId"]
    times: dict[str, list[float]] = {"the CDP call in a daemon": [], "the same by helpers._send": []}
    direct, sent = times.values()
    for _ in range(CALLS // TURN):
        asyncio.run(call_directly(f"ws://127.0.0.1:{port}{path}", tab, TURN, direct))
        for _ in range(TURN):
            begun = time.perf_counter()
            helpers._send({"method": "Runtime.evaluate", "params": {"expression": "1", "returnByValue": True}})
            sent.append(time.perf_counter() - begun)
    for what, seconds in times.items():
        ordered = sorted(seconds)
        print(f"{what:40} p50 {median(ordered) * 1000:.3f} ms   p99 {ordered[int(len(ordered) * 0.99)] * 1000:.3f} ms")
    print(f"{'_send adds':40} p50 {(median(sent) - median(direct)) * 1000:.3f} ms")


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
        os.environ.update({name: str(value) for name, value in settings.items()})
        try:
            compare_calls(base)
            compare_processes()
        finally:
            helpers.disconnect()
            stop_daemon("browser")


if __name__ == "__main__":
    main()
