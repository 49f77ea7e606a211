"""Both drivers of a kept connection, the loop and the pump, behave the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import ConnectionLost, DaemonServer, connect_daemon, request, start_daemon_server
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, wait_until
from tests.support.wire import FrameConnection, dial_daemon

MIB = 2**20
# Seconds: longer than any test.
NEVER = 3600.0


pytestmark = pytest.mark.usefixtures("driver")


class Handler:
    """Echoes, waits, or sends a long reply."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.may_go_on = asyncio.Event()

    async def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(message.get("n"))
        if "wait" in message:
            await self.may_go_on.wait()
        return {"result": "x" * message["fill"] if "fill" in message else message}


@contextlib.asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[DaemonServer]:
    before = threading.active_count()
    server, _ = await start_daemon_server(handler, "test", **options)
    async with server:
        yield server
        assert await asyncio.to_thread(request, "test", {"n": -1}, timeout=PATIENCE) == {"result": {"n": -1}}
    assert len([thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]) <= before


def run(talk: Callable[[DaemonServer, Handler], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            handler = Handler()
            async with serving(handler, **options) as server:
                await talk(server, handler)

    asyncio.run(main())


def exchange(connection: FrameConnection, frame: bytes) -> dict[str, Any]:
    connection.send_bytes(frame)
    return reply_from(connection)


def reply_from(connection: FrameConnection) -> dict[str, Any]:
    return dict(json.loads(connection.recv_bytes(64 * MIB)))


def frame_of(**message: Any) -> bytes:
    return json.dumps(message).encode()


@contextlib.contextmanager
def kept_connection(server: DaemonServer) -> Iterator[FrameConnection]:
    """A connection after enough requests that the loop driver has adopted it."""
    with dial_daemon("test") as connection:
        for n in range(3):
            assert exchange(connection, frame_of(n=n)) == {"result": {"n": n}}
        yield connection


FRAMES: dict[str, tuple[bytes, Callable[[dict[str, Any]], bool]]] = {
    "short": (frame_of(n=5), lambda reply: reply == {"result": {"n": 5}}),
    "ping": (frame_of(meta="ping"), lambda reply: reply["pid"] == os.getpid() and reply["responsive"]),
    "health": (frame_of(meta="health"), lambda reply: reply == {"health": None}),
    "other meta": (frame_of(meta=["ping"]), lambda reply: reply == {"result": {"meta": ["ping"]}}),
    "long": (frame_of(text="x" * MIB), lambda reply: reply == {"result": {"text": "x" * MIB}}),
    "buffer": (frame_of(text="x" * 64 * 1024), lambda reply: reply == {"result": {"text": "x" * 64 * 1024}}),
    "long reply": (frame_of(fill=MIB), lambda reply: reply == {"result": "x" * MIB}),
    "empty": (b"", lambda reply: reply["error"]["type"] == "ProtocolError"),
    "no JSON": (b"{", lambda reply: reply["error"]["type"] == "ProtocolError"),
    "no object": (b"[1]", lambda reply: reply["error"]["type"] == "ProtocolError"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_each_kind_of_request_keeps_the_connection(kind: str) -> None:
    frame, is_right = FRAMES[kind]

    def converse(server: DaemonServer) -> None:
        with kept_connection(server) as connection:
            for n in range(3):
                assert is_right(exchange(connection, frame))
                assert exchange(connection, frame_of(n=n)) == {"result": {"n": n}}

    async def talk(server: DaemonServer, handler: Handler) -> None:
        await asyncio.to_thread(converse, server)

    run(talk)


@needs_posix
def test_a_request_in_two_pieces_delays_nobody() -> None:
    def converse(server: DaemonServer) -> None:
        with kept_connection(server) as connection:
            body = frame_of(n=777)
            frame = struct.pack("!i", len(body)) + body
            for cut in (1, 3, 4, 5, len(frame) - 1):
                os.write(connection.fileno(), frame[:cut])
                assert request("test", {"n": 1}, timeout=PATIENCE) == {"result": {"n": 1}}
                os.write(connection.fileno(), frame[cut:])
                assert reply_from(connection) == {"result": {"n": 777}}
                assert exchange(connection, frame_of(n=cut)) == {"result": {"n": cut}}

    async def talk(server: DaemonServer, handler: Handler) -> None:
        await asyncio.to_thread(converse, server)

    run(talk)


def test_a_request_above_the_limit_ends_that_connection_only() -> None:
    def converse(server: DaemonServer) -> None:
        with kept_connection(server) as connection:
            reply = exchange(connection, frame_of(text="x" * 1000))
            assert (reply["error"]["type"], reply["error"]["executed"]) == ("MessageTooLarge", False)
            with pytest.raises(ConnectionLost):
                reply_from(connection)

    async def talk(server: DaemonServer, handler: Handler) -> None:
        await asyncio.to_thread(converse, server)

    run(talk, max_message=500)


def test_requests_sent_ahead_are_answered_in_order() -> None:
    async def talk(server: DaemonServer, handler: Handler) -> None:
        def send_all() -> list[Any]:
            for message in ({"n": 10, "wait": 1}, {"n": 11}, {"n": 12}):
                connection.send_bytes(frame_of(**message))
            loop.call_soon_threadsafe(handler.may_go_on.set)
            return [reply_from(connection)["result"]["n"] for _ in range(3)]

        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            connection = await asyncio.to_thread(stack.enter_context, kept_connection(server))
            assert await asyncio.to_thread(send_all) == [10, 11, 12]
            assert handler.seen == [0, 1, 2, 10, 11, 12]
            # Once they are answered, the connection is served as before.
            assert await asyncio.to_thread(exchange, connection, frame_of(n=13)) == {"result": {"n": 13}}

    run(talk)


def test_a_client_killed_during_its_reply_leaves_nothing() -> None:
    async def talk(server: DaemonServer, handler: Handler) -> None:
        def die() -> None:
            with kept_connection(server) as connection:
                connection.send_bytes(frame_of(n=10, wait=1))
                wait_until(lambda: 10 in handler.seen)

        await asyncio.to_thread(die)
        handler.may_go_on.set()
        await asyncio.to_thread(wait_until, lambda: not server.connections)

    run(talk)


def test_a_client_that_reads_no_replies_holds_up_only_itself() -> None:
    def converse(server: DaemonServer) -> None:
        with kept_connection(server) as connection:
            for _ in range(20):
                connection.send_bytes(frame_of(fill=60_000))
            assert request("test", {"n": 1}, timeout=PATIENCE) == {"result": {"n": 1}}
            assert [len(reply_from(connection)["result"]) for _ in range(20)] == [60_000] * 20

    async def talk(server: DaemonServer, handler: Handler) -> None:
        await asyncio.to_thread(converse, server)

    run(talk)


@needs_linux
def test_a_hundred_connections_leak_no_descriptor() -> None:
    def converse(_: int) -> None:
        with connect_daemon("test") as client:
            for n in range(5):
                assert client.request({"n": n}, timeout=PATIENCE) == {"result": {"n": n}}

    async def talk(server: DaemonServer, handler: Handler) -> None:
        def count() -> int:
            return len(os.listdir("/proc/self/fd"))

        with ThreadPoolExecutor(4) as pool:
            before = count()
            # Descriptor numbers are reused: a watch that was not removed would affect the next connection.
            await asyncio.to_thread(lambda: list(pool.map(converse, range(100))))
            await asyncio.to_thread(wait_until, lambda: not server.connections and count() <= before)

    run(talk)


@pytest.mark.parametrize("stubborn", [False, True])
def test_closing_waits_only_for_requests_in_flight(stubborn: bool) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            handler = Handler()
            server, _ = await start_daemon_server(handler, "test", grace_period=0.2 if stubborn else NEVER)
            with contextlib.ExitStack() as stack:
                connection = await asyncio.to_thread(stack.enter_context, kept_connection(server))
                stack.enter_context(await asyncio.to_thread(connect_daemon, "test"))
                connection.send_bytes(frame_of(n=10, wait=1))
                await asyncio.to_thread(wait_until, lambda: 10 in handler.seen)
                server.close()
                if not stubborn:
                    handler.may_go_on.set()
                reply = await asyncio.to_thread(reply_from, connection)
                assert reply["error"]["type"] == "DaemonStopping" if stubborn else reply["result"]["n"] == 10
                await server.wait_closed()

    asyncio.run(main())
