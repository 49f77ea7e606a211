"""Streams over real connections: items, progress, slow readers, disconnects, reserved keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import pytest

from harness_ipc import (
    ConnectionLost,
    CurrentRequest,
    ExpectedMore,
    RemoteError,
    aconnect_daemon,
    connect_daemon,
    current_request,
    ping,
    report,
    request,
    start_daemon_server,
    stop_daemon,
)
from tests.support.processes import PATIENCE, wait_until
from tests.support.wire import dial_daemon

pytestmark = pytest.mark.usefixtures("driver")

NEVER = 3600.0


class Countdown:
    """An asynchronous iterator that is no generator: it can't be closed."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __aiter__(self) -> Countdown:
        return self

    async def __anext__(self) -> int:
        if not self.n:
            raise StopAsyncIteration
        self.n -= 1
        return self.n


class Service:
    """An app with streams, progress and replies. `made` counts the produced items, `ended` has the ends of its streams."""

    def __init__(self) -> None:
        self.made = 0
        self.ended: list[str] = []
        self.may_end = asyncio.Event()
        self.has_left = threading.Event()

    def __call__(self, message: dict[str, Any]) -> Any:
        return getattr(self, message["method"])(**message["params"])

    async def count(self, n: int, size: int = 1, wait: bool = False) -> AsyncIterator[Any]:
        try:
            for i in range(n):
                yield [i, "x" * size]
                self.made += 1
            if wait:
                await self.may_end.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        except GeneratorExit:
            self.ended.append("closed")
            raise
        else:
            self.ended.append("done")

    async def fail(self, after: int) -> AsyncIterator[int]:
        for i in range(after):
            yield i
        raise ValueError("no more")

    async def unreadable(self) -> AsyncIterator[Any]:
        yield 1
        yield {1, 2}

    async def progress(self, n: int) -> dict[str, Any]:
        for i in range(n):
            await report({"done": i, "total": n})
        return {"result": "all"}

    async def yield_many(self) -> AsyncIterator[int]:
        yield 0
        # The loop is blocked, so it notices the departure only after the next item.
        self.has_left.wait(PATIENCE)
        for i in range(10_000):
            yield i
        self.ended.append("done")

    async def report_many(self) -> dict[str, Any]:
        await report(0)
        self.has_left.wait(PATIENCE)
        for i in range(10_000):
            await report(i)
        self.ended.append("done")
        return {"result": None}

    async def ignore_cancellation(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 0
                with contextlib.suppress(asyncio.CancelledError):
                    await self.may_end.wait()
        finally:
            self.ended.append("closed")

    def iterator(self, n: int) -> AsyncIterator[int]:
        return Countdown(n)

    async def generator(self, n: int) -> AsyncIterator[Any]:
        return self.count(n)

    async def answer(self, reply: Any) -> Any:
        return reply

    async def tell(self) -> dict[str, Any]:
        asked = current_request()
        assert isinstance(asked, CurrentRequest)
        left = asked.deadline - time.monotonic()
        in_thread = await asyncio.to_thread(lambda: current_request().method)
        return {"result": [asked.method, asked.peer.pid, asked.cancelled, None if left == inf else left, in_thread]}

    async def together(self, n: int, size: int) -> dict[str, Any]:
        await asyncio.gather(*(report([i, "x" * size]) for i in range(n)))
        return {"result": "all"}

    async def leave_behind(self) -> dict[str, Any]:
        self.left_behind = asyncio.create_task(self.report_later())
        return {"result": "left"}

    async def report_later(self) -> None:
        await self.may_end.wait()
        await report("too late")

    async def wait_for_the_left_behind(self) -> dict[str, Any]:
        self.may_end.set()
        await self.left_behind
        return {"result": "done"}

    async def cancelled(self) -> dict[str, Any]:
        asked = current_request()
        try:
            await asyncio.sleep(NEVER)
        finally:
            self.ended.append(f"cancelled: {asked.cancelled}")
        raise AssertionError


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Service]:
    service = Service()
    server, _ = await start_daemon_server(service, "test", **options)
    async with asyncio.timeout(PATIENCE), server:
        yield service
        assert await asyncio.to_thread(call, "answer", {"result": 1}) == 1


def call(method: str, reply: Any) -> Any:
    with connect_daemon("test", request_timeout=PATIENCE) as client:
        return client.call(method, reply=reply)


def test_items_arrive_in_order() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            for n in (0, 1, 1000):
                assert [i for i, _ in client.stream("count", n=n)] == [*range(n)]
            seen: list[Any] = []
            assert client.call("count", n=3, on_progress=seen.append) is None
            assert [i for i, _ in seen] == [0, 1, 2]
            assert client.call("answer", reply={"result": 2}) == 2

    async def main() -> None:
        async with serving() as service:
            await asyncio.to_thread(talk)
            assert service.ended == ["done"] * 4

    asyncio.run(main())


