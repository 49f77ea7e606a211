"""Servers and workloads for concurrent calls of one client, streams, and cancellation on a disconnect."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from harness_ipc import aconnect_daemon, connect_daemon, run_daemon, start_daemon_server

if TYPE_CHECKING:
    from .report import Row
    from .workloads import Bench

OURS = "harness_ipc"
# Calls of one AsyncClient at once and how long each takes, in seconds; the same of one Client in threads.
CALLS, CALL = 50, 0.1
THREADS, THREAD_CALLS, THREAD_CALL = 16, 20, 0.01
# Items of a stream, and the characters in each.
STREAMS = {"10,000 small items": (10_000, 1), "200 items of 64 KiB": (200, 64 * 1024)}


# Servers: each sleeps for "seconds", or sends "count" items of "size".


def item(number: int, size: int) -> dict[str, Any]:
    return {"continues": True, "result": [number, "x" * size]}


def serve_harness_ipc(address: str) -> None:
    async def send(count: int, size: int) -> AsyncIterator[Any]:
        for number in range(count):
            yield item(number, size)["result"]

    async def handle(message: dict[str, Any]) -> Any:
        if message["method"] == "send":
            return send(**message["params"])
        await asyncio.sleep(message["params"]["seconds"])
        return {"result": None}

    run_daemon(handle, address, on_ready=lambda _: print("ready", address, flush=True))


async def serve_aiohttp(address: str) -> None:
    web = import_module("aiohttp.web")

    async def rest(request: Any) -> Any:
        await asyncio.sleep((await request.json())["seconds"])
        return web.json_response({"result": None})

    async def send(request: Any) -> Any:
        asked = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(asked["count"]):
            await response.write(json.dumps(item(number, asked["size"])).encode() + b"\n")
        return response

    app = web.Application()
    app.router.add_post("/rest", rest)
    app.router.add_post("/send", send)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, address).start()
    print("ready", address, flush=True)
    await asyncio.Event().wait()


def serve_floor(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", address, flush=True)
        while True:
            with listener.accept()[0] as sock, sock.makefile("r") as requests:
                for line in requests:
                    asked = json.loads(line)
                    for number in range(asked["count"]):
                        frame = json.dumps(item(number, asked["size"])).encode()
                        sock.sendall(struct.pack("!i", len(frame)) + frame)


# What is measured, in milliseconds.


def timed(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1000


async def timed_together(call: Callable[[], Coroutine[Any, Any, Any]]) -> float:
    begin = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(CALLS)))
    return (time.perf_counter() - begin) * 1000


async def ask_ours_at_once(address: str) -> float:
    async with await aconnect_daemon(address) as client:
        return await timed_together(lambda: client.call("rest", seconds=CALL))


async def ask_aiohttp_at_once(address: str) -> float:
    aiohttp = import_module("aiohttp")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(address)) as session:

        async def call() -> None:
            async with session.post("http://localhost/rest", json={"seconds": CALL}) as response:
                await response.json()

        return await timed_together(call)


def read_ours(address: str, count: int, size: int) -> float:
    with connect_daemon(address) as client:
        return timed(lambda: check(client.stream("send", count=count, size=size), count))


def check(items: Any, count: int) -> None:
    assert sum(1 for _ in items) == count


async def read_aiohttp(address: str, count: int, size: int) -> float:
    aiohttp = import_module("aiohttp")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(address), read_bufsize=2**18) as session:
        begin = time.perf_counter()
        async with session.post("http://localhost/send", json={"count": count, "size": size}) as response:
            check([json.loads(line) async for line in response.content], count)
        return (time.perf_counter() - begin) * 1000


def read_floor(address: str, count: int, size: int) -> float:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        with sock.makefile("rb") as frames:

            def read() -> None:
                sock.sendall(json.dumps({"count": count, "size": size}).encode() + b"\n")
                for _ in range(count):
                    json.loads(frames.read(struct.unpack("!i", frames.read(4))[0]))

            return timed(read)


def has_aiohttp() -> bool:
    try:
        return bool(metadata.version("aiohttp"))
    except metadata.PackageNotFoundError:
        return False


def calls_at_once(bench: Bench) -> list[Row]:
    """Concurrent calls of one AsyncClient, and as many sleeping tasks."""
    addresses = {name: serve(bench, name) for name in (OURS, *(["aiohttp"] if has_aiohttp() else []))}
    turns: dict[str, Callable[[int], list[float]]] = {
        "sleep": lambda _: [asyncio.run(timed_together(lambda: asyncio.sleep(CALL)))],
        OURS: lambda _: [asyncio.run(ask_ours_at_once(addresses[OURS]))],
    }
    if "aiohttp" in addresses:
        turns["aiohttp"] = lambda _: [asyncio.run(ask_aiohttp_at_once(addresses["aiohttp"]))]
    return compared(bench, turns, "sleep")


def threads_at_once(bench: Bench) -> list[Row]:
    """Concurrent calls of one Client, and as many sleeping threads."""
    address = serve(bench, OURS)

    def ask(call: Callable[[], Any]) -> list[float]:
        def repeat(_: int) -> None:
            for _ in range(THREAD_CALLS):
                call()

        with ThreadPoolExecutor(THREADS) as pool:
            return [timed(lambda: list(pool.map(repeat, range(THREADS))))]

    client = bench.enter_context(connect_daemon(address))
    turns: dict[str, Callable[[int], list[float]]] = {
        "sleep": lambda _: ask(partial(time.sleep, THREAD_CALL)),
        OURS: lambda _: ask(partial(client.call, "rest", seconds=THREAD_CALL)),
    }
    return compared(bench, turns, "sleep")


def stream(bench: Bench, *, kind: str) -> list[Row]:
    count, size = STREAMS[kind]
    addresses = {name: serve(bench, name) for name in ("floor", OURS, *(["aiohttp"] if has_aiohttp() else []))}
    turns: dict[str, Callable[[int], list[float]]] = {
        "floor": lambda _: [read_floor(addresses["floor"], count, size)],
        OURS: lambda _: [read_ours(addresses[OURS], count, size)],
    }
    if "aiohttp" in addresses:
        turns["aiohttp"] = lambda _: [asyncio.run(read_aiohttp(addresses["aiohttp"], count, size))]
    return compared(bench, turns, "floor")


def departure(bench: Bench) -> list[Row]:
    """The time from a caller's disconnect to its handler's cancellation, and to asyncio's notice of a closed connection."""
    turns = {"asyncio": lambda _: [asyncio.run(leave_asyncio())], OURS: lambda _: [asyncio.run(leave_ours())]}
    return compared(bench, turns, "asyncio")


