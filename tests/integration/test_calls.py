"""Calls and streams: parameters of any name, the remaining time, progress, and closing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness_ipc import (
    Client,
    ClientClosed,
    ConnectionLost,
    DaemonTimeout,
    ProtocolError,
    RemoteError,
    _transport,
    aconnect_daemon,
    connect_daemon,
    request,
)
from tests.support import scripted
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, spawn_daemon
from tests.support.scripted import Served, answer_all

# Seconds: a timeout that expires.
SHORT = 0.2
ITEMS = [{"n": 0}, [1], "two", None]


def echo(served: Served) -> None:
    """Reply with the message itself."""
    served.prove()
    while True:
        served.send({"result": served.receive()})


# Parameters.


@pytest.mark.parametrize(
    ("arguments", "keywords", "sent"),
    [
        ((), {}, {}),
        ((), {"a": 1, "params": 2, "method": 3, "self": 4}, {"a": 1, "params": 2, "method": 3, "self": 4}),
        (({"timeout": 1, "on_progress": 2, "not a name": 3},), {}, {"timeout": 1, "on_progress": 2, "not a name": 3}),
        (({"a": 1},), {"b": 2}, {"a": 1, "b": 2}),
    ],
)
def test_any_name_can_be_a_parameter(arguments: Any, keywords: dict[str, Any], sent: dict[str, Any]) -> None:
    with scripted.daemon(echo) as daemon, connect_daemon("test") as client:
        given = [dict(argument) for argument in arguments]
        assert client.call("m", *arguments, **keywords)["params"] == sent
        assert client.call("m", *arguments, **keywords, on_progress=print)["params"] == sent
        assert list(client.stream("m", *arguments, **keywords)) == []
        assert [message["params"] for message in daemon.requests] == [sent] * 3
        assert given == [*arguments]


@pytest.mark.parametrize("verb", ["call", "stream"])
@pytest.mark.parametrize(
    ("params", "keywords", "text"), [({"a": 1}, {"a": 2}, "'a' is given twice"), ([1], {}, "not list"), ("x", {}, "not str")]
)
def test_invalid_parameters_are_refused(verb: str, params: Any, keywords: dict[str, Any], text: str) -> None:
    with scripted.daemon(echo) as daemon, connect_daemon("test") as client:
        with pytest.raises(TypeError, match=text):
            getattr(client, verb)("m", params, **keywords)
        assert daemon.requests == []


def test_a_call_sends_the_remaining_seconds() -> None:
    with scripted.daemon(echo), connect_daemon("test", request_timeout=50) as client:
        assert 49 < client.call("m")["timeout"] <= 50
        assert 4 < client.call("m", timeout=5)["timeout"] <= 5
        assert "timeout" not in client.call("m", timeout=float("inf"))
        assert client.request({"method": "m"})["result"] == {"method": "m"}


def test_a_request_has_a_minute_and_connecting_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    connect = _transport.connect

    def record_deadline(address: str, deadline: float) -> _transport.Connection:
        seen.append(deadline - time.monotonic())
        return connect(address, deadline)

    monkeypatch.setattr(_transport, "connect", record_deadline)
    with scripted.daemon(echo):
        assert request("test", {"method": "m"}) == {"result": {"method": "m"}}
        with connect_daemon("test", timeout=7) as client:
            client.close()
        assert Client("test").call("m")["timeout"] > 59
        assert Client("test").call("m", timeout=3)["timeout"] <= 3
        # Less what has passed since the deadline was set.
        assert [math.ceil(seconds) for seconds in seen] == [5, 7, 5, 3]


# Streams.


def produce(*replies: dict[str, Any]) -> Callable[[Served], None]:
    """Reply to each request with all of `replies`."""

    def serve(served: Served) -> None:
        served.prove()
        while True:
            served.receive()
            served.send(*replies)

    return serve


def items(*values: Any) -> list[dict[str, Any]]:
    return [{"continues": True, "result": value} for value in values]


def test_a_stream_gives_its_items_and_then_its_result() -> None:
    with scripted.daemon(produce(*items(*ITEMS), {"result": "done"})) as daemon, connect_daemon("test") as client:
        for _ in range(3):
            with client.stream("m", {"a": 1}, b=2) as stream:
                assert list(stream) == ITEMS
                assert stream.result == "done"
                assert list(stream) == []
        # The connection is reused.
        assert daemon.connections == 1
        assert daemon.requests[-1].pop("timeout") > 59
        assert daemon.requests[-1] == {"method": "m", "params": {"a": 1, "b": 2}, "more": True}


def test_call_passes_items_to_on_progress() -> None:
    with scripted.daemon(produce(*items(*ITEMS), {"result": 5})), connect_daemon("test") as client:
        seen: list[Any] = []
        assert client.call("m", on_progress=seen.append) == 5
        assert seen == ITEMS
    with scripted.daemon(produce({"result": 6})), connect_daemon("test") as client:
        assert client.call("m", on_progress=seen.append) == 6
        assert seen == ITEMS


def test_an_error_ends_a_stream_after_its_items() -> None:
    failing = produce(*items(1), {"error": {"type": "KeyError", "message": "gone"}})
    with scripted.daemon(failing) as daemon, connect_daemon("test") as client:
        stream = client.stream("m")
        assert next(stream) == 1
        with pytest.raises(RemoteError, match="gone") as caught:
            next(stream)
        assert caught.value.maybe_executed
        assert list(stream) == []
        assert daemon.connections == 1


class NotIndexed(RemoteError, LookupError):
    def __init__(self, folder: str, line: int) -> None:
        super().__init__(f"{folder} is not indexed", data=[folder, line])


class NotThere(RemoteError, FileNotFoundError):
    pass


NOT_INDEXED = {"type": "NotIndexed", "message": "src is not indexed", "data": ["src", 3]}


def test_a_registered_class_may_be_an_oserror() -> None:
    reply = {"error": {"type": "NotThere", "message": "it is not there"}}
    with (
        scripted.daemon(produce(reply)),
        connect_daemon("test", errors=[NotThere]) as client,
        pytest.raises(FileNotFoundError) as caught,
    ):
        client.call("m")
    assert (type(caught.value), str(caught.value)) == (NotThere, "NotThere: it is not there")


def test_an_error_is_raised_as_the_registered_class_of_its_name() -> None:
    replies = produce(*items(1), {"error": NOT_INDEXED})

    def ask_blocking() -> Iterator[BaseException]:
        with connect_daemon("test", errors=[NotIndexed]) as client:
            for ask in (lambda: client.call("m", on_progress=print), lambda: list(client.stream("m"))):
                with pytest.raises(LookupError) as caught:
                    ask()
                yield caught.value

    async def ask_async() -> BaseException:
        async with await aconnect_daemon("test", errors=[NotIndexed]) as client:
            with pytest.raises(LookupError) as caught:
                await client.call("m", on_progress=print)
            return caught.value

    with scripted.daemon(replies):
        errors = [*ask_blocking(), asyncio.run(ask_async())]
    with scripted.daemon(produce({"error": NOT_INDEXED})), connect_daemon("test", errors=[NotIndexed]) as client:
        with pytest.raises(LookupError) as caught:
            client.call("m")
        errors.append(caught.value)
    for error in errors:
        assert isinstance(error, NotIndexed)
        assert (error.type, error.message, error.data) == ("NotIndexed", "src is not indexed", ["src", 3])
        assert error.maybe_executed
        assert "src is not indexed" in str(error)


@pytest.mark.parametrize("reply", [{**NOT_INDEXED, "type": "Other"}, {**NOT_INDEXED, "executed": False}, "text"])
def test_other_errors_are_remote_errors(reply: Any) -> None:
    with scripted.daemon(produce({"error": reply})), connect_daemon("test", errors=[NotIndexed]) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("m")
        assert type(caught.value) is RemoteError


def test_classes_that_can_not_be_registered_are_refused_at_once() -> None:
    for wrong in (ValueError, "NotIndexed", RemoteError("instance")):
        with pytest.raises(TypeError, match="not a subclass of RemoteError"):
            connect_daemon("test", errors=[wrong])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"write errors=\[NotIndexed\]"):
        connect_daemon("test", errors=NotIndexed)  # type: ignore[arg-type]
    same_name = type("NotIndexed", (RemoteError,), {})
    with pytest.raises(ValueError, match="two classes named 'NotIndexed'"):
        connect_daemon("test", errors=[NotIndexed, same_name])


def never_ends(served: Served) -> None:
    served.prove()
    served.receive()
    served.send(*items(1))
    served.wait_for_departure()
    departed.set()


departed = threading.Event()


def leave_the_block(client: Client) -> None:
    with client.stream("m") as stream:
        assert next(stream) == 1


def leave_the_loop(client: Client) -> None:
    for item in client.stream("m"):
        assert item == 1
        break


def close_twice(client: Client) -> None:
    stream = client.stream("m")
    assert next(stream) == 1
    stream.close()
    stream.close()
    assert list(stream) == []


def fail_in_the_callback(client: Client) -> None:
    def fail(item: Any) -> None:
        raise LookupError(item)

    with pytest.raises(LookupError, match="1"):
        client.call("m", on_progress=fail)


def be_closed_by_a_signal_handler(client: Client) -> None:
    stream = client.stream("m")
    assert next(stream) == 1
    before = signal.signal(signal.SIGINT, lambda *_: stream.close())
    assert sys.platform != "win32"
    timer = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    try:
        timer.start()
        # None if the signal arrived before the call.
        with contextlib.suppress(ClientClosed):
            assert next(stream, None) is None
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def wait_too_long(client: Client) -> None:
    stream = client.stream("m", timeout=SHORT)
    assert next(stream) == 1
    with pytest.raises(DaemonTimeout, match="answer 'm'") as caught:
        next(stream)
    assert caught.value.maybe_executed
    assert list(stream) == []


def close_the_client(client: Client) -> None:
    stream = client.stream("m")
    assert next(stream) == 1
    client.close()
    with pytest.raises(ClientClosed) as caught:
        next(stream)
    assert caught.value.maybe_executed


@pytest.mark.parametrize(
    "leave",
    [
        leave_the_block,
        leave_the_loop,
        close_twice,
        fail_in_the_callback,
        pytest.param(be_closed_by_a_signal_handler, marks=needs_posix),
        wait_too_long,
        close_the_client,
    ],
)
def test_a_stream_that_is_left_early_ends_its_connection(leave: Callable[[Client], None]) -> None:
    departed.clear()
    with scripted.daemon(never_ends), connect_daemon("test", timeout=PATIENCE) as client:
        leave(client)
        gc.collect()
        assert departed.wait(PATIENCE)


def test_the_timeout_of_a_stream_is_between_two_items() -> None:
    def serve(served: Served) -> None:
        served.prove()
        served.receive()
        for n in range(6):
            time.sleep(SHORT)
            served.send(*items(n))
        served.send({"result": None})

    with scripted.daemon(serve), connect_daemon("test", timeout=PATIENCE) as client:
        assert list(client.stream("m", timeout=5 * SHORT)) == [*range(6)]


def test_other_calls_run_beside_a_stream() -> None:
    def serve(served: Served) -> None:
        served.prove()
        while True:
            if "more" in served.receive():
                served.send(*items(*ITEMS))
            served.send({"result": 7})

    with scripted.daemon(serve) as daemon, connect_daemon("test") as client:
        streams = [client.stream("m") for _ in range(3)]
        for expected in ITEMS:
            assert [next(stream) for stream in streams] == [expected] * 3
            assert client.call("m") == 7
        assert [list(stream) for stream in streams] == [[]] * 3
        assert daemon.connections == 4


def test_a_stream_that_is_cut_is_a_lost_connection() -> None:
    def serve(served: Served) -> None:
        served.prove()
        served.receive()
        served.send(*items(1))

    with scripted.daemon(serve), connect_daemon("test") as client:
        stream = client.stream("m")
        assert next(stream) == 1
        with pytest.raises(ConnectionLost) as caught:
            next(stream)
        assert caught.value.maybe_executed


def test_an_item_in_place_of_the_one_reply_is_an_error() -> None:
    with scripted.daemon(produce(*items(1), {"result": 2})) as daemon, connect_daemon("test") as client:
        with pytest.raises(ProtocolError, match="stream") as caught:
            client.call("m")
        assert caught.value.maybe_executed
        # The rest of that reply does not reach the next request.
        assert list(client.stream("m")) == [1]
        assert daemon.connections == 2


# Calls in the daemon's own event loop.


def test_a_blocking_call_in_the_daemons_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted.daemon(answer_all) as daemon:
        client = Client("test")
        address = daemon.registration.record.address
        monkeypatch.setitem(_transport.serving_threads, address, threading.get_ident())
        for ask in (lambda: client.call("m"), lambda: request("test", {}), lambda: connect_daemon("test")):
            with pytest.raises(RuntimeError, match="to_thread"):
                ask()
        assert daemon.connections == 0
        # A loop of another thread is allowed, also with a kept connection.
        monkeypatch.setitem(_transport.serving_threads, address, -1)
        assert client.call("m") == client.generation
        monkeypatch.setitem(_transport.serving_threads, address, threading.get_ident())
        with pytest.raises(RuntimeError, match="to_thread"):
            client.call("m")
        client.close()


def test_a_handler_that_only_replies_answers_a_stream_at_once() -> None:
    with spawn_daemon("test"), connect_daemon("test") as client:
        stream = client.stream("echo", n=1)
        assert list(stream) == []
        assert stream.result == {"n": 1}
