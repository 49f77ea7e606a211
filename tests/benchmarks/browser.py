"""The overhead of the browser harness: a helper against a CDP call, a pipe against a WebSocket, a command against Python.

``python -m tests.benchmarks.browser`` starts browsers of its own, and ends them. The contestants take turns in one run. The
commands of agent-browser take part where it is on PATH, or where the variable AGENT_BROWSER has its path (or several paths, as
PATH has them: the npm command and the program that it starts).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from harness_ipc import stop_daemon
from harness_ipc.browser import helpers
from harness_ipc.browser.connection import Connection
from harness_ipc.browser.launcher import ManagedBrowser
from harness_ipc.browser.program import find_binary, is_root
from tests.browser.others import other_browser

CALLS = 2000
# A contestant's calls in one turn.
TURN = 50
PROCESSES = 25
# Bytes, and rounds in which each transport carries them once each way.
LARGE = 20 * 1024 * 1024
TRANSPORT_TURNS = 10


class Direct:
    """Two browsers of this process: one driven as the daemon drives its own, and another over its WebSocket."""

    def __init__(self) -> None:
        self.browser = ManagedBrowser("direct")
        self.connections: dict[str, tuple[Connection, str]] = {}

    async def start(self, url: str) -> None:
        pipe = await self.browser.connect(lambda *_: None)
        websocket = await Connection.open(url, lambda *_: None)
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
        """Time `count` calls over one connection."""
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
    times: dict[str, list[float]] = {"the CDP call in a daemon": [], "the same by Tab.request": []}
    called, sent = times.values()
    for _ in range(CALLS // TURN):
        runner.run(direct.evaluate("pipe", "1", TURN, called))
        for _ in range(TURN):
            begun = time.perf_counter()
            helpers.default_tab.request({"method": "Runtime.evaluate", "params": {"expression": "1", "returnByValue": True}})
            sent.append(time.perf_counter() - begun)
    show(times)
    print(f"{'Tab.request adds':40} p50 {(median(sent) - median(called)) * 1000:.3f} ms")


def compare_transports(runner: asyncio.Runner, direct: Direct) -> None:
    calls = {"1": ("1", TURN), "20 MiB sent": (f"'{'x' * LARGE}'.length", 1), "20 MiB received": (f"'x'.repeat({LARGE})", 1)}
    times: dict[str, list[float]] = {f"{call}, {name}": [] for call in calls for name in direct.connections}
    for _ in range(TRANSPORT_TURNS):
        for call, (expression, count) in calls.items():
            for name in direct.connections:
                runner.run(direct.evaluate(name, expression, count, times[f"{call}, {name}"]))
    show(times)


def compare_processes(url: str) -> None:
    harness_browser = shutil.which("harness-browser", path=os.path.dirname(sys.executable))
    assert harness_browser is not None, "the package is not installed beside this interpreter"
    commands: dict[str, list[str]] = {
        "import the helpers": [sys.executable, "-c", "import harness_ipc.browser.helpers"],
        'harness-browser -c "print(page_info())"': [harness_browser, "-c", "print(page_info())"],
        'harness-browser -c "print(snapshot())"': [harness_browser, "-c", "print(snapshot())"],
    }
    programs = [path for path in os.environ.get("AGENT_BROWSER", shutil.which("agent-browser") or "").split(os.pathsep) if path]
    if not programs:
        print("agent-browser is left out: it is not on PATH, and AGENT_BROWSER does not name it")
    for program in programs:
        name = os.path.basename(program)
        commands |= {f"{name} eval 1": [program, "eval", "1"], f"{name} snapshot": [program, "snapshot"]}
    times: dict[str, list[float]] = {what: [] for what in commands}
    with contextlib.ExitStack() as stack:
        for program in programs[:1]:
            stack.enter_context(agent_browser(program, url))
        for _ in range(PROCESSES):
            for what, command in commands.items():
                begun = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times[what].append(time.perf_counter() - begun)
    show(times)
    bare, warm, snapshot, *others = (median(seconds) for seconds in times.values())
    print(f"{'page_info() of the import':40}     {warm / bare:.2f}")
    for program, evaluated, theirs in zip(programs, others[::2], others[1::2], strict=True):
        name = os.path.basename(program)
        print(f"{f'page_info() of {name} eval':40}     {warm / evaluated:.2f}")
        print(f"{f'snapshot() of {name} snapshot':40}     {snapshot / theirs:.2f}")


@contextlib.contextmanager
def agent_browser(program: str, url: str) -> Iterator[None]:
    """Have agent-browser hold a browser of the same kind, with the same page."""
    settings = {"AGENT_BROWSER_SESSION": "harness-benchmark", "AGENT_BROWSER_EXECUTABLE_PATH": find_binary() or ""}
    os.environ |= settings | ({"AGENT_BROWSER_ARGS": "--no-sandbox"} if is_root() else {})
    subprocess.run([program, "open", url], check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([program, "close"], check=True, stdout=subprocess.DEVNULL)


def large_page(folder: Path) -> str:
    """Write a page of 2,000 elements, and return its address."""
    items = (f"<li><a href=/{i}>Item {i}</a><span>text {i}</span><button>Do {i}</button></li>" for i in range(500))
    path = folder / "large.html"
    path.write_text(f"<!doctype html><title>Large</title><ul>{''.join(items)}</ul>", encoding="utf-8")
    return path.as_uri()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="hb-") as directory:
        base = Path(directory)
        settings: dict[str, Any] = {"HARNESS_IPC_RUNTIME_DIR": base / "run", "HARNESS_IPC_LOG_DIR": base / "log"}
        settings |= {"HARNESS_CHROME_PROFILE": base / "profile", "HARNESS_CHROME_OWN": "1", "BU_NAME": "browser"}
        # Its sandbox is off, and all that it visits is blank, or our own.
        settings |= {"HARNESS_CHROME_ROOT": "1"}
        os.environ.update({name: str(value) for name, value in settings.items()})
        try:
            helpers.page_info()
            os.environ["HARNESS_CHROME_PROFILE"] = str(base / "direct")
            direct = Direct()
            with other_browser(base) as other, asyncio.Runner() as runner:
                runner.run(direct.start(other.websocket))
                try:
                    compare_calls(runner, direct)
                    compare_transports(runner, direct)
                finally:
                    runner.run(direct.stop())
            os.environ["HARNESS_CHROME_PROFILE"] = str(base / "profile")
            helpers.goto_url(url := large_page(base))
            helpers.wait_for_load()
            # The commands begin in that tab, if nobody is in it.
            helpers.disconnect()
            compare_processes(url)
        finally:
            helpers.disconnect()
            stop_daemon("browser")


if __name__ == "__main__":
    main()
