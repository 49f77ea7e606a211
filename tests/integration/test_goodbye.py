"""Goodbyes: requests that did not run go to the successor, and those that may have run are never repeated."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import answer_challenge
from typing import Any

import pytest

from harness_ipc import (
    AuthenticationFailed,
    Busy,
    Client,
    ConnectionLost,
    DaemonNotRunning,
    HarnessIPCError,
    InvalidParams,
    MethodNotFound,
    ProtocolError,
    RemoteError,
    aconnect_daemon,
    connect_daemon,
    request,
)
from tests.support import scripted
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE
from tests.support.scripted import Generation, Served, answer_all

MESSAGE: dict[str, Any] = {"method": "m", "params": {}}
LARGE: dict[str, Any] = {"method": "m", "params": {"text": "x" * 40_000_000}}


def ask_once(message: dict[str, Any]) -> Any:
    return request("test", message, timeout=PATIENCE)


def ask_kept(message: dict[str, Any]) -> Any:
    with connect_daemon("test", timeout=PATIENCE) as client:
        return client.request(message, timeout=PATIENCE)


def ask_async(message: dict[str, Any]) -> Any:
    async def main() -> Any:
        async with await aconnect_daemon("test", timeout=PATIENCE) as client:
            return await client.request(message, timeout=PATIENCE)

    return asyncio.run(main())


Asking = Callable[[dict[str, Any]], Any]
ASKING = pytest.mark.parametrize("ask", [ask_once, ask_kept, ask_async])


class Succession:
    """A scripted first generation, and a second one, which acquires the name when the first one withdraws."""

    def __init__(self, first: Callable[[Served], None]) -> None:
        self.second: Generation | None = None
        self.first_script = first
        self.first = Generation(self.serve)

    def serve(self, served: Served) -> None:
        self.first_script(served)

    def succeed(self) -> None:
        if self.second is None:
            self.first.withdraw()
            self.second = Generation(answer_all)

    def close(self) -> None:
        self.first.close()
        if self.second is not None:
            self.second.close()


@contextlib.contextmanager
def succession(script: Callable[[Served, Callable[[], None]], None]) -> Iterator[Succession]:
    """Run a first generation with `script(connection, succeed)`. Calling `succeed` starts the second generation."""
    generations = Succession(lambda served: script(served, lambda: generations.succeed()))
    try:
        yield generations
    finally:
        generations.close()


# Requests that did not run go to the successor.


def leave_before_the_answer(served: Served, succeed: Callable[[], None]) -> None:
    served.connection.recv_bytes()
    succeed()


def leave_in_place_of_the_verdict(served: Served, succeed: Callable[[], None]) -> None:
    answer_challenge(served.connection, served.daemon.keys.daemon)
    served.connection.send_bytes(b"#CHALLENGE#{sha256}" + bytes(32))
    served.connection.recv_bytes()
    succeed()
    served.say_goodbye()


def leave_in_place_of_the_reply(served: Served, succeed: Callable[[], None]) -> None:
    served.prove()
    served.receive()
    succeed()
    served.say_goodbye()


def leave_without_reading(served: Served, succeed: Callable[[], None]) -> None:
    served.prove()
    assert served.connection.poll(PATIENCE)
    succeed()
    served.say_goodbye()


def die_in_the_middle_of_the_request(served: Served, succeed: Callable[[], None]) -> None:
    served.prove()
    assert served.connection.poll(PATIENCE)
    succeed()


@ASKING
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (leave_before_the_answer, MESSAGE),
        (leave_in_place_of_the_verdict, MESSAGE),
        (leave_in_place_of_the_reply, MESSAGE),
        (leave_without_reading, MESSAGE),
        # The client is still sending: it must read the goodbye before it reports a broken connection.
        pytest.param(leave_without_reading, LARGE, marks=needs_posix),
        # The daemon did not receive the last byte.
        pytest.param(die_in_the_middle_of_the_request, LARGE, marks=needs_posix),
    ],
)
def test_a_request_that_did_not_run_is_asked_of_the_successor(
    script: Callable[[Served, Callable[[], None]], None], message: dict[str, Any], ask: Asking
) -> None:
    with succession(script) as generations:
        reply = ask(message)
        assert generations.second is not None
        assert reply == {"result": generations.second.registration.record.generation}
        assert [len(each["params"]) for each in generations.second.requests] == [len(message["params"])]
        assert generations.first.connections == 1


def test_an_idle_connection_that_was_said_goodbye_to_is_not_used() -> None:
    def script(served: Served, succeed: Callable[[], None]) -> None:
        served.prove()
        served.receive()
        served.send({"result": 0})
        succeed()
        served.say_goodbye()

    with succession(script) as generations, connect_daemon("test") as client:
        assert client.call("first") == 0
        generations.first.threads[1].join(PATIENCE)
        assert generations.second is not None
        assert client.call("second") == generations.second.registration.record.generation
        assert client.generation == generations.second.registration.record.generation
        assert [message["method"] for message in generations.second.requests] == ["second"]


# Without a successor.


@ASKING
@pytest.mark.parametrize("has_record", [True, False])
def test_a_goodbye_without_a_successor_is_not_running(ask: Asking, has_record: bool) -> None:
    def serve(served: Served) -> None:
        served.prove()
        served.receive()
        if not has_record:
            served.daemon.withdraw()
        served.say_goodbye()

    with scripted.daemon(serve) as daemon:
        with pytest.raises(DaemonNotRunning) as caught:
            ask(MESSAGE)
        assert not caught.value.maybe_executed
        # The request is not sent again to the same generation.
        assert daemon.connections == len(daemon.requests) == 1


def test_after_a_goodbye_other_connections_are_not_tried() -> None:
    def serve(served: Served) -> None:
        served.prove()
        while served.receive()["method"] != "last":
            served.send({"result": 0})
        served.say_goodbye()

    with scripted.daemon(serve) as daemon, connect_daemon("test") as client:
        streams = [client.stream("open") for _ in range(3)]
        for stream in streams:
            assert list(stream) == []
        with pytest.raises(DaemonNotRunning):
            client.call("last")
        assert [message["method"] for message in daemon.requests] == ["open"] * 3 + ["last"]


# Requests that may have run are not repeated.


def hang_up(served: Served) -> None:
    served.connection.close()


def is_stopped(served: Served) -> None:
    served.send({"error": {"type": "DaemonStopping", "message": "it stopped", "executed": True}})


def stop_streaming(served: Served) -> None:
    served.send({"continues": True, "result": 1})


def tell(kind: str, **fields: Any) -> Callable[[Served], None]:
    return lambda served: served.send({"error": {"type": kind, "message": "text", **fields}})


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("answer", "kind", "maybe_executed"),
    [
        (hang_up, ConnectionLost, True),
        (is_stopped, ConnectionLost, True),
        (stop_streaming, ConnectionLost, True),
        (tell("Busy", executed=False), Busy, False),
        (tell("InvalidParams", executed=False), InvalidParams, False),
        (tell("MethodNotFound", executed=False), MethodNotFound, False),
        (tell("KeyError", executed=False), RemoteError, False),
        (tell("InvalidParams"), RemoteError, True),
        (tell("Busy"), RemoteError, True),
        (tell("DaemonStopping"), RemoteError, True),
        (tell("KeyError"), RemoteError, True),
    ],
)
def test_requests_that_may_have_run_are_not_repeated(
    answer: Callable[[Served], None], kind: type[HarnessIPCError], maybe_executed: bool, kept: bool
) -> None:
    def script(served: Served, succeed: Callable[[], None]) -> None:
        served.prove()
        if kept:
            served.receive()
            served.send({"result": 0})
        served.receive()
        succeed()
        answer(served)
        served.say_goodbye()

    with succession(script) as generations, contextlib.closing(Client("test", timeout=PATIENCE)) as client:
        if kept:
            assert client.call("first") == 0
        with pytest.raises(kind) as caught:
            client.call("second", on_progress=print) if answer is stop_streaming else client.call("second")
        assert type(caught.value) is kind
        assert caught.value.maybe_executed is maybe_executed
        assert generations.second is not None
        # The next call goes to the successor.
        assert client.call("third") == generations.second.registration.record.generation
        assert [message["method"] for message in generations.second.requests] == ["third"]


def test_a_goodbye_before_the_daemons_proof_fails_the_handshake() -> None:
    def serve(served: Served) -> None:
        served.connection.recv_bytes()
        served.say_goodbye()

    with scripted.daemon(serve) as daemon:
        with pytest.raises(AuthenticationFailed) as caught:
            request("test", MESSAGE, timeout=PATIENCE)
        assert not caught.value.maybe_executed
        assert daemon.connections == 1


def test_a_request_asks_for_one_reply() -> None:
    with scripted.daemon(answer_all) as daemon, connect_daemon("test") as client:
        for ask in (client.request, lambda message: request("test", message)):
            with pytest.raises(ProtocolError, match="stream"):
                ask({**MESSAGE, "more": True})
        assert daemon.requests == []


@needs_posix
def test_half_a_reply_may_have_run() -> None:
    def script(served: Served, succeed: Callable[[], None]) -> None:
        served.prove()
        served.receive()
        succeed()
        os.write(served.connection.fileno(), struct.pack("!i", 100) + b'{"result": ')

    with succession(script) as generations:
        with pytest.raises(ConnectionLost) as caught:
            request("test", MESSAGE, timeout=PATIENCE)
        assert caught.value.maybe_executed
        assert generations.second is not None
        assert generations.second.requests == []