def test_a_coroutine_may_return_a_generator() -> None:
    async def main() -> None:
        def talk() -> list[int]:
            with connect_daemon("test") as client:
                return [i for i, _ in client.stream("generator", n=3)]

        async with serving():
            assert await asyncio.to_thread(talk) == [0, 1, 2]

    asyncio.run(main())


GENERATOR = """
import sys
from harness_ipc import run_daemon

async def count(message):
    for i in range(message["params"]["n"]):
        yield i

run_daemon(count, "counter", idle_timeout=60)
"""


def test_an_iterator_that_is_no_generator_is_a_stream() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            assert list(client.stream("iterator", n=3)) == [2, 1, 0]
            with pytest.raises(ExpectedMore):
                client.call("iterator", n=3)

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)

    asyncio.run(main())


def test_a_daemons_handler_may_be_a_generator() -> None:
    with connect_daemon("counter", start=[sys.executable, "-c", GENERATOR]) as client:
        assert list(client.stream("count", n=3)) == [0, 1, 2]
        with pytest.raises(ExpectedMore):
            client.call("count", n=3)
    assert stop_daemon("counter")


def test_progress_is_sent_only_on_request() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            seen: list[Any] = []
            assert client.call("progress", n=3, on_progress=seen.append) == "all"
            assert seen == [{"done": i, "total": 3} for i in range(3)]
            assert client.call("progress", n=3) == "all"
            with client.stream("progress", n=2) as stream:
                assert len(list(stream)) == 2
                assert stream.result == "all"

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)
        await report("nobody asks")

    asyncio.run(main())


def test_tasks_of_a_handler_report_at_once_to_a_slow_reader() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            seen: list[Any] = []
            assert client.call("together", n=20, size=100_000, on_progress=seen.append) == "all"
            assert sorted(i for i, _ in seen) == [*range(20)]

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)

    asyncio.run(main())


def test_a_background_task_of_a_handler_cannot_report() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            seen: list[Any] = []
            assert client.call("leave_behind", on_progress=seen.append) == "left"
            assert client.call("wait_for_the_left_behind", on_progress=seen.append) == "done"
            assert seen == []

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)

    asyncio.run(main())


def test_a_stream_that_is_called_for_one_reply_does_not_run() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            with pytest.raises(ExpectedMore, match="stream") as caught:
                client.call("count", n=3)
            assert not caught.value.maybe_executed
            assert client.call("answer", reply={"result": 2}) == 2

    async def main() -> None:
        async with serving() as service:
            await asyncio.to_thread(talk)
            assert (service.made, service.ended) == (0, [])

    asyncio.run(main())


@pytest.mark.parametrize(("method", "items", "text"), [("fail", [0, 1], "no more"), ("unreadable", [1], "set")])
def test_an_error_comes_after_the_items(method: str, items: list[Any], text: str) -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            seen: list[Any] = []
            with pytest.raises(RemoteError, match=text):
                seen.extend(client.stream(method, **({"after": 2} if method == "fail" else {})))
            assert client.call("answer", reply={"result": 2}) == 2

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)

    asyncio.run(main())


def test_a_slow_reader_stops_the_producer() -> None:
    n, size = 1000, 10_000

    def ask() -> Any:
        connection = dial_daemon("test")
        connection.send_bytes(json.dumps({"method": "count", "params": {"n": n, "size": size}, "more": True}).encode())
        return connection

    async def main() -> None:
        async with serving() as service:
            connection = await asyncio.to_thread(ask)
            # It stops producing once all buffers are full.
            made = -1
            while made != service.made or not made:
                made = service.made
                await asyncio.to_thread(request, "test", {"method": "answer", "params": {"reply": {"result": 1}}})
                await asyncio.sleep(0.2)
            assert 0 < made < n // 2

            def read() -> list[Any]:
                return [json.loads(connection.recv_bytes(2 * size)) for _ in range(n + 1)]

            *items, last = await asyncio.to_thread(read)
            assert [item["result"][0] for item in items] == [*range(n)]
            assert all(item["continues"] is True for item in items)
            assert last == {"result": None}
            connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 100_000])
def test_leaving_a_stream_cancels_its_producer(size: int) -> None:
    """Also while it waits for a slow reader."""

    def leave() -> None:
        with connect_daemon("test") as client:
            for i, _ in client.stream("count", n=100, size=size, wait=True):
                if i == 1:
                    break

    async def main() -> None:
        async with serving() as service:
            await asyncio.to_thread(leave)
            await asyncio.to_thread(wait_until, lambda: service.ended != [])
            assert service.ended in (["cancelled"], ["closed"])

    asyncio.run(main())


