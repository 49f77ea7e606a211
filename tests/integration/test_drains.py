"""Daemons that drain at any time, one after another: every request runs once, or its error says that it did not run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import (
    Client,
    ConnectionLost,
    DaemonNotRunning,
    HarnessIPCError,
    aconnect_daemon,
    request,
    start_daemon_server,
)
from harness_ipc._protocol import messages
from harness_ipc._protocol.framing import StreamFraming
from harness_ipc._protocol.handshake import Keys
from harness_ipc._protocol.session import PROVED, ServerProtocol
from harness_ipc._server.server import acquire_name
from harness_ipc.errors import AuthenticationFailed
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE

GENERATIONS = int(os.environ.get("HARNESS_TEST_DRAINS", "60"))


class Generation:
    """A daemon that uses only the protocol, in one thread: it answers at once, and drains on request."""

    def __init__(self, ran: Counter[str]) -> None:
        self.ran = ran
        self.registration = acquire_name("test")
        record = self.registration.record
        self.keys = Keys(record.authkey, record.address)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(record.address)
        self.listener.listen(128)
        self.listener.setblocking(False)
        self.sessions: dict[socket.socket, ServerProtocol] = {}
        self.registration.publish(app_version=None, max_message=1 << 20)

    def serve(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for sock in select.select([self.listener, *self.sessions], [], [], left)[0]:
                self.accept() if sock is self.listener else self.read(sock)

    def drain(self, *, has_successor: bool) -> Generation | None:
        """Drain, and return the successor, which acquires the name before the goodbyes are sent."""
        self.registration.release()
        successor = Generation(self.ran) if has_successor else None
        self.listener.close()
        for sock, session in self.sessions.items():
            session.leave()
            self.send(sock, session)
            sock.close()
        return successor

    def accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self.listener.accept()
            self.sessions[sock] = ServerProtocol(self.keys, StreamFraming(), 1 << 20)

    def read(self, sock: socket.socket) -> None:
        session = self.sessions[sock]
        try:
            data = sock.recv(65536)
            session.receive_data(data)
            while data and (event := session.next_event()) is not None:
                if event == PROVED:
                    continue
                assert isinstance(event, dict)
                self.ran[event["id"]] += 1
                session.send_reply(messages.encode({"result": event["id"]}))
                self.send(sock, session)
                session.reply_taken()
            self.send(sock, session)
        except (OSError, AuthenticationFailed):
            data = b""
        if not data:
            del self.sessions[sock]
            sock.close()

    @staticmethod
    def send(sock: socket.socket, session: ServerProtocol) -> None:
        with contextlib.suppress(OSError):
            for chunk in session.data_to_send():
                sock.sendall(chunk)


def ask_once(ids: Any, over: threading.Event, note: Callable[[Any, Any], None]) -> None:
    while not over.is_set():
        number = next(ids)
        note(number, lambda number=number: request("test", {"id": number}, timeout=PATIENCE))


def ask_kept(ids: Any, over: threading.Event, note: Callable[[Any, Any], None]) -> None:
    with contextlib.closing(Client("test")) as client:
        while not over.is_set():
            number = next(ids)
            note(number, lambda number=number: client.request({"id": number}, timeout=PATIENCE))


@needs_posix
def test_requests_during_drains_run_at_most_once() -> None:
    ran: Counter[str] = Counter()

    def serve() -> None:
        generation = Generation(ran)
        for _ in range(GENERATIONS):
            generation.serve(random.random() * 0.05)
            successor = generation.drain(has_successor=True)
            assert successor is not None
            generation = successor
        over.set()
        generation.serve(0.5)
        generation.drain(has_successor=False)

    over = threading.Event()
    check(ran, ask_beside(serve, over))


# On Windows an open record cannot be removed, and this process then cannot serve the name again.
@needs_posix
@pytest.mark.usefixtures("driver")
def test_requests_during_drains_of_servers_run_at_most_once() -> None:
    ran: Counter[str] = Counter()

    async def handle(message: dict[str, Any]) -> dict[str, Any]:
        ran[message["id"]] += 1
        await asyncio.sleep(random.choice([0, 0, 0.01]))
        return {"result": message["id"]}

    async def serve() -> None:
        for _ in range(GENERATIONS):
            server, _ = await start_daemon_server(handle, "test", grace_period=PATIENCE)
            async with server:
                await asyncio.sleep(random.random() * 0.05)
        over.set()

    over = threading.Event()
    check(ran, ask_beside(lambda: asyncio.run(serve()), over))


def ask_beside(serve: Callable[[], None], over: threading.Event) -> dict[str, Any]:
    """Send requests in several ways while `serve` runs, and return their outcomes."""
    outcomes: dict[str, Any] = {}

    def note(number: Any, ask: Callable[[], dict[str, Any]]) -> None:
        try:
            outcomes[number] = ask()["result"] == number
        except HarnessIPCError as error:
            outcomes[number] = error
            # Leave the next daemon time to start.
            time.sleep(0.005)

    def ids(worker: int) -> Any:
        return (f"{worker}.{n}" for n in range(1_000_000))

    async def ask_async(worker: int) -> None:
        client = None
        while client is None:
            with contextlib.suppress(DaemonNotRunning, ConnectionLost):
                client = await aconnect_daemon("test")
        for number in ids(worker):
            if over.is_set():
                break
            try:
                outcomes[number] = (await client.request({"id": number}, timeout=PATIENCE))["result"] == number
            except HarnessIPCError as error:
                outcomes[number] = error
                await asyncio.sleep(0.005)
        await client.close()

    with ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(ask, ids(worker), over, note) for worker, ask in enumerate([ask_once, ask_once, ask_kept, ask_kept])
        ]
        jobs += [pool.submit(asyncio.run, ask_async(worker)) for worker in (4, 5)]
        try:
            serve()
        finally:
            over.set()
        for job in jobs:
            job.result(PATIENCE)
    return outcomes


def check(ran: Counter[str], outcomes: dict[str, Any]) -> None:
    assert len(outcomes) > GENERATIONS
    for number, outcome in outcomes.items():
        if isinstance(outcome, HarnessIPCError):
            # After one record is removed and before the next is written, there is no daemon.
            assert isinstance(outcome, (DaemonNotRunning, ConnectionLost)), (number, outcome)
            assert not outcome.maybe_executed, (number, outcome)
            assert ran[number] == 0
        else:
            assert outcome, number
            assert ran[number] == 1
    assert set(ran.values()) == {1}
