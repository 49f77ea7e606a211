"""Mixed clients against one daemon that is restarted and killed, with the outcome of every request.

``python -m tests.soak SECONDS``. Each client is a process that runs for a few seconds; there are always as many of each kind. A
line every ten seconds shows the resources of the daemon, and the summary the outcomes of all requests. The exit status is 1 if
a request has no outcome or got the reply to another one, if a client hung or got an unexpected exception, or if an honest
client is not served at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

from harness_ipc import HarnessIPCError, ensure_daemon, request, restart_daemon, stop_daemon
from tests.soak.client import ARGV, KINDS, NAME
from tests.soak.daemon import text_of
from tests.support.managed import kill_all, live_processes
from tests.support.processes import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
CLIENTS = {"one shot": 3, "kept": 3, "large": 1, "slow reader": 2, "dying": 1, "hostile": 3}
# Seconds that a client runs, and that it may take to end: its last request has a timeout of 30.
LIFE = (2.0, 10.0)
HANG = 90.0
INTERVAL = 10.0
# Seconds of one run of the daemon: a fifteenth of the total, but long enough for two measurements.
RUN = 20.0
# Seconds after which the daemon has dropped all silent clients.
SETTLE = 3.0


class Held(NamedTuple):
    """The resources of the idle daemon."""

    memory: int
    descriptors: int
    threads: int

    def __str__(self) -> str:
        return f"{self.memory / 2**20:.1f} MiB, {self.descriptors} descriptors, {self.threads} threads"


class Soak:
    """The clients, the daemon, and their results so far."""

    def __init__(self, base: Path, seconds: float) -> None:
        self.pause = base / "pause"
        self.end = time.monotonic() + seconds
        self.begin = time.monotonic()
        self.run = max(RUN, seconds / 15)
        self.living: dict[subprocess.Popen[str], tuple[str, float]] = {}
        self.asked = self.crossed = self.hung = 0
        self.fates: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.clients = 0
        self.runs: list[tuple[Held, Held]] = []

    def passed(self) -> float:
        return time.monotonic() - self.begin

    # Clients.

    def start_client(self, kind: str) -> None:
        seconds = min(random.uniform(*LIFE), max(0.0, self.end - time.monotonic()))
        client = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.soak.client", kind, str(seconds), str(self.pause)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self.living[client] = kind, time.monotonic() + seconds + HANG
        self.clients += 1

    def look_after_clients(self, *, replace: bool) -> None:
        for client, (kind, latest) in list(self.living.items()):
            if client.poll() is None:
                if time.monotonic() < latest:
                    continue
                self.hung += 1
                client.terminate()
            del self.living[client]
            try:
                out, err = client.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                client.kill()
                out, err = client.communicate()
            self.note(kind, client, out, err)
        if replace:
            there = Counter(kind for kind, _ in self.living.values())
            for kind, count in CLIENTS.items():
                for _ in range(count - there[kind]):
                    self.start_client(kind)

    def note(self, kind: str, client: subprocess.Popen[str], out: str, err: str) -> None:
        if not out or err:
            self.unexpected.append(f"a {kind} client ended with status {client.returncode}: {err.strip() or 'no report'}")
        if out:
            report = json.loads(out)
            self.asked += report["asked"]
            self.crossed += report["crossed"]
            self.fates.update(report["fates"])
            self.faults.update(report["faults"])

    # The daemon.

    def look(self) -> Held:
        """Return the resources of the daemon, without kept connections of the clients."""
        pong = request(NAME, {"meta": "ping"}, timeout=PATIENCE)
        process = psutil.Process(pong["pid"])
        with process.oneshot():
            if sys.platform == "win32":
                descriptors = process.num_handles()
            else:
                descriptors = process.num_fds()
            return Held(process.memory_info().rss, descriptors - pong["connections"], process.num_threads())

    def look_at_rest(self) -> Held:
        self.pause.touch()
        try:
            self.wait(SETTLE)
            return self.look()
        finally:
            self.pause.unlink()

    def wait(self, seconds: float) -> None:
        """Wait, replace ended clients, and print progress."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.look_after_clients(replace=True)
            time.sleep(min(left, 0.1))
            if self.passed() // INTERVAL != self.reported // INTERVAL:
                self.reported = self.passed()
                self.print_progress()

    reported = 0.0

    def print_progress(self) -> None:
        try:
            held = str(self.look())
        except (HarnessIPCError, psutil.Error) as error:
            held = str(error)
        print(f"{self.passed():5.0f} s  run {len(self.runs) + 1}: {held}; {self.asked} requests reported", flush=True)

    def one_run(self) -> None:
        """Measure the daemon twice, then restart or kill it."""
        self.wait(self.run / 4)
        first = self.look_at_rest()
        self.wait(self.run / 2)
        self.runs.append((first, self.look_at_rest()))
        if random.random() < 0.5:
            self.faults["daemon restarted"] += 1
            # A client may start it at the same time.
            with contextlib.suppress(HarnessIPCError):
                restart_daemon(NAME)
        else:
            self.faults["daemon killed"] += 1
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(request(NAME, {"meta": "ping"}, timeout=PATIENCE)["pid"]).kill()
            self.wait(random.random())
        ensure_daemon(NAME, ARGV)

    def is_served(self) -> bool:
        message = {"tag": "honest", "text": "", "size": 1000}
        with contextlib.suppress(HarnessIPCError):
            return request(NAME, message, timeout=PATIENCE) == {"tag": "honest", "text": text_of("honest", 1000)}
        return False

    def summary(self) -> bool:
        """Print the summary, and return whether nothing failed."""
        served = self.is_served()
        lost = self.asked - self.fates.total()
        failures = {"lost": lost, "crossed": self.crossed, "hung": self.hung, "unexpected": len(self.unexpected)}
        print(f"{self.asked} requests of {self.clients} clients in {self.passed():.0f} s")
        print("fates: " + ", ".join(f"{fate} {count}" for fate, count in self.fates.most_common()))
        print("faults: " + ", ".join(f"{fault} {count}" for fault, count in sorted(self.faults.items())))
        print(", ".join(f"{what} {count}" for what, count in failures.items()))
        for text in self.unexpected[:10]:
            print(text)
        for number, (first, last) in enumerate(self.runs, 1):
            grown = [after - before for before, after in zip(first, last, strict=True)]
            print(
                f"run {number} at rest: {last}; grown by {grown[0] / 2**20:+.1f} MiB, {grown[1]:+d} descriptors, "
                f"{grown[2]:+d} threads"
            )
        if self.runs:
            before, after = self.runs[0][1], self.runs[-1][1]
            print(f"from the end of the first run to that of the last: {before} -> {after}")
        print("an honest client is served" if served else "an honest client is NOT served")
        return served and not any(failures.values())


def main(seconds: float) -> int:
    # Short, since the path of a socket is limited.
    with tempfile.TemporaryDirectory(prefix="hi-", ignore_cleanup_errors=os.name == "nt") as directory:
        base = Path(directory)
        os.environ.update(HARNESS_IPC_RUNTIME_DIR=str(base / "run"), HARNESS_IPC_LOG_DIR=str(base / "log"))
        # Return large blocks to the system when they are freed: memory kept by glibc would hide a leak.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
        os.chdir(ROOT)
        soak = Soak(base, seconds)
        try:
            ensure_daemon(NAME, ARGV)
            while time.monotonic() < soak.end:
                soak.one_run()
            while soak.living:
                soak.look_after_clients(replace=False)
                time.sleep(0.01)
            well = soak.summary()
            stop_daemon(NAME)
            wait_until(lambda: not live_processes())
        finally:
            kill_all()
    return 0 if well else 1


if __name__ == "__main__":
    assert CLIENTS.keys() == KINDS.keys()
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0))
