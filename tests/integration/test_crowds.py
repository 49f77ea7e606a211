"""Many misbehaving peers cost no threads and delay no other client; stops and restarts lose no request."""

from __future__ import annotations

import contextlib
import operator
import os
import random
import struct
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from harness_ipc import connect_daemon, log_path, request, stop_daemon
from harness_ipc._registry import records
from tests.support import crowd
from tests.support.managed import kill_all
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, spawn_daemon, spawn_python, wait_until
from tests.support.wire import FrameConnection, dial_daemon

CROWD = 200
# Rounds of the race tests: with HARNESS_TEST_MINUTE, what takes about a minute.
STOPS, IDLE_ENDS = (60, 300) if os.environ.get("HARNESS_TEST_MINUTE") else (5, 20)


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
    """Return the command line of a daemon that records its requests."""
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
    """Yield the directory of the records; at the end, stop the daemon."""
    yield private_directories
    stop_daemon("race", timeout=5.0)
    kill_all()


@needs_posix
def test_a_request_at_the_moment_of_an_idle_end_is_answered(race: Path) -> None:
    start = command(race, 0.2)
    rng = random.Random(1)
    with connect_daemon("race", start=start) as client:
        for n in range(IDLE_ENDS):
            # The idle timeout is 0.2 s: send requests around its expiry.
            time.sleep(rng.uniform(0.19, 0.21))
            reply = client.request({"n": n}) if n % 2 else request("race", {"n": n}, start=start)
            assert reply["result"] == n
    assert [int(line) for line in (race / "ran").read_text().split()] == [*range(IDLE_ENDS)]


@needs_posix
def test_threads_beside_restarts_lose_nothing(race: Path) -> None:
    start = command(race, None)
    answered: list[int] = []
    over = threading.Event()

    def ask(n: int) -> None:
        while not over.is_set():
            assert client.request({"n": n})["result"] == n
            answered.append(n)
            n += 16

    def wait_for_answers(more: int) -> None:
        enough = len(answered) + more
        wait_until(lambda: len(answered) > enough or any(job.done() for job in asking))

    with connect_daemon("race", start=start) as client, ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(ask, thread) for thread in range(16)]
        stops = 0
        try:
            for _ in range(STOPS):
                wait_for_answers(random.randrange(20, 1000))
                stops += stop_daemon("race")
        finally:
            over.set()
        for job in asking:
            job.result(PATIENCE)
    assert stops == STOPS
    # Each answered request has run exactly once.
    assert sorted(int(line) for line in (race / "ran").read_text().split()) == sorted(answered)


@needs_posix
@pytest.mark.parametrize("driver", ["loop", "pump"])
def test_requests_survive_leaving_clients_during_drains(driver: str, race: Path) -> None:
    over = race / "over"

    def census() -> tuple[int, int, int]:
        """Return the numbers of the daemon's tasks, threads and descriptors, with one client."""
        with connect_daemon(crowd.NAME, start=crowd.start_command(race, driver), timeout=PATIENCE) as client:
            tasks, threads = client.call("census")
            return tasks, threads, psutil.Process(client.pid).num_fds()

    def run_clients() -> None:
        while not over.exists():
            with spawn_python("-m", "tests.support.crowd", "client", str(race), driver) as client:
                assert client.wait() == 0

    tasks, threads, descriptors = census()
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(run_clients) for _ in range(8)]
        stops = 0
        try:
            while stops < STOPS or not has_outcomes(race):
                assert not any(client.done() for client in clients)
                threading.Event().wait(random.uniform(0.1, 0.8))
                stops += stop_daemon(crowd.NAME, timeout=PATIENCE)
        finally:
            over.touch()
    for client in clients:
        client.result()
    check_outcomes(race)
    # A pump keeps its accepting threads.
    warm = 8 if driver == "pump" else 0
    wait_until(lambda: all(map(operator.le, census(), (tasks, threads + warm, descriptors))))
    # The daemon of a killed starter may win against that of the next starter, which then logs AlreadyRunning.
    log = log_path(crowd.NAME).read_text(encoding="utf-8")
    assert log.count("Traceback") == log.count("AlreadyRunning: "), log
    stop_daemon(crowd.NAME, timeout=PATIENCE)


def has_outcomes(directory: Path) -> bool:
    """Return whether requests have been answered, and others left."""
    words = {line.split()[0] for file in directory.glob("outcomes.*") for line in file.read_text().splitlines()}
    return words >= {"result", "left"}


def check_outcomes(directory: Path) -> None:
    """Check that each request with a result ran once, and that no request ran twice or was lost."""
    ran = Counter((directory / "ran").read_text().split())
    outcomes: Counter[str] = Counter()
    for file in directory.glob("outcomes.*"):
        lines = [line.split() for line in file.read_text().splitlines()]
        fates = {words[1]: words for words in lines}
        outcomes.update(words[0] for words in fates.values())
        for name, (word, _, *error) in fates.items():
            # A start may fail if the starter is killed or the daemon is stopped during its start.
            assert word in ("begin", "result", "left") or error[:2] == ["StartFailed", "False"], (name, word, error)
            assert ran[name] in {"result": [1], "error": [0]}.get(word, [0, 1]), (name, word)
    assert max(ran.values()) == 1
    assert outcomes["result"]
    assert outcomes["left"]