@pytest.mark.parametrize("method", ["yield_many", "report_many"])
def test_a_producer_that_waits_for_nothing_notices_a_departure(method: str) -> None:
    async def main() -> None:
        async with serving() as service:

            def leave() -> None:
                with dial_daemon("test") as connection:
                    connection.send_bytes(json.dumps({"method": method, "params": {}, "more": True}).encode())
                    connection.recv_bytes()
                service.has_left.set()

            await asyncio.to_thread(leave)
        assert service.ended == []

    asyncio.run(main())


def test_generator_that_ignores_cancellation_is_closed() -> None:
    def leave() -> None:
        with connect_daemon("test") as client, client.stream("ignore_cancellation") as stream:
            assert next(stream) == 0

    async def main() -> None:
        async with serving() as service:
            await asyncio.to_thread(leave)
            await asyncio.to_thread(wait_until, lambda: service.ended == ["closed"])

    asyncio.run(main())


def test_a_drain_lets_a_stream_end() -> None:
    async def main() -> None:
        service = Service()
        server, _ = await start_daemon_server(service, "test", grace_period=PATIENCE)
        async with asyncio.timeout(PATIENCE):
            with await asyncio.to_thread(connect_daemon, "test") as client:
                stream = client.stream("count", n=5, wait=True)
                assert (await asyncio.to_thread(next, stream))[0] == 0
                server.close()
                service.may_end.set()
                assert [i for i, _ in await asyncio.to_thread(list, stream)] == [1, 2, 3, 4]
                await server.wait_closed()
        assert service.ended == ["done"]

    asyncio.run(main())


def test_the_end_of_the_grace_period_cancels_a_stream() -> None:
    async def main() -> None:
        service = Service()
        server, _ = await start_daemon_server(service, "test", grace_period=0.1)
        async with asyncio.timeout(PATIENCE):
            with await asyncio.to_thread(connect_daemon, "test") as client:
                stream = client.stream("count", n=1, wait=True)
                await asyncio.to_thread(next, stream)
                server.close()
                with pytest.raises(ConnectionLost, match="stopped") as caught:
                    await asyncio.to_thread(next, stream)
                assert caught.value.maybe_executed
                await server.wait_closed()
        assert service.ended == ["cancelled"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "forged",
    [
        {"meta": "goodbye"},
        {"continues": True, "result": 1},
        {"error": {"type": "Busy", "message": "full", "executed": False}},
        {"error": {"type": "DaemonStopping", "message": "", "executed": True}},
    ],
    ids=["goodbye", "continues", "executed", "stopping"],
)
def test_a_handler_cannot_forge_reserved_keys(forged: dict[str, Any]) -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            reply = client.request({"method": "answer", "params": {"reply": forged}})
            assert reply["error"]["type"] == "ProtocolError"
            assert "is reserved" in reply["error"]["message"]
            assert client.call("answer", reply={"result": 2}) == 2

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)

    asyncio.run(main())


def test_a_handler_knows_its_request() -> None:
    def talk() -> None:
        with connect_daemon("test") as client:
            method, pid, cancelled, left, in_thread = client.call("tell", timeout=30)
            assert [method, pid, cancelled, in_thread] == ["tell", os.getpid(), False, "tell"]
            assert 20 < left <= 30
            assert client.request({"method": "tell", "params": {}})["result"][3] is None

    async def main() -> None:
        async with serving():
            await asyncio.to_thread(talk)
        with pytest.raises(LookupError, match="handler"):
            current_request()

    asyncio.run(main())


@pytest.mark.parametrize("timeout", ["1e999", "1" + "0" * 400, "-1", "true", "null", '"soon"', "[1]"])
def test_any_timeout_in_a_message_is_the_handlers_own(timeout: str) -> None:
    def talk() -> Any:
        with dial_daemon("test") as connection:
            connection.send_bytes(f'{{"method": "tell", "params": {{}}, "timeout": {timeout}}}'.encode())
            return json.loads(connection.recv_bytes())

    async def main() -> None:
        async with serving():
            reply = await asyncio.to_thread(talk)
            assert reply.get("error", {}).get("type") == "ProtocolError" or reply["result"][0] == "tell"

    asyncio.run(main())


def test_a_cancelled_handler_sees_cancelled() -> None:
    async def main() -> None:
        async with serving() as service, await aconnect_daemon("test") as client:
            with contextlib.suppress(TimeoutError):
                await client.call("cancelled", timeout=0.2)
            await asyncio.to_thread(wait_until, lambda: service.ended == ["cancelled: True"])
            assert await asyncio.to_thread(ping, "test", PATIENCE)

    asyncio.run(main())
