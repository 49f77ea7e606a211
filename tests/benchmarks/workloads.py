"""The workloads. The contestants take turns in small rounds, so that a drift of the machine's speed affects all of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

import psutil

from harness_ipc import connect_daemon, request, stop_daemon

from . import concurrency
from .clients import CONTESTANTS, PING, PONG, ask_by_line
from .report import OURS, Row, compare, make_row
from .servers import BE_BUSY

Values = dict[str, list[float]]

CLIENTS = 8
IDLE = (0, 100, 1000)
# Of one turn: requests one after the other, seconds of several clients, requests with a pause before each.
REQUESTS = 50
SECONDS = 0.2
BUSY_REQUESTS = 20


def version_of(needs: str) -> str | None:
    try:
        return metadata.version(needs)
    except metadata.PackageNotFoundError:
        return None


class Process:
    """A server or a client of the benchmark."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        command = [sys.executable, "-m", f"tests.benchmarks.{arguments[0]}", *arguments[1:]]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def expect(self, word: str) -> str:
        """Read a line that begins with `word`, and return the rest of it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(word) or not line:
            raise SystemExit(f"{self.arguments}: {line!r} instead of {word!r}")
        return line.removeprefix(word).strip()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()


class Bench(contextlib.ExitStack):
    """The processes of one workload, ended at the end of the block."""

    def __init__(self, workload: str, directory: str, rounds: int) -> None:
        super().__init__()
        self.workload = workload
        self._directory = directory
        self._rounds = rounds
        self._addresses: dict[str, str] = {}

    def process(self, *arguments: str) -> Process:
        process = Process(*arguments)
        self.callback(process.end)
        return process

    def serve(self, name: str, address: str) -> tuple[Process, str]:
        """Start a server and return its address: for our daemon the name, for others a path of that name."""
        server = self.process("servers", name, address if name == OURS else self.place(address))
        return server, server.expect("ready")

    def place(self, name: str) -> str:
        """Return the address of a server: for our daemon the name, for others a path of that name."""
        return name if name == OURS else os.path.join(self._directory, name)

    def client(self, name: str) -> Process:
        """Start a client of the server of its kind."""
        if name not in self._addresses:
            self._addresses[name] = self.serve(name, f"s{len(self._addresses)}")[1]
        return self.process("clients", name, self._addresses[name])

    def in_turns(self, turns: Mapping[str, Callable[[int], list[float]]]) -> Values:
        values: Values = {name: [] for name in turns}
        # The first turn is a warm-up.
        for number in range(-1, self._rounds):
            for name, turn in turns.items():
                measured = turn(number)
                values[name] += measured if number >= 0 else []
        return values

    def row(self, contestant: str, values: list[float], unit: str, **more: Any) -> Row:
        return make_row(self.workload, contestant, values, unit, **more)

    def rows_of(self, values: Values, unit: str) -> list[Row]:
        return [self.row(name, values[name], unit) for name in values]


def order(clients: list[Process], **what: Any) -> list[dict[str, Any]]:
    """Send all clients the same order, release them together when all are ready, and return their results."""
    for client in clients:
        client.tell(json.dumps(what))
    for client in clients:
        client.expect("ready")
    for client in clients:
        client.tell("go")
    return [json.loads(client.expect("")) for client in clients]


def latency(client: Process, seed: int = 0, /, **what: Any) -> list[float]:
    """Return the microseconds of each request."""
    return list(order([client], seed=seed, **what)[0]["times"])


def throughput(clients: list[Process], seed: int = 0, /, **what: Any) -> list[float]:
    """Return the requests/s of all clients together."""
    done = order(clients, **what)
    return [sum(it["count"] for it in done) / (max(it["end"] for it in done) - min(it["begin"] for it in done))]


def all_contestants(bench: Bench, *, kept: bool, clients: int = 1) -> list[Row]:
    """One client measures its latency, several their throughput."""
    fit = {name: it for name, it in CONTESTANTS.items() if it.at_once or clients == 1}
    turns: dict[str, Callable[[int], list[float]]] = {}
    for name, it in fit.items():
        if it.needs is None or version_of(it.needs):
            processes = [bench.client(name) for _ in range(clients)]
            if clients == 1:
                turns[name] = partial(latency, processes[0], kept=kept, count=REQUESTS)
            else:
                turns[name] = partial(throughput, processes, kept=kept, seconds=SECONDS)
    values = bench.in_turns(turns)
    unit = "µs" if clients == 1 else "requests/s"
    marks = {name: {"same_job": it.same_job, "authenticates": it.authenticates} for name, it in fit.items()}
    rows = [bench.row(name, values.get(name, []), unit, **marks[name]) for name in fit]
    return compare(rows, {"floor": "floor", "U": "U"})


def payload(bench: Bench, *, mebibytes: int, of: tuple[str, str]) -> list[Row]:
    what = {"kept": True, "size": mebibytes * 2**20, "count": 1}
    values = bench.in_turns({name: partial(latency, bench.client(name), **what) for name in of})
    rows = bench.rows_of({name: [value / 1000 for value in values[name]] for name in of}, "ms")
    return compare(rows, {"floor": of[0]})


def idle_connections(bench: Bench) -> list[Row]:
    turns, extra = {}, {}
    for count in IDLE:
        name = f"beside {count:,}"
        server, address = bench.serve(OURS, f"idle{count}")
        client = bench.process("clients", OURS, address)
        # The baseline is a daemon that has already served a request.
        for kept in (True, False):
            order([client], kept=kept, count=REQUESTS)
        daemon = psutil.Process(server.pid)
        before = daemon.memory_full_info()
        for _ in range(count):
            bench.enter_context(connect_daemon(address)).request(PING)
        after = daemon.memory_full_info()
        memory = {
            f"{kind.upper()} MiB": round((getattr(after, kind) - getattr(before, kind)) / 2**20, 1) for kind in ("rss", "uss")
        }
        extra[name] = {**memory, "threads": daemon.num_threads()}
        turns[name] = partial(latency, client, kept=True, count=REQUESTS)
    values = bench.in_turns(turns)
    return compare([bench.row(name, values[name], "µs", extra=extra[name]) for name in turns], {"none": "beside 0"})


def busy_loop(bench: Bench) -> list[Row]:
    reference, ours = bench.serve("U", "busy")[1], bench.serve(OURS, "busy")[1]
    ask_by_line(reference, BE_BUSY)
    request(ours, BE_BUSY)
    kinds = {"U": ("U", reference, False), f"{OURS}, one shot": (OURS, ours, False), f"{OURS}, kept": (OURS, ours, True)}
    turns = {
        kind: partial(latency, bench.process("clients", name, address), kept=kept, count=BUSY_REQUESTS, pauses=True)
        for kind, (name, address, kept) in kinds.items()
    }
    # Means: a median would depend on whether the loop is more often busy or free.
    return compare(bench.rows_of(bench.in_turns(turns), "µs"), {"U": "U"}, by="mean")


# Whole processes.

ASK = f"import sys\nfrom harness_ipc import request\nassert request(sys.argv[1], {PING}) == {PONG}"
ASK_U = f"""
import asyncio, json, sys

