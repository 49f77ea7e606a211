"""A client that disconnects during its request: the handler is cancelled at once, and nothing else is affected."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from harness_ipc import DaemonTimeout, aconnect_daemon, connect_daemon, ping, request, start_daemon_server
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, spawn_python, wait_until
from tests.support.wire import FrameConnection, dial_daemon

pytestmark = pytest.mark.usefixtures("driver")

NEVER = 3600.0


class Handler:
    """A handler that waits, and records the events of each request."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.changed = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        if "wait" not in message:
            self.note("answered", message["n"])
            return {"result": message["n"]}
        self.note("began", message["wait"])
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.note("cancelled", message["wait"])
            raise
        self.note("ended", message["wait"])
        return {"result": message.get("reply")}

    def note(self, event: str, tag: Any) -> None:
        self.events.append((event, tag))
        self.changed.set()

    async def until(self, *events: tuple[str, Any]) -> None:
        """Wait until the recorded events are exactly these."""
        while len(self.events) < len(events):
            self.changed.clear()
            await self.changed.wait()
        assert self.events == [*events]


@contextlib.asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[None]:
    """Serve `handler`. Assert at the end that another client is served and no task is left."""
    server, _ = await start_daemon_server(handler, "test", **options)
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(PATIENCE), server:
        yield
        assert await asyncio.to_thread(request, "test", {"n": 1}, timeout=PATIENCE) == {"result": 1}
        assert handler.events.pop() == ("answered", 1)
    assert asyncio.all_tasks() == tasks


@contextlib.asynccontextmanager
async def waiting() -> AsyncIterator[tuple[Handler, FrameConnection]]:
    """Serve a handler. Yield it and a connection whose request it is waiting in."""
    handler = Handler()
    async with serving(handler):
        connection = await asyncio.to_thread(dial_daemon, "test")
        await asyncio.to_thread(connection.send_bytes, b'{"wait": 1}')
        await handler.until(("began", 1))
        yield handler, connection


ASK = "from harness_ipc import connect_daemon; connect_daemon('test').request({'wait': 1}, timeout=3600)"


def ask_and_be_killed(signal_name: str) -> Callable[[Handler], Any]:
    async def depart(handler: Handler) -> None:
        import signal

        with spawn_python("-c", ASK) as process:
            await handler.until(("began", 1))
            process.signal(getattr(signal, signal_name))
            await asyncio.to_thread(process.wait)

    return depart


async def ask_and_close(handler: Handler) -> None:
    client = await asyncio.to_thread(connect_daemon, "test")
    asking = asyncio.create_task(asyncio.to_thread(client.request, {"wait": 1}, timeout=NEVER))
    await handler.until(("began", 1))
    client.close()
    await asyncio.wait([asking])
    assert asking.exception() is not None


async def ask_and_time_out(handler: Handler) -> None:
    with pytest.raises(DaemonTimeout) as caught:
        await asyncio.to_thread(request, "test", {"wait": 1}, timeout=0.2)
    assert caught.value.maybe_executed


async def ask_and_be_cancelled(handler: Handler) -> None:
    async with await aconnect_daemon("test") as client:
        asking = asyncio.create_task(client.request({"wait": 1}, timeout=NEVER))
        await handler.until(("began", 1))
        asking.cancel()
        await asyncio.wait([asking])
        # The client is still usable.
        assert await client.request({"n": 2}) == {"result": 2}
        handler.events.remove(("answered", 2))


DEPARTURES = pytest.mark.parametrize(
    "depart",
    [
        pytest.param(ask_and_be_killed("SIGKILL"), id="killed", marks=needs_posix),
        pytest.param(ask_and_be_killed("SIGTERM"), id="terminated"),
        pytest.param(ask_and_close, id="closed"),
        pytest.param(ask_and_time_out, id="timeout"),
        pytest.param(ask_and_be_cancelled, id="cancelled"),
    ],
)


@DEPARTURES
def test_a_departure_cancels_the_handler(depart: Callable[[Handler], Any]) -> None:
    async def main() -> None:
        handler = Handler()
        async with serving(handler):
            await depart(handler)
            await handler.until(("began", 1), ("cancelled", 1))

    asyncio.run(main())


@DEPARTURES
def test_a_daemon_may_let_requests_run_on(depart: Callable[[Handler], Any]) -> None:
    async def main() -> None:
        handler = Handler()
        async with serving(handler, cancel_on_disconnect=False):
            await depart(handler)
            handler.may_go_on.set()
            await handler.until(("began", 1), ("ended", 1))

    asyncio.run(main())


