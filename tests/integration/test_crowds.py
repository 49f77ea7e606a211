"""Many peers that misbehave cost no thread and delay no honest client; ends and restarts lose no request."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness_ipc import connect_daemon, request, stop_daemon
from harness_ipc._registry import records
from tests.managed import kill_all
from tests.marks import needs_linux, needs_posix
from tests.processes import PATIENCE, spawn_daemon, wait_until
from tests.wire import FrameConnection, dial_daemon

CROWD = 200
# Seconds of the tests of races: HARNESS_TEST_MINUTE is for a longer run.
SECONDS = 60.0 if os.environ.get("HARNESS_TEST_MINUTE") else 8.0


def send_one_byte(number: int) -> FrameConnection:
    peer = FrameConnection(records.load("crowd").address)
    os.write(peer.fileno(), b"\0")
    return peer


def send_half_a_frame(number: int) -> FrameConnection:
    peer = dial_daemon("crowd")
    os.write(peer.fileno(), struct.pack("!i", 1000) + b'{"method": ')
    return peer


def read_nothing(number: int) -> FrameConnection:
    peer = dial_daemon("crowd")
    peer.send_bytes(b'{"method": "fill", "params": {"size": 1000000}}')
    return peer


@needs_linux
@pytest.mark.parametrize("behave", [send_one_byte, send_half_a_frame, read_nothing])
def test_no_peer_costs_a_thread(behave: Callable[[int], FrameConnection]) -> None:
    with spawn_daemon("crowd", handshake_timeout=PATIENCE) as daemon, contextlib.ExitStack() as crowd:
        process = psutil.Process(daemon.pid)
        assert request("crowd", {"method": "echo", "params": {"n": 0}})["result"] == {"n": 0}
        before = process.num_threads()
        for number in range(CROWD):
            crowd.enter_context(behave(number))
        with connect_daemon("crowd") as client:
            for n in range(50):
                assert client.call("echo", n=n) == {"n": n}
                assert request("crowd", {"method": "echo", "params": {"n": n}})["result"] == {"n": n}
        assert process.num_threads() == before
        crowd.close()
        wait_until(lambda: request("crowd", {"meta": "ping"})["connections"] == 1)


def command(directory: Path, idle_timeout: float | None) -> list[str]:
    """Return what runs a daemon that notes each request that it runs."""
    source = f"""
    from harness_ipc import run_daemon

    ran = open({str(directory / "ran")!r}, "a", buffering=1)

    async def note(message):
        ran.write(f"{{message['n']}}\\n")
        return {{"result": message["n"]}}

    run_daemon(note, "race", idle_timeout={idle_timeout})
    """
    return [sys.executable, "-c", textwrap.dedent(source)]


@pytest.fixture
def race(private_directories: Path) -> Iterator[Path]:
    """Give the directory of the notes, and end the daemon."""
    yield private_directories
    stop_daemon("race", timeout=5.0)
    kill_all()


@needs_posix
def test_a_request_at_the_moment_of_an_idle_end_is_answered(race: Path) -> None:
    start = command(race, 0.2)
    rng = random.Random(1)
    asked = 0
    deadline = time.monotonic() + SECONDS
    with connect_daemon("race", start=start) as client:
        while time.monotonic() < deadline:
            # Around the idle end, which is what this test is about.
            time.sleep(rng.uniform(0.19, 0.21))
            message = {"n": asked}
            reply = client.request(message) if asked % 2 else request("race", message, start=start)
            assert reply["result"] == asked
            asked += 1
    assert [int(line) for line in (race / "ran").read_text().split()] == [*range(asked)]


@needs_posix
def test_threads_beside_restarts_lose_nothing(race: Path) -> None:
    start = command(race, None)
    failures: list[BaseException] = []
    answered: list[int] = []
    deadline = time.monotonic() + SECONDS

    def ask(thread: int) -> None:
        n = thread
        try:
            while time.monotonic() < deadline:
                assert client.request({"n": n})["result"] == n
                answered.append(n)
                n += 16
        except BaseException as error:
            failures.append(error)

    with connect_daemon("race", start=start) as client:
        threads = [threading.Thread(target=ask, args=[number]) for number in range(16)]
        for thread in threads:
            thread.start()
        stops = 0
        while time.monotonic() < deadline:
            stopped = threading.Event()
            stopped.wait(1.0)
            stops += stop_daemon("race")
        for thread in threads:
            thread.join(PATIENCE)
    assert failures == []
    assert stops > 0
    # Each once: what was answered ran, and nothing twice.
    assert sorted(int(line) for line in (race / "ran").read_text().split()) == sorted(answered)
