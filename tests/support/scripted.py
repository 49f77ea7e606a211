"""A daemon whose replies are scripted, with the Listener and the challenge of the standard library."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, TypeAlias

from harness_ipc import _transport
from harness_ipc._protocol.handshake import Keys
from harness_ipc._server.server import acquire_name
from tests.support.processes import PATIENCE

NAME = "test"
GOODBYE = b'{"meta":"goodbye"}'


class Served:
    """One connection, with the steps of the daemon's side."""

    def __init__(self, connection: Connection[Any, Any], daemon: Generation) -> None:
        self.connection = connection
        self.daemon = daemon

    def prove(self) -> None:
        """Do the whole handshake."""
        answer_challenge(self.connection, self.daemon.keys.daemon)
        deliver_challenge(self.connection, self.daemon.keys.client)

    def receive(self) -> dict[str, Any]:
        """Return the next request."""
        message: dict[str, Any] = json.loads(self.connection.recv_bytes())
        self.daemon.requests.append(message)
        return message

    def send(self, *replies: dict[str, Any]) -> None:
        for reply in replies:
            self.connection.send_bytes(json.dumps(reply).encode())

    def say_goodbye(self) -> None:
        self.connection.send_bytes(GOODBYE)

    def wait_for_departure(self) -> None:
        """Return when the client has closed the connection."""
        # On Windows, poll fails.
        with contextlib.suppress(EOFError, OSError):
            assert self.connection.poll(PATIENCE)
            self.connection.recv_bytes()
            raise AssertionError("the client sent another request")


Script: TypeAlias = Callable[[Served], None]


class Generation:
    """One generation of the daemon `test`. `requests` has the received requests, `connections` counts the connections."""

    def __init__(self, serve: Script) -> None:
        self.serve = serve
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.failures: list[BaseException] = []
        self.registration = acquire_name(NAME)
        record = self.registration.record
        self.keys = Keys(record.authkey, record.address)
        self.listener = Listener(record.address, record.family, backlog=64)
        self.over = False
        self.threads = [threading.Thread(target=self.accept)]
        self.registration.publish(app_version=None, max_message=1 << 26)
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            connection = self.listener.accept()
            if self.over:
                connection.close()
                return
            self.connections += 1
            thread = threading.Thread(target=self.serve_one, args=[connection])
            self.threads.append(thread)
            thread.start()

    def serve_one(self, connection: Connection[Any, Any]) -> None:
        # The client may disconnect at any time.
        with connection, contextlib.suppress(EOFError, OSError):
            try:
                self.serve(Served(connection, self))
            except AssertionError as error:
                self.failures.append(error)
                raise

    def withdraw(self) -> None:
        """Stop accepting and remove the record, like a draining daemon. Connections stay open."""
        if not self.over:
            self.over = True
            _transport.connect(self.registration.record.address, _transport.deadline_after(PATIENCE)).close()
            self.threads[0].join(PATIENCE)
            self.listener.close()
            self.registration.release()

    def close(self) -> None:
        self.withdraw()
        for thread in self.threads:
            thread.join(PATIENCE)
        assert self.failures == []


@contextlib.contextmanager
def daemon(serve: Script) -> Iterator[Generation]:
    """Run a scripted daemon with one generation."""
    generation = Generation(serve)
    try:
        yield generation
    finally:
        generation.close()


def answer_all(served: Served) -> None:
    """Answer each request with the generation, until the client disconnects."""
    served.prove()
    while True:
        served.receive()
        served.send({"result": served.daemon.registration.record.generation})
