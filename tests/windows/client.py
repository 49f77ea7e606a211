"""One client of the load, in a Windows process: ``python -m tests.windows.client NAME SECONDS`` prints its counts as JSON."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections import Counter
from typing import Any

from harness_ipc import connect_daemon, request


def main(name: str, seconds: float) -> None:
    did: Counter[str] = Counter()
    end = time.monotonic() + seconds
    chance = random.Random()
    kept = connect_daemon(name)
    while time.monotonic() < end:
        what = chance.choice(["kept"] * 10 + ["one shot"] * 4 + ["large", "error", "abandoned", "reconnected"])
        words: Any = [chance.random() for _ in range(chance.randrange(20))]
        match what:
            case "kept":
                assert kept.call("echo", words=words) == {"words": words}
            case "one shot":
                message = {"method": "echo", "params": {"words": words}}
                assert request(name, message, timeout=60) == {"result": {"words": words}}
            case "large":
                text = "x" * chance.randrange(1 << 20)
                assert kept.call("echo", text=text) == {"text": text}
            case "error":
                assert kept.request({"method": "raise"})["error"] == {"type": "ValueError", "message": "as told"}
            case "abandoned":  # with a request in flight
                with connect_daemon(name) as left, contextlib.suppress(TimeoutError):
                    left.call("sleep", timeout=0.001, seconds=0.01)
            case "reconnected":
                kept.close()
                kept = connect_daemon(name)
        did[what] += 1
    kept.close()
    print(json.dumps(did))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
