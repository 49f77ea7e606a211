"""Latency of a request, against what a daemon without this package does today.

The reference, "connect each time", is an asyncio unix server that speaks JSON lines, checks no one and is connected for each
request. Each contestant's server is a process of its own; the contestants take turns in one run, so that a drift of the
machine's speed hits all of them, and the ratio to the reference is what to quote.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from harness_ipc import connect_daemon, request

from .servers import LINE_SERVER, OWN_SERVER

_MESSAGE = {"method": "ping", "params": {}}
# Fractions of the reference's time that the two ways to use this package may take.
_LIMITS = {"kept connection": 0.75, "one shot": 2.0}


def _connect_each_time(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(json.dumps(_MESSAGE).encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            chunk = sock.recv(65536)
            if not chunk:
                raise ConnectionError("the reference server closed the connection")
            data += chunk
    json.loads(data)


@contextlib.contextmanager
def _server(*arguments: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.servers", *arguments], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise SystemExit(f"the server {arguments[0]} did not start")
        yield
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _time(action: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant (default: 20)")
    parser.add_argument("--requests", type=int, default=200, help="requests of a turn (default: 200)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()

    times: dict[str, list[float]] = {"connect each time (reference)": [], "kept connection": [], "one shot": []}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HARNESS_IPC_RUNTIME_DIR"] = os.path.join(directory, "run")
        os.environ["HARNESS_IPC_LOG_DIR"] = os.path.join(directory, "log")
        path = os.path.join(directory, "line.sock")
        with _server(LINE_SERVER, path), _server(OWN_SERVER, "benchmark"), connect_daemon("benchmark") as client:
            contestants: list[Callable[[], object]] = [
                lambda: _connect_each_time(path),
                lambda: client.request(_MESSAGE),
                lambda: request("benchmark", _MESSAGE),
            ]
            for action in contestants:
                _time(action, options.requests)
            for _ in range(options.rounds):
                for name, action in zip(times, contestants, strict=True):
                    times[name] += _time(action, options.requests)

    reference = statistics.median(times["connect each time (reference)"])
    rows = [
        {
            "contestant": name,
            "p50_us": round(statistics.median(values), 1),
            "p99_us": round(statistics.quantiles(values, n=100)[98], 1),
            "ratio": round(statistics.median(values) / reference, 2),
            "at_most": _LIMITS.get(name),
        }
        for name, values in times.items()
    ]
    if options.json:
        print(json.dumps({"python": platform.python_version(), "machine": platform.platform(), "rows": rows}, indent=1))
        return 0
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores, {options.rounds * options.requests} requests each")
    print(f"{'':32}{'p50 us':>10}{'p99 us':>10}{'ratio':>8}{'at most':>9}")
    for row in rows:
        limit = "" if row["at_most"] is None else f"{row['at_most']:.2f}"
        print(f"{row['contestant']:32}{row['p50_us']:>10}{row['p99_us']:>10}{row['ratio']:>8.2f}{limit:>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
