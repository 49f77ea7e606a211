"""Many processes and threads use one browser at once, each in a tab of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness_ipc.browser import helpers
from tests.browser.conftest import main_processes
from tests.browser.site import Site
from tests.support.managed import the_log
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = needs_chromium

# Duration of the run: HARNESS_TEST_MINUTE makes it longer.
SECONDS = 60.0 if os.environ.get("HARNESS_TEST_MINUTE") else 6.0
PROCESSES = 8
THREADS = 8


@contextlib.contextmanager
def drivers(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a process of `tests.browser.driver` for each command. Each waits for a line."""
    pipe = subprocess.PIPE
    processes = []
    try:
        for arguments in commands:
            command = [sys.executable, "-W", "error", "-m", "tests.browser.driver", *arguments]
            processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8"))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def results(processes: list[subprocess.Popen[str]], patience: float) -> list[Any]:
    """Have the processes begin, and return the JSON that each one prints at its end."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    with ThreadPoolExecutor(len(processes)) as pool:
        ends = list(pool.map(lambda process: process.communicate(timeout=patience), processes))
    assert [errors for _, errors in ends] == [""] * len(processes)
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(output) for output, _ in ends]


def test_eight_first_uses_at_once_are_one_daemon_and_one_browser(fresh: Path) -> None:
    with drivers([["look"]] * PROCESSES) as processes:
        assert not (fresh / "run").exists()
        found = results(processes, PATIENCE)
    assert found == [found[0]] * PROCESSES
    assert found[0]["url"] == "about:blank"
    assert set(main_processes(fresh)) == {found[0]["browser"], found[0]["daemon"]}
    assert the_log("browser").count("INFO harness_ipc.daemon: starting browser") == 1
    assert the_log("browser").count("started pid") == 1
    assert helpers.js("6 * 7") == 42


@pytest.mark.timeout(SECONDS + 4 * PATIENCE)
def test_processes_and_threads_drive_sixteen_tabs_at_once(page: str, site: Site) -> None:
    before = helpers.connect().request({"meta": "connection_status"})
    command = ["drive", site.url, str(SECONDS)]
    crowd = [[*command, f"process-{number}"] for number in range(PROCESSES)]
    crowd.append([*command, *(f"thread-{number}" for number in range(THREADS))])
    with drivers(crowd) as processes:
        rounds = [count for counts in results(processes, SECONDS + 2 * PATIENCE) for count in counts]
    print(rounds)
    assert len(rounds) == PROCESSES + THREADS
    assert all(rounds)
    after = helpers.connect().request({"meta": "connection_status"})
    assert (after["pid"], after["connected"]) == (before["pid"], True)
    assert helpers.current_tab()["targetId"] == page
