"""The contestants' servers: `python -m tests.benchmarks.servers CONTESTANT ADDRESS` prints "ready ADDRESS" and serves.

Peers are imported where they are used: one that is not installed does not prevent measuring the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import inf
from typing import Any

from harness_ipc._transport import Framing, listen

Message = dict[str, Any]

BE_BUSY: Message = {"method": "be busy"}
# A password for contestants that have one. It need not be secret: the directory is private.
AUTHKEY = b"the peers' key"
# Seconds for which the busy loop is blocked, and then free, each time.
BUSY_PERIOD = (0.001, 0.02)
# More than the number of clients.
_WARM_THREADS = 16
_HEADER = struct.Struct("!I")
_MOST_MESSAGE = 64 * 1024 * 1024

_background: list[asyncio.Task[None]] = []


def answer(message: Message) -> Message:
    return {"result": message["params"]} if message["method"] == "echo" else {"pong": True}


async def handle(message: Message) -> Message:
    if message == BE_BUSY:
        _background.append(asyncio.create_task(be_busy()))
    return answer(message)


def answer_text(text: str | bytes | bytearray) -> str:
    return json.dumps(answer(json.loads(text)))


def ready(address: str) -> None:
    print("ready", address, flush=True)


async def be_busy() -> None:
    """Block the loop and leave it free, in turns."""
    periods = random.Random(1)
    while True:
        seconds = periods.uniform(*BUSY_PERIOD)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        await asyncio.sleep(seconds)


def serve_harness_ipc(name: str) -> None:
    from harness_ipc import run_daemon

    run_daemon(handle, name, on_ready=lambda _: ready(name))


# The floor: the minimum for any design.


def send_frame(sock: socket.socket, data: bytes | bytearray) -> None:
    sent = sock.sendmsg([_HEADER.pack(len(data)), data]) - _HEADER.size
    if sent < len(data):
        sock.sendall(memoryview(data)[sent:])


def receive_frame(sock: socket.socket) -> bytes | bytearray:
    """Return the next frame, or b"" at EOF. A peer waits for the answer, so all data belongs to one frame."""
    data = sock.recv(65536)
    if not data or len(data) == _HEADER.size + (size := _HEADER.unpack_from(data)[0]):
        return data[_HEADER.size :]
    frame = bytearray(size)
    frame[: len(data) - _HEADER.size] = data[_HEADER.size :]
    missing = memoryview(frame)[len(data) - _HEADER.size :]
    while missing:
        if not (count := sock.recv_into(missing)):
            raise ConnectionError("the peer closed it in the middle of a frame")
        missing = missing[count:]
    return frame


def serve_threads(accept: Callable[[], Any], serve: Callable[[Any], None], *, warm: bool = False) -> None:
    """Give each connection a thread: a new one, or one of several that wait in accept."""

    def serve_to_the_end(connection: Any) -> None:
        with contextlib.suppress(EOFError, OSError), contextlib.closing(connection):
            serve(connection)

    def serve_all() -> None:
        while True:
            serve_to_the_end(accept())

    if warm:
        for _ in range(_WARM_THREADS):
            threading.Thread(target=serve_all, daemon=True).start()
        serve_all()
    while True:
        threading.Thread(target=serve_to_the_end, args=[accept()], daemon=True).start()


def serve_floor(address: str, respond: Callable[[Any], Any] = lambda frame: answer_text(frame).encode()) -> None:
    def serve(sock: socket.socket) -> None:
        while frame := receive_frame(sock):
            send_frame(sock, respond(frame))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(128)
        ready(address)
        serve_threads(lambda: listener.accept()[0], serve, warm=True)


def serve_transport(address: str) -> None:
    """Only the package's frames: no handshake, JSON or loop."""

    def serve(port: listen.Port) -> None:
        framing = Framing()
        while data := port.wait(inf, reading=True, limit=_MOST_MESSAGE):
            framing.feed(data)
            while (frame := framing.next_frame(_MOST_MESSAGE)) is not None:
                for chunk in framing.encode([frame]):
                    port.begin_write(chunk)
                    while port.is_writing:
                        port.wait(inf, reading=False, limit=0)

    listener = listen.Listener(address)
    ready(address)
    serve_threads(listener.accept_port, serve, warm=True)


