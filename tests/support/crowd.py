"""A daemon that records its requests, and clients that record replies: ``python -m tests.support.crowd ROLE DIRECTORY``.

A client sends requests in every way, disconnects during some, cancels some, and may kill itself. Each line of its file
`outcomes` is a word and the id of a request: "begin" before it is sent; then "result", "left" (on purpose), "crossed" (the
result of another request), or "error" with its type and `maybe_executed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil

from harness_ipc import AsyncClient, Client, HarnessIPCError, aconnect_daemon, connect_daemon, request, run_daemon
from harness_ipc._server import server
from tests.support.processes import PATIENCE, wait_until
from tests.support.wire import dial_daemon

NAME = "crowd"


def start_command(directory: Path, driver: str) -> list[str]:
    """Return the command line of the daemon, with a driver of its connections: "loop" or "pump"."""
    return [sys.executable, "-W", "error", "-m", "tests.support.crowd", "daemon", str(directory), driver]


def run(directory: Path, driver: str) -> None:
    server.USE_PUMP = driver == "pump"
    ran = open(directory / "ran", "a", buffering=1)  # noqa: SIM115

    async def produce(name: str, n: int) -> AsyncIterator[Any]:
        for i in range(n):
            yield [name, i]

    async def handle(message: dict[str, Any]) -> Any:
        method, params = message["method"], message["params"]
        if method == "census":
            return {"result": [len(asyncio.all_tasks()), threading.active_count()]}
        ran.write(f"{params['id']}\n")
        if method == "stream":
            return produce(params["id"], params["n"])
        await asyncio.sleep(params["seconds"])
        return {"result": [params["id"], "x" * params["size"]]}

    with ran:
        run_daemon(handle, NAME, grace_period=PATIENCE)


class Asker:
    """One client: the ways to send a request, and its records."""

    def __init__(self, directory: Path, driver: str) -> None:
        self.directory = directory
        self.start = start_command(directory, driver)
        self.outcomes = os.open(directory / f"outcomes.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.chance = random.Random()
        self.numbers = itertools.count()
        self.is_dying = False

    def connect(self) -> Client:
        return connect_daemon(NAME, start=self.start, timeout=PATIENCE, request_timeout=PATIENCE)

    def note(self, *words: object) -> None:
        os.write(self.outcomes, (" ".join(map(str, words)) + "\n").encode())

    def begin(self) -> dict[str, Any]:
        """Return the parameters of a new request."""
        params = {"id": f"{os.getpid()}.{next(self.numbers)}", "seconds": self.chance.choice([0, 0, 0.02])}
        params["size"] = self.chance.choice([10, 1000, 300_000])
        self.note("begin", params["id"])
        return params

    def settle(self, params: dict[str, Any], ask: Callable[[], Any]) -> None:
        """Send a request, and record its outcome."""
        try:
            result = ask()
        except HarnessIPCError as error:
            self.note("error", params["id"], type(error).__name__, error.maybe_executed, ascii(str(error)))
        else:
            self.note("result" if result == [params["id"], "x" * params["size"]] else "crossed", params["id"])

    def once(self, client: Client) -> None:
        params = self.begin()
        message = {"method": "echo", "params": params}
        self.settle(params, lambda: request(NAME, message, start=self.start, timeout=PATIENCE)["result"])

    def kept(self, client: Client) -> None:
        params = self.begin()
        self.settle(params, lambda: client.call("echo", params))

    def in_threads(self, client: Client) -> None:
        threads = [threading.Thread(target=self.kept, args=[client]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stream(self, client: Client) -> None:
        params, n = self.begin(), self.chance.choice([0, 3, 100])
        whole = [params["id"], "x" * params["size"]]

        def read() -> Any:
            items = list(client.stream("stream", params, n=n))
            return whole if items == [[params["id"], i] for i in range(n)] else items

        self.settle(params, read)

    def leave_stream(self, client: Client) -> None:
        params = self.begin()
        with client.stream("stream", params, n=10_000) as stream, contextlib.suppress(HarnessIPCError):
            for _, i in stream:
                if i == params["size"] % 7:
                    break
        self.note("left", params["id"])

    def leave(self, client: Client) -> None:
        params = self.begin()
        with contextlib.suppress(HarnessIPCError), dial_daemon(NAME) as connection:
            connection.send_bytes(json.dumps({"method": "echo", "params": params}).encode())
        self.note("left", params["id"])

    def in_tasks(self, client: Client) -> None:
        async def ask(client: AsyncClient, params: dict[str, Any]) -> None:
            try:
                result = await client.call("echo", params, timeout=PATIENCE)
            except asyncio.CancelledError:
                self.note("left", params["id"])
            except HarnessIPCError as error:
                self.note("error", params["id"], type(error).__name__, error.maybe_executed, ascii(str(error)))
            else:
                self.note("result" if result[0] == params["id"] else "crossed", params["id"])

        async def main() -> None:
            async with await aconnect_daemon(NAME, start=self.start, timeout=PATIENCE) as client:
                tasks = [asyncio.create_task(ask(client, self.begin())) for _ in range(6)]
                for _ in range(self.chance.randrange(30)):
                    await asyncio.sleep(0)
                tasks[0].cancel()
                tasks[3].cancel()
                await asyncio.wait(tasks)

        asyncio.run(main())

    def die(self, client: Client) -> None:
        """Kill this process at a random time during the next request."""
        self.is_dying = True
        threading.Timer(self.chance.uniform(0, 0.05), os._exit, [0]).start()

    def run(self) -> None:
        """Ask until the file "over" exists."""
        ways = [self.once, self.kept, self.in_threads, self.stream, self.leave_stream, self.leave, self.in_tasks]
        before = psutil.Process().num_fds()
        with self.connect() as client:
            while not (self.directory / "over").exists():
                self.chance.choice([self.die, *ways * 20])(client)
        if not self.is_dying:
            # A thread in which a coroutine started the daemon may still be ending.
            wait_until(lambda: (threading.active_count(), psutil.Process().num_fds()) == (1, before))


if __name__ == "__main__":
    if sys.argv[1] == "daemon":
        run(Path(sys.argv[2]), sys.argv[3])
    else:
        Asker(Path(sys.argv[2]), sys.argv[3]).run()