async def main():
    reader, writer = await asyncio.open_unix_connection(sys.argv[1])
    writer.write(json.dumps({PING}).encode() + b"\\n")
    assert json.loads(await reader.readline()) == {PONG}
    writer.close()

asyncio.run(main())
"""
DAEMON = f"""
from harness_ipc import run_daemon

async def handle(message):
    return {PONG}

run_daemon(handle, "cold")
"""
START_AND_ASK = f"""
import sys
from harness_ipc import ensure_daemon, request
ensure_daemon("cold", [sys.executable, "-c", sys.argv[1]])
assert request("cold", {PING}) == {PONG}
"""
# The imports of the two processes of a start.
DAEMON_IMPORTS = "import asyncio, psutil, harness_ipc.daemon\nfrom filelock import FileLock"
CLIENT_IMPORTS = "import harness_ipc.manager\nfrom filelock import FileLock"


def run_python(*arguments: str) -> float:
    """Run an interpreter to its end, and return the milliseconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", *arguments], check=True)
    return (time.perf_counter() - begin) * 1000


def fresh_process(bench: Bench) -> list[Row]:
    own, line = bench.serve(OURS, "fresh")[1], bench.serve("U", "fresh")[1]
    commands = {"bare interpreter": ("pass",), "U": (ASK_U, line), OURS: (ASK, own)}
    # A turn is two of each.
    turns = {name: lambda _, it=it: [run_python(*it), run_python(*it)] for name, it in commands.items()}
    return compare(bench.rows_of(bench.in_turns(turns), "ms"), {"U": "U"})


def cold_start(bench: Bench) -> list[Row]:
    def start(_: int) -> list[float]:
        milliseconds = run_python(START_AND_ASK, DAEMON)
        stop_daemon("cold")
        return [milliseconds]

    def import_only(_: int) -> list[float]:
        return [run_python(DAEMON_IMPORTS) + run_python(CLIENT_IMPORTS)]

    bench.callback(stop_daemon, "cold")
    reference = "its imports, in two fresh interpreters"
    return compare(bench.rows_of(bench.in_turns({reference: import_only, OURS: start}), "ms"), {"imports": reference})


JSON_ECHO = ("floor", OURS)
BYTES_ECHO = ("floor, bytes", "harness_ipc._transport")
WORKLOADS: dict[str, Callable[[Bench], list[Row]]] = {
    "one shot": partial(all_contestants, kept=False),
    "kept connection": partial(all_contestants, kept=True),
    "8 clients, one shots": partial(all_contestants, kept=False, clients=CLIENTS),
    "8 clients, kept": partial(all_contestants, kept=True, clients=CLIENTS),
    "1 MiB, JSON": partial(payload, mebibytes=1, of=JSON_ECHO),
    "1 MiB, bytes": partial(payload, mebibytes=1, of=BYTES_ECHO),
    "16 MiB, JSON": partial(payload, mebibytes=16, of=JSON_ECHO),
    "16 MiB, bytes": partial(payload, mebibytes=16, of=BYTES_ECHO),
    "idle connections": idle_connections,
    "busy loop": busy_loop,
    "fresh process": fresh_process,
    "cold start": cold_start,
    "50 calls of 0.1 s at once": concurrency.calls_at_once,
    "16 threads, 320 calls of 10 ms": concurrency.threads_at_once,
    **{f"stream of {kind}": partial(concurrency.stream, kind=kind) for kind in concurrency.STREAMS},
    "departure": concurrency.departure,
}


def run(workload: str, directory: str, rounds: int) -> list[Row]:
    """Measure one workload with processes of its own, and end them."""
    os.makedirs(directory)
    with Bench(workload, directory, rounds) as bench:
        return WORKLOADS[workload](bench)
