"""One client of the soak, in its own process: ``python -m tests.soak.client KIND SECONDS PAUSE``. It prints a report.

The outcome of a request is "answered", the name of our error, or "died" if the client killed itself before. While the file
PAUSE exists, it sends no requests, and holds only a kept connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import psutil

from harness_ipc import Client, HarnessIPCError, connect_daemon, ensure_daemon, request
from harness_ipc._protocol.handshake import Keys
from harness_ipc._registry import records
from tests.soak.daemon import text_of
from tests.support.wire import FrameConnection, dial_daemon

NAME = "soak"
ARGV = [sys.executable, "-m", "tests.soak.daemon", NAME]
MIB = 2**20
LARGEST = 16 * MIB
# Far above the time of a reply: a later one is lost.
TIMEOUT = 30.0
# Seconds between two attempts without a daemon.
PAUSE = 0.02
GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    struct.pack("!i", 2**31 - 1),
    struct.pack("!iQ", -1, 2**63),
    struct.pack("!i", -2),
    struct.pack("!i", 257) + bytes(257),
    os.urandom(1000),
]


class Asker:
    """Sends requests, and counts their outcomes."""

    def __init__(self) -> None:
        self.chance = random.Random()
        self.asked = 0
        self.crossed = 0
        self.fates: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.client: Client | None = None

    def message(self, largest: int = 2000) -> dict[str, Any]:
        self.asked += 1
        tag = f"{os.getpid()}-{self.asked}-{self.chance.randrange(10**6)};"
        size = self.chance.randrange(largest)
        return {"tag": tag, "text": text_of(tag, self.chance.randrange(largest)), "size": size}

    def settle(self, message: dict[str, Any], ask: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
        """Send a request, and count its outcome. Return whether there was a reply."""
        try:
            reply = ask(message)
        except HarnessIPCError as error:
            self.fates[type(error).__name__] += 1
            time.sleep(PAUSE)
            return False
        if "error" in reply:
            # A stopping daemon cancels requests after its grace period.
            self.fates[f"RemoteError {reply['error']['type']}"] += 1
            return False
        self.fates["answered"] += 1
        self.crossed += reply != {"tag": message["tag"], "text": text_of(message["tag"], message["size"])}
        return True

    def report(self) -> None:
        report = {"asked": self.asked, "crossed": self.crossed, "fates": self.fates, "faults": self.faults}
        print(json.dumps(report), flush=True)

    def die(self, fault: str) -> NoReturn:
        self.faults[fault] += 1
        self.report()
        psutil.Process().kill()
        raise AssertionError("it lives")

    # The kinds of clients.

    def one_shot(self) -> None:
        answered = self.settle(self.message(), lambda message: request(NAME, message, timeout=TIMEOUT))
        if not answered and self.chance.random() < 0.1:
            # Like a user's program.
            with contextlib.suppress(HarnessIPCError):
                ensure_daemon(NAME, ARGV)

    def kept(self, largest: int = 2000) -> None:
        if self.client is None or self.chance.random() < 0.01:
            self.forget()
            try:
                self.client = connect_daemon(NAME, timeout=TIMEOUT, request_timeout=TIMEOUT)
            except HarnessIPCError:
                time.sleep(PAUSE)
                return
        client = self.client
        self.settle(self.message(largest), client.request)
        if self.chance.random() < 0.02:
            # The next request must not get the reply to this one.
            late = {**self.message(), "seconds": 0.02}
            self.settle(late, lambda message: client.request(message, timeout=0.005))
            self.faults["given up"] += 1

    def large(self) -> None:
        self.kept(LARGEST)

    def slow_reader(self) -> None:
        def read_slowly(message: dict[str, Any]) -> dict[str, Any]:
            with dial_daemon(NAME) as connection:
                connection.send_bytes(json.dumps(message).encode())
                for _ in range(self.chance.randrange(30)):
                    time.sleep(0.01)
                    if self.chance.random() < 0.01:
                        break
                return dict(json.loads(connection.recv_bytes(4 * LARGEST)))

        self.settle(self.message(LARGEST), read_slowly)
        self.faults["slow readers"] += 1

    def dying(self) -> None:
        self.kept()
        if self.chance.random() < 0.9:
            return
        try:
            connection = dial_daemon(NAME)
        except HarnessIPCError:
            return
        frame = json.dumps({**self.message(100_000), "seconds": 0.05}).encode()
        self.fates["died"] += 1
        if self.chance.random() < 0.5 or os.name != "posix":
            with contextlib.suppress(HarnessIPCError):
                connection.send_bytes(frame)
            self.die("deaths before a reply")
        with contextlib.suppress(OSError):
            os.write(connection.fileno(), (struct.pack("!i", len(frame)) + frame)[: self.chance.randrange(1, len(frame))])
        self.die("deaths in a frame")

    def hostile(self) -> None:
        kind = self.chance.choice(["garbage", "wrong key", "silent", "half a frame", "no message"])
        with contextlib.suppress(HarnessIPCError, OSError, EOFError):
            if kind in ("half a frame", "no message"):
                with dial_daemon(NAME) as connection:
                    self.faults[kind] += 1
                    if kind == "no message" or os.name != "posix":
                        connection.send_bytes(b"{nonsense")
                        connection.recv_bytes(1000)
                    else:
                        os.write(connection.fileno(), struct.pack("!i", 100) + b"half")
                        time.sleep(self.chance.random())
                return
            with FrameConnection(records.load(NAME).address, TIMEOUT) as connection:
                self.faults[kind] += 1
                match kind:
                    case "garbage" if os.name == "posix":
                        os.write(connection.fileno(), self.chance.choice(GARBAGE))
                        connection.recv_bytes(1000)
                    case "garbage":
                        connection.send_bytes(os.urandom(200))
                    case "wrong key":
                        connection.prove(Keys(bytes(32), records.load(NAME).address))
                    case _:
                        time.sleep(self.chance.random())

    def forget(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None


KINDS: dict[str, Callable[[Asker], None]] = {
    "one shot": Asker.one_shot,
    "kept": Asker.kept,
    "large": Asker.large,
    "slow reader": Asker.slow_reader,
    "dying": Asker.dying,
    "hostile": Asker.hostile,
}


def main(kind: str, seconds: float, pause: str) -> None:
    # A client that has to be killed prints where it hangs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    asker = Asker()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if os.path.exists(pause):
                time.sleep(PAUSE)
            else:
                KINDS[kind](asker)
        asker.forget()
    finally:
        asker.report()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
