"""The contestants and their clients: `python -m tests.benchmarks.clients CONTESTANT ADDRESS` measures as ordered.

An order is a line of JSON on standard input. The client checks that it gets the right answer, prints "ready", and starts at
the next line, so that several clients can be released together.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import harness_ipc
from harness_ipc._transport import deadline_after
from tests.support.wire import FrameConnection

from .servers import AUTHKEY, BUSY_PERIOD, Message, receive_frame, send_frame

# A function that sends a request, and one that closes the connection.
Connected = tuple[Callable[[Any], Any], Callable[[], object]]

PING: Message = {"method": "ping", "params": {}}
PONG: Message = {"pong": True}
# Seconds, ten times as long as anything takes: a server that hangs ends the benchmark.
_PATIENCE = 60.0
# Requests of each order before those that count.
_WARM_UP = 5


def by_text(send: Callable[[bytes], object], receive: Callable[[], Any]) -> Callable[[Any], Any]:
    def ask(message: Message) -> Any:
        send(json.dumps(message).encode())
        return json.loads(receive())

    return ask


def connect_harness_ipc(name: str) -> Connected:
    client = harness_ipc.connect_daemon(name)
    return client.request, client.close


def dial(address: str, timeout: float | None = None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    sock.connect(address)
    return sock


def connect_floor(address: str) -> Connected:
    sock = dial(address)
    return by_text(partial(send_frame, sock), partial(receive_frame, sock)), sock.close


def connect_floor_for_bytes(address: str) -> Connected:
    sock = dial(address)

    def ask(data: bytes) -> bytes | bytearray:
        send_frame(sock, data)
        return receive_frame(sock)

    return ask, sock.close


def connect_transport(address: str) -> Connected:
    connection = FrameConnection(address)

    def ask(data: bytes) -> bytes:
        connection.connection.deadline = deadline_after(_PATIENCE)
        connection.send_bytes(data)
        return connection.recv_bytes()

    return ask, connection.close


def ask_by_line(address: str, message: Message) -> Any:
    with dial(address, _PATIENCE) as sock:
        sock.sendall(json.dumps(message).encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            if not (chunk := sock.recv(65536)):
                raise ConnectionError("the server closed the connection")
            data += chunk
    return json.loads(data)


def connect_each_time(address: str) -> Connected:
    return partial(ask_by_line, address), lambda: None


def connect_stdlib(address: str) -> Connected:
    from multiprocessing.connection import Client

    connection = Client(address, "AF_UNIX", AUTHKEY)
    return by_text(connection.send_bytes, connection.recv_bytes), connection.close


def connect_managers(address: str) -> Connected:
    from multiprocessing.managers import BaseManager

    BaseManager.register("service")
    manager = BaseManager(address, AUTHKEY)
    manager.connect()
    # The proxy closes the connection when it is garbage-collected.
    return manager.service().answer, lambda: None  # type: ignore[attr-defined]


def connect_pyro5(address: str) -> Connected:
    proxy = import_module("Pyro5.api").Proxy(f"PYRO:service@./u:{address}")
    return proxy.answer, proxy._pyroRelease


def connect_rpyc(address: str) -> Connected:
    connection = import_module("rpyc").utils.factory.unix_connect(address)
    return lambda message: json.loads(connection.root.answer(json.dumps(message))), connection.close


def connect_pyzmq(address: str) -> Connected:
    zmq = import_module("zmq")
    # A process has one context.
    sock = zmq.Context.instance().socket(zmq.REQ)
    sock.connect(f"ipc://{address}")
    return by_text(sock.send, sock.recv), sock.close


def connect_aiohttp(address: str) -> Connected:
    from http.client import HTTPConnection

    connection = HTTPConnection("localhost")
    connection.sock = dial(address)
    post = partial(connection.request, "POST", "/", headers={"Content-Type": "application/json"})
    return by_text(post, lambda: connection.getresponse().read()), connection.close


def connect_mypy(address: str) -> Connected:
    client = import_module("mypy.ipc").IPCClient(address, _PATIENCE)
    return by_text(client.write_bytes, client.read_bytes), client.close


class Contestant(NamedTuple):
    """`same_job` is an asyncio handler for many clients, `needs` what has to be installed."""

    connect: Callable[[str], Connected]
    same_job: bool = False
    authenticates: bool = False
    needs: str | None = None
    at_once: bool = True
    one_shot: Callable[[str, Any], Any] | None = None


CONTESTANTS = {
    "floor": Contestant(connect_floor),
    "U": Contestant(connect_each_time, same_job=True, one_shot=ask_by_line),
    "harness_ipc": Contestant(connect_harness_ipc, same_job=True, authenticates=True, one_shot=harness_ipc.request),
    "multiprocessing.connection": Contestant(connect_stdlib, same_job=True, authenticates=True),
    "multiprocessing.managers": Contestant(connect_managers, authenticates=True),
    "Pyro5": Contestant(connect_pyro5, needs="Pyro5"),
    "rpyc": Contestant(connect_rpyc, needs="rpyc"),
    "pyzmq": Contestant(connect_pyzmq, same_job=True, needs="pyzmq"),
    "aiohttp": Contestant(connect_aiohttp, same_job=True, needs="aiohttp"),
    "mypy.ipc": Contestant(connect_mypy, needs="mypy", at_once=False),
}
# Contestants that transfer bytes.
CARRIERS = {"floor, bytes": Contestant(connect_floor_for_bytes), "harness_ipc._transport": Contestant(connect_transport)}


def message_and_reply(name: str, size: int) -> tuple[Any, Any]:
    if name in CARRIERS:
        return b"x" * size, b"x" * size
    params = {"text": "x" * size}
    return ({"method": "echo", "params": params}, {"result": params}) if size else (PING, PONG)


def carry_out(name: str, address: str, order: dict[str, Any]) -> dict[str, Any]:
    contestant = (CONTESTANTS | CARRIERS)[name]
    message, reply = message_and_reply(name, order.get("size", 0))

    def connect_and_ask(address: str, message: Any) -> Any:
        ask, close = contestant.connect(address)
        try:
            return ask(message)
        finally:
            close()

    with contextlib.ExitStack() as stack:
        ask: Callable[[Any], Any] = partial(contestant.one_shot or connect_and_ask, address)
        if order["kept"]:
            ask, close = contestant.connect(address)
            stack.callback(close)
        for _ in range(min(_WARM_UP, order.get("count", _WARM_UP))):
            if ask(message) != reply:
                raise SystemExit(f"{name} gave a wrong answer")
        print("ready", flush=True)
        sys.stdin.readline()
        begin = now = time.perf_counter()
        count, times, pauses = 0, [], random.Random(order.get("seed"))
        if "seconds" in order:
            while (now := time.perf_counter()) - begin < order["seconds"]:
                ask(message)
                count += 1
            return {"begin": begin, "end": now, "count": count}
        for _ in range(order["count"]):
            if order.get("pauses"):
                time.sleep(pauses.uniform(0, BUSY_PERIOD[1]))
            begin = time.perf_counter()
            ask(message)
            times.append((time.perf_counter() - begin) * 1e6)
        return {"times": times}


if __name__ == "__main__":
    while line := sys.stdin.readline():
        print(json.dumps(carry_out(sys.argv[1], sys.argv[2], json.loads(line))), flush=True)