def test_requests_that_were_sent_ahead_do_not_run() -> None:
    async def main() -> None:
        handler = Handler()
        async with serving(handler):
            connection = await asyncio.to_thread(dial_daemon, "test")
            for message in ({"wait": 1}, {"n": 2}, {"n": 3}):
                await asyncio.to_thread(connection.send_bytes, json.dumps(message).encode())
            await handler.until(("began", 1))
            connection.close()
            await handler.until(("began", 1), ("cancelled", 1))
            assert await asyncio.to_thread(request, "test", {"n": 4}, timeout=PATIENCE) == {"result": 4}
            assert handler.events.pop() == ("answered", 4)

    asyncio.run(main())


@pytest.mark.parametrize("size", [1000, 60_000, 300_000])
def test_requests_that_were_sent_ahead_are_answered_in_order(size: int) -> None:
    """Also above the read-ahead limit, where EOF is not noticed before the reply."""

    async def main() -> None:
        async with waiting() as (handler, connection):
            frames = [json.dumps({"n": n, "text": "x" * size}).encode() for n in range(2, 5)]

            def send_all() -> None:
                for frame in frames:
                    connection.send_bytes(frame)

            sending = asyncio.create_task(asyncio.to_thread(send_all))
            # Unread data does not keep the loop busy.
            before = os.times()
            await asyncio.sleep(0.3)
            after = os.times()
            assert after.user + after.system - before.user - before.system < 0.2
            handler.may_go_on.set()
            replies = [json.loads(await asyncio.to_thread(connection.recv_bytes)) for _ in range(4)]
            await sending
            assert replies == [{"result": None}, *({"result": n} for n in range(2, 5))]
            connection.close()
            del handler.events[:]

    asyncio.run(main())


@needs_posix
def test_only_so_much_is_read_ahead_of_a_reply() -> None:
    """A client that sends without reading fills the system's buffers, not the daemon's memory."""
    most = 16 * 2**20
    frame = json.dumps({"n": 2, "text": "x" * 60_000}).encode()

    def send_until_nothing_goes(connection: FrameConnection) -> int:
        sent, before = 0, -1
        while before < sent < most:
            before = sent
            # Send the rest of the last frame as well.
            while sent < most and connection.connection.send_now([]):
                connection.connection.send_now(connection.framing.encode([frame]))
                sent += len(frame)
            # The loop has several iterations in which it could read.
            for n in range(20):
                assert request("test", {"n": n}, timeout=PATIENCE) == {"result": n}
        return sent

    async def main() -> None:
        async with waiting() as (handler, connection):
            assert await asyncio.to_thread(send_until_nothing_goes, connection) < most
            connection.close()
            handler.may_go_on.set()
            await asyncio.to_thread(wait_until, lambda: ("ended", 1) in handler.events)
            del handler.events[:]

    asyncio.run(main())


def test_a_drain_is_no_departure() -> None:
    async def main() -> None:
        handler = Handler()
        server, _ = await start_daemon_server(handler, "test", grace_period=PATIENCE)
        async with asyncio.timeout(PATIENCE):
            asking = asyncio.create_task(asyncio.to_thread(request, "test", {"wait": 1, "reply": 5}, timeout=PATIENCE))
            await handler.until(("began", 1))
            server.close()
            while await asyncio.to_thread(ping, "test"):
                pass
            handler.may_go_on.set()
            assert await asking == {"result": 5}
            await server.wait_closed()
        assert handler.events == [("began", 1), ("ended", 1)]

    asyncio.run(main())


def test_many_departures_and_replies_at_once_lose_nothing() -> None:
    async def main() -> None:
        handler = Handler()
        handler.may_go_on.set()
        async with serving(handler), await aconnect_daemon("test") as client:

            async def ask(n: int) -> bool:
                asking = asyncio.create_task(client.request({"wait": n, "reply": n}, timeout=PATIENCE))
                for _ in range(n % 40):
                    await asyncio.sleep(0)
                if n % 2:
                    asking.cancel()
                await asyncio.wait([asking])
                return asking.cancelled() or asking.result() == {"result": n}

            for start in range(0, 400, 40):
                assert all(await asyncio.gather(*map(ask, range(start, start + 40))))
            began = [tag for event, tag in handler.events if event == "began"]
            # Each ran at most once, and those that were not cancelled exactly once.
            assert len(began) == len(set(began))
            assert set(range(0, 400, 2)) <= set(began)
            del handler.events[:]

    asyncio.run(main())