async def leave_ours() -> float:
    began, cancelled = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def handle(_: dict[str, Any]) -> dict[str, Any]:
        began.set()
        try:
            return await asyncio.Event().wait() and {}
        finally:
            cancelled.set_result(time.perf_counter())

    server, _ = await start_daemon_server(handle, "departure")
    async with server:
        client = await asyncio.to_thread(connect_daemon, "departure")
        thread = threading.Thread(target=call_until_closed, args=[client])
        thread.start()
        await began.wait()
        begin = time.perf_counter()
        client.close()
        left = await cancelled
        await asyncio.to_thread(thread.join)
    return float((left - begin) * 1000)


def call_until_closed(client: Any) -> None:
    try:
        client.call("wait", timeout=60)
    except RuntimeError:
        return


async def leave_asyncio() -> float:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    reading = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    begin = time.perf_counter()
    theirs.close()
    await reading
    left = time.perf_counter()
    writer.close()
    return (left - begin) * 1000


def serve(bench: Bench, name: str) -> str:
    return bench.process("concurrency", name, bench.place(name)).expect("ready")


def compared(bench: Bench, turns: dict[str, Callable[[int], list[float]]], reference: str) -> list[Row]:
    from .report import compare

    return compare(bench.rows_of(bench.in_turns(turns), "ms"), {reference: reference})


SERVERS: dict[str, Callable[[str], Any]] = {OURS: serve_harness_ipc, "aiohttp": serve_aiohttp, "floor": serve_floor}

if __name__ == "__main__":
    if (serving := SERVERS[sys.argv[1]](sys.argv[2])) is not None:
        asyncio.run(serving)