async def serve_lines(address: str) -> None:
    """U: a daemon without this package."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if line := await reader.readline():
            writer.write(json.dumps(await handle(json.loads(line))).encode() + b"\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(respond, address, backlog=128)
    ready(address)
    await server.serve_forever()


# The peers, each with its defaults.


async def serve_stdlib(address: str) -> None:
    """A simple daemon with `multiprocessing.connection`."""
    from multiprocessing.connection import Connection, Listener

    loop = asyncio.get_running_loop()

    def serve(connection: Connection) -> None:
        while True:
            message = json.loads(connection.recv_bytes())
            reply = asyncio.run_coroutine_threadsafe(handle(message), loop).result()
            connection.send_bytes(json.dumps(reply).encode())

    listener = Listener(address, "AF_UNIX", backlog=128, authkey=AUTHKEY)
    ready(address)
    threading.Thread(target=serve_threads, args=[listener.accept, serve], daemon=True).start()
    await asyncio.Event().wait()


class Service:
    def answer(self, message: Message) -> Message:
        return answer(message)


def serve_managers(address: str) -> None:
    from multiprocessing.managers import BaseManager

    BaseManager.register("service", Service)
    server = BaseManager(address, AUTHKEY).get_server()
    ready(address)
    server.serve_forever()


def serve_pyro5(address: str) -> None:
    api = import_module("Pyro5.api")
    daemon = api.Daemon(unixsocket=address)
    daemon.register(api.expose(Service), "service")
    ready(address)
    daemon.requestLoop()


def serve_rpyc(address: str) -> None:
    rpyc = import_module("rpyc")
    # Text: a dict would be passed by reference, and each access would be a request.
    service = type("TextService", (rpyc.Service,), {"exposed_answer": lambda self, text: answer_text(text)})
    server = import_module("rpyc.utils.server").ThreadedServer(service, socket_path=address)
    ready(address)
    server.start()


async def serve_pyzmq(address: str) -> None:
    router = import_module("zmq.asyncio").Context().socket(import_module("zmq").ROUTER)
    router.bind(f"ipc://{address}")
    ready(address)
    tasks = set()

    async def respond(identity: bytes, text: bytes) -> None:
        await router.send_multipart([identity, b"", json.dumps(await handle(json.loads(text))).encode()])

    while True:
        identity, _, text = await router.recv_multipart()
        tasks.add(task := asyncio.create_task(respond(identity, text)))
        task.add_done_callback(tasks.discard)


async def serve_aiohttp(address: str) -> None:
    web = import_module("aiohttp.web")

    async def respond(request: Any) -> Any:
        return web.json_response(await handle(await request.json()))

    app = web.Application()
    app.router.add_post("/", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, address).start()
    ready(address)
    await asyncio.Event().wait()


def serve_mypy(_: str) -> None:
    server = import_module("mypy.ipc").IPCServer("benchmark")
    ready(server.connection_name)
    while True:
        with server:
            while text := server.read():
                server.write(answer_text(text))


SERVERS: dict[str, Callable[[str], Any]] = {
    "floor": serve_floor,
    "floor, bytes": partial(serve_floor, respond=lambda frame: frame),
    "U": serve_lines,
    "harness_ipc": serve_harness_ipc,
    "harness_ipc._transport": serve_transport,
    "multiprocessing.connection": serve_stdlib,
    "multiprocessing.managers": serve_managers,
    "Pyro5": serve_pyro5,
    "rpyc": serve_rpyc,
    "pyzmq": serve_pyzmq,
    "aiohttp": serve_aiohttp,
    "mypy.ipc": serve_mypy,
}

if __name__ == "__main__":
    if (serving := SERVERS[sys.argv[1]](sys.argv[2])) is not None:
        asyncio.run(serving)
