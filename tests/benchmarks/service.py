"""The overhead of a `Service`: `python -m tests.benchmarks.service` calls one and a plain handler in turns."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from typing import Any

from harness_ipc import Client, Service, method, run_daemon
from harness_ipc.testing import running

LIMIT = 1.15
ROUNDS = 60
# Calls of one turn.
CALLS = 100


class Words(Service):
    @method
    async def count(self, text: str) -> int:
        return len(text.split())

    @method
    def count_in_a_thread(self, text: str) -> int:
        return len(text.split())


async def handle(message: dict[str, Any]) -> dict[str, Any]:
    return {"result": len(message["params"]["text"].split())}


def take_turn(client: Client, name: str) -> float:
    """Return the median time of a call in seconds."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        client.call(name, text="the quick brown fox")
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> int:
    with contextlib.ExitStack() as stack:
        clients = []
        for name in ("plain", "service"):
            daemon = stack.enter_context(running([sys.executable, "-m", "tests.benchmarks.service", name], name))
            clients.append(stack.enter_context(daemon.connect()))
        plain, service = clients
        contestants = {
            "plain handler": (plain, "count"),
            "service": (service, "count"),
            "in a thread": (service, "count_in_a_thread"),
        }
        rounds = [{key: take_turn(*how) for key, how in contestants.items()} for _ in range(ROUNDS)]
    ratios = {key: statistics.median(found[key] / found["plain handler"] for found in rounds) for key in contestants}
    for key, ratio in ratios.items():
        print(f"{key:14} {statistics.median(found[key] for found in rounds) * 1e6:6.1f} us, {ratio:.2f} of a plain handler's")
    print(f"limit: {LIMIT}")
    return int(ratios["service"] > LIMIT)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_daemon(Words() if sys.argv[1] == "service" else handle, sys.argv[1])
    else:
        sys.exit(main())
