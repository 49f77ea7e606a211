"""Mixed load under Windows CPython: eight clients, and the resources of daemon and wineserver, measured on the Linux side.

``python -m tests.windows.load 3.12 600`` prints a line every half minute, and the clients' counts at the end. It fails if one
of them had an error, or if memory or descriptors have grown.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.windows.__main__ import ROOT, wine

CLIENTS = 8
# Seconds between two measurements, and before the first one, when caches are filled and threads started.
INTERVAL = 30.0
WARM_UP = 60.0
# Permitted growth since the first measurement: heap fragmentation, connections in use.
MEMORY = 8 * 1024 * 1024
DESCRIPTORS = 40


def look(daemon: psutil.Process, server: psutil.Process) -> tuple[int, int, int, int]:
    """Return the daemon's memory in bytes, its descriptors and threads, and the descriptors of wineserver."""
    with daemon.oneshot():
        return daemon.memory_info().rss, daemon.num_fds(), daemon.num_threads(), server.num_fds()


def find(prefix: str, *words: str) -> psutil.Process:
    """Return the newest process of this Wine prefix whose command line has all `words`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if all(word in line for word in words) and process.environ().get("WINEPREFIX") == prefix:
                found.append(process)
    return max(found, key=lambda process: process.create_time())


def main(version: str, seconds: float) -> int:
    with tempfile.TemporaryDirectory(prefix="hw-") as directory, wine(version) as (interpreter, prefix_environment):
        places = {f"HARNESS_IPC_{what}_DIR": f"Z:{Path(directory, what)}".replace("/", "\\") for what in ("RUNTIME", "LOG")}
        environment = {**prefix_environment, **places}
        python = ["wine", str(interpreter), "-X", "utf8", "-m"]
        # With a regular file as its output, the interpreter crashes on Wine 8.
        pipes = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        pipes["stderr"] = subprocess.STDOUT
        daemon = subprocess.Popen([*python, "tests.support.processes", "load", "{}"], **pipes)  # type: ignore[call-overload]
        try:
            assert daemon.stdout.readline() == "ready\n"
            clients = [
                subprocess.Popen([*python, "tests.windows.client", "load", str(seconds)], **pipes)  # type: ignore[call-overload]
                for _ in range(CLIENTS)
            ]
            prefix = environment["WINEPREFIX"]
            processes = find(prefix, "python.exe", "tests.support.processes", "load"), find(prefix, "wineserver")
            begun, looks = time.monotonic(), []
            while living := [client for client in clients if client.poll() is None]:
                passed = time.monotonic() - begun
                seen = look(*processes)
                if passed >= WARM_UP and passed < seconds:
                    looks.append(seen)
                print(
                    f"{passed:6.0f} s  daemon: {seen[0] / 2**20:6.1f} MiB, {seen[1]} descriptors, {seen[2]} threads; "
                    f"wineserver: {seen[3]} descriptors",
                    flush=True,
                )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    living[-1].wait(INTERVAL)
            for client in clients:
                print(client.stdout.read().strip() or "no report")
            failed = sum(client.wait() != 0 for client in clients)
        finally:
            daemon.terminate()
            daemon.wait()
    grown = [last - first for first, last in zip(looks[0], looks[-1], strict=True)] if looks else [0, 0, 0, 0]
    print(
        f"{CLIENTS - failed} of {CLIENTS} clients met no error; grown since the first minute: {grown[0] / 2**20:.1f} MiB, "
        f"{grown[1]} descriptors, {grown[2]} threads; wineserver: {grown[3]} descriptors"
    )
    return int(failed > 0 or grown[0] > MEMORY or max(grown[1], grown[3]) > DESCRIPTORS)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
