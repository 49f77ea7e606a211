"""A `Service` over real connections: methods, streams, threads, errors and disconnects."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import (
    AsyncClient,
    ConnectionLost,
    DaemonServer,
    ExpectedMore,
    InvalidParams,
    MethodNotFound,
    RemoteError,
    Service,
    __version__,
    aconnect_daemon,
    connect_daemon,
    current_request,
    method,
    report,
    start_daemon_server,
)
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, spawn_python, wait_until
from tests.support.wire import dial_daemon

pytestmark = pytest.mark.usefixtures("driver")

MAX_THREADS = 32


@dataclass
class Word:
    text: str
    source: Path


class Amount:
    def __init__(self, cents: int) -> None:
        self.cents = cents


class Words(Service):
    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.calls = 0
        self.guard = threading.Lock()
        self.may_end = threading.Event()
        self.began = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.ended: list[str] = []

    def encode_result(self, value: Any) -> Any:
        return value.cents / 100 if isinstance(value, Amount) else super().encode_result(value)

    @method
    async def count(self, text: str) -> int:
        return len(text.split())

    @method
    async def find(self, source: Path) -> list[Word]:
        return [Word(text, source) for text in ("a", "b")]

    @method
    async def amounts(self) -> AsyncIterator[Any]:
        await report({"first": Amount(50)})
        yield Amount(100)
        yield [Amount(250)]

    @method
    async def amount(self) -> Any:
        return {"total": Amount(150)}

    @method
    async def unsendable(self) -> Any:
        return {"items": [1, {"when": {1, 2}}]}

    @method
    async def chosen(self, n: int) -> AsyncIterator[int]:
        return self.numbers(n)

    @method
    def chosen_in_a_thread(self) -> AsyncIterator[str]:
        return self.waiting()

    async def waiting(self) -> AsyncIterator[str]:
        yield "begun"
        await self.note("waiting")

    async def numbers(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    @method
    async def wait(self) -> None:
        await self.note("wait")

    @method(cancel_on_disconnect=False)
    async def wait_anyway(self) -> None:
        await self.note("wait_anyway")

    @method(cancel_on_disconnect=False)
    async def items_anyway(self) -> AsyncIterator[int]:
        yield 1
        await self.note("items_anyway")
        yield 2
        self.ended.append("last item")

    async def note(self, what: str) -> None:
        self.began.set()
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.ended.append(f"{what} cancelled")
            raise
        self.ended.append(f"{what}, caller gone: {current_request().cancelled}")

    @method
    def block(self) -> str:
        """Block a thread until the test lets it end."""
        with self.guard:
            self.calls += 1
            self.running += 1
            self.most = max(self.most, self.running)
        self.may_end.wait(PATIENCE)
        with self.guard:
            self.running -= 1
        self.ended.append(f"block, caller gone: {current_request().cancelled}")
        return threading.current_thread().name

    @method
    def who(self) -> list[Any]:
        return [current_request().method, threading.current_thread().daemon, threading.get_ident()]

    @method
    def fail(self, how: str) -> None:
        raise {"StopIteration": StopIteration, "SystemExit": SystemExit, "KeyError": KeyError}[how]("in a thread")

    @method
    async def refuse(self, data: Any) -> None:
        raise RemoteError("not now", type="Closed", data={1} if data == "a set" else "x" * 2000 if data == "large" else data)

    @method
    async def ask_another(self) -> None:
        raise MethodNotFound("there, not here")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Words, DaemonServer, AsyncClient]]:
    words = Words()
    server, _ = await start_daemon_server(words, "test", **options)
    async with asyncio.timeout(PATIENCE), server, await aconnect_daemon("test", request_timeout=PATIENCE) as client:
        try:
            yield words, server, client
            if server.is_serving():
                assert await client.call("count", text="still here") == 2
        finally:
            words.may_end.set()
            words.may_go_on.set()


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **keywords: Any) -> None:
        asyncio.run(test(*arguments, **keywords))

    return run


async def until(condition: Any) -> None:
    await asyncio.to_thread(wait_until, condition)


@in_loop
async def test_methods_streams_and_progress() -> None:
    async with serving() as (_, _, client):
        assert await client.call("count", text="the quick brown fox") == 4
        assert await client.call("find", source=Path("a") / "b") == [
            {"text": text, "source": str(Path("a") / "b")} for text in ("a", "b")
        ]
        assert [item async for item in client.stream("chosen", n=3)] == [0, 1, 2]
        assert await client.call("amount") == {"total": 1.5}
        assert [item async for item in client.stream("amounts")] == [{"first": 0.5}, 1, [2.5]]


@in_loop
async def test_a_service_describes_itself_to_both_clients() -> None:
    async with serving() as (words, server, client):

        def ask() -> dict[str, Any]:
            with connect_daemon("test") as blocking:
                return blocking.describe()

        described = await client.describe()
        assert await asyncio.to_thread(ask) == described
        assert described["methods"] == words.describe_methods()
        assert (described["name"], described["version"]) == ("test", __version__)
        assert {"name": "count", "signature": "count(text: str) -> int", "doc": "", "stream": False} in described["methods"]
        assert [found["name"] for found in described["methods"] if found["stream"]] == STREAMS
        # Built-in requests do not reset the idle time.
        assert server.idle_seconds > 0


STREAMS = ["amounts", "chosen", "chosen_in_a_thread", "items_anyway"]


@in_loop
async def test_refused_calls_are_typed_and_did_not_run() -> None:
    async with serving() as (words, server, client):

        def ask() -> None:
            with connect_daemon("test") as blocking:
                for kind, name, params in REFUSED:
                    with pytest.raises(kind) as caught:
                        blocking.call(name, params)
                    assert caught.value.maybe_executed is False
                    with pytest.raises(kind):
                        list(blocking.stream(name, params)) if kind is not ExpectedMore else blocking.call(name, params)

        await asyncio.to_thread(ask)
        for kind, name, params in REFUSED:
            with pytest.raises(kind) as caught:
                await client.call(name, params)
            assert type(caught.value) is kind
            assert caught.value.maybe_executed is False
        assert words.calls == 0
        assert server.idle_seconds < PATIENCE


REFUSED: list[tuple[type[RemoteError], str, dict[str, Any]]] = [
    (MethodNotFound, "cuont", {}),
    (InvalidParams, "count", {"txt": "a"}),
    (InvalidParams, "block", {"seconds": 1}),
    (ExpectedMore, "amounts", {}),
]


@in_loop
async def test_an_error_of_these_types_from_a_method_may_have_run() -> None:
    async with serving() as (_, _, client):
        with pytest.raises(RemoteError, match="MethodNotFound: there, not here") as caught:
            await client.call("ask_another")
        assert type(caught.value) is RemoteError
        assert caught.value.maybe_executed is True


@in_loop
async def test_a_result_that_can_not_be_sent_names_the_key() -> None:
    async with serving() as (_, _, client):
        with pytest.raises(RemoteError, match=r"result\.items\[1\]\.when: set is not JSON"):
            await client.call("unsendable")


# Expected errors.


@pytest.mark.parametrize("data", [None, 0, {"a": [1]}])
@in_loop
async def test_an_expected_error_arrives_as_it_is_and_logs_nothing(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as (_, _, client):
        caplog.clear()
        with pytest.raises(RemoteError) as caught:
            await client.call("refuse", data=data)
        assert str(caught.value) == "Closed: not now"
        assert (caught.value.type, caught.value.message, caught.value.data) == ("Closed", "not now", data)
        assert caught.value.maybe_executed is True
        assert caplog.records == []


@pytest.mark.parametrize("data", ["a set", "large"])
@in_loop
async def test_data_that_can_not_be_sent_does_not_hide_the_error(data: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(max_message=1000) as (_, _, client):
        with pytest.raises(RemoteError) as caught:
            await client.call("refuse", data=data)
        assert (str(caught.value), caught.value.data) == ("Closed: not now", None)
        assert "the reply can't be sent" in caplog.text


@in_loop
async def test_an_expected_error_of_a_health_check_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def health() -> dict[str, Any]:
        raise RemoteError("no browser", type="Lost", data={"since": 1})

    async with serving(health=health) as (_, _, client):
        error = {"type": "Lost", "message": "no browser", "data": {"since": 1}}
        assert await client.request({"meta": "health"}) == {"error": error}
        assert "health check failed: Lost: no browser" in caplog.text


@in_loop
async def test_any_other_error_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (_, _, client):
        for how in ("KeyError", "SystemExit", "StopIteration"):
            with pytest.raises(RemoteError):
                await client.call("fail", how=how)
        assert all(f"{how}" in caplog.text for how in ("KeyError", "SystemExit", "StopIteration"))
        assert "Traceback" in caplog.text


# Threads.


@in_loop
async def test_other_methods_run_in_daemon_threads_that_are_kept() -> None:
    async with serving() as (_, _, client):
        results = [await client.call("who") for _ in range(20)]
        assert all((name, is_daemon) == ("who", True) for name, is_daemon, _ in results)
        # A call may come just before the previous thread is idle again and start another one.
        threads = {thread for _, _, thread in results}
        assert len(threads) < 20
        assert threading.get_ident() not in threads


@in_loop
async def test_at_most_32_threads_run_and_the_rest_waits() -> None:
    async with serving() as (words, _, client):
        calls = [asyncio.create_task(client.call("block")) for _ in range(MAX_THREADS + 8)]
        await until(lambda: words.running == MAX_THREADS)
        # The loop serves meanwhile.
        assert await client.call("count", text="x") == 1
        words.may_end.set()
        await asyncio.gather(*calls)
        assert (words.most, words.calls) == (MAX_THREADS, MAX_THREADS + 8)


@in_loop
async def test_a_call_that_waits_for_a_thread_leaves_with_its_caller() -> None:
    async with serving() as (words, server, client), await aconnect_daemon("test") as other:
        calls = [asyncio.create_task(client.call("block")) for _ in range(MAX_THREADS)]
        await until(lambda: words.running == MAX_THREADS)
        waiting = [asyncio.create_task(other.call("block")) for _ in range(3)]
        await until(lambda: server.connections == MAX_THREADS + 3)
        assert await client.call("count", text="x") == 1
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await until(lambda: server.connections == MAX_THREADS + 1)
        words.may_end.set()
        await asyncio.gather(*calls)
        assert await client.call("who")
        assert words.calls == MAX_THREADS


@in_loop
async def test_a_running_thread_is_in_flight_until_it_returns() -> None:
    async with serving() as (words, server, client):
        asking = asyncio.create_task(client.call("block"))
        await until(lambda: words.running == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await until(lambda: server.connections == 0)
        assert server.idle_seconds == 0
        words.may_end.set()
        await until(lambda: server.idle_seconds > 0)
        assert words.ended == ["block, caller gone: True"]


@in_loop
async def test_a_drain_waits_for_threads_only_the_grace_period() -> None:
    async with serving(grace_period=0.1) as (words, server, client):
        asking = asyncio.create_task(client.call("block"))
        await until(lambda: words.running == 1)
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionLost) as caught:
            await asking
        assert caught.value.maybe_executed is True
        assert words.running == 1


BLOCKING = """
import threading, time
from harness_ipc import Service, method, run_daemon

class Blocking(Service):
    @method
    def block(self):
        print("blocked", flush=True)
        time.sleep(3600)

run_daemon(Blocking(), "test", grace_period=0, on_ready=lambda _: print("ready", flush=True))
"""


def test_a_daemon_ends_beside_a_thread_that_does_not() -> None:
    with spawn_python("-c", BLOCKING) as daemon, ThreadPoolExecutor(1) as pool:
        assert daemon.read_line() == "ready"
        with connect_daemon("test", request_timeout=PATIENCE) as client:
            asking = pool.submit(client.call, "block")
            assert daemon.read_line() == "blocked"
            assert client.request({"meta": "shutdown"}) == {"shutdown": True}
            assert daemon.wait() == 0
            assert isinstance(asking.exception(PATIENCE), ConnectionLost)


FORKING = """
import os
from harness_ipc import Service, method, run_daemon

class Forking(Service):
    @method
    def leave(self, fails: bool) -> int:
        if pid := os.fork():
            return os.waitpid(pid, 0)[1]
        if fails:
            raise ValueError("the child's")
        return 0

run_daemon(Forking(), "test", on_ready=lambda _: print("ready", flush=True))
"""


@needs_posix
def test_a_forked_child_that_leaves_its_method_ends() -> None:
    # From 3.12 on, Python warns of a fork beside other threads.
    with spawn_python("-W", "ignore::DeprecationWarning", "-c", FORKING) as daemon:
        assert daemon.read_line() == "ready"
        with connect_daemon("test", request_timeout=PATIENCE) as client:
            assert client.call("leave", fails=False) == 0
            assert os.waitstatus_to_exitcode(client.call("leave", fails=True)) == 1


# Disconnects.


@pytest.mark.parametrize("name", ["wait_anyway", "items_anyway"])
@in_loop
async def test_a_method_that_outlives_its_caller_runs_to_its_end(name: str) -> None:
    async with serving() as (words, server, client):
        asking = asyncio.create_task(client.call(name, on_progress=print))
        await words.began.wait()
        asking.cancel()
        await asyncio.wait([asking])
        await until(lambda: server.connections == 0)
        words.may_go_on.set()
        await until(lambda: server.idle_seconds > 0)
        assert words.ended[0] == f"{name}, caller gone: True"


@in_loop
async def test_other_methods_are_cancelled() -> None:
    async with serving() as (words, _, client):
        asking = asyncio.create_task(client.call("wait"))
        await words.began.wait()
        asking.cancel()
        await until(lambda: words.ended == ["wait cancelled"])


@in_loop
async def test_a_request_that_is_sent_and_forgotten_runs() -> None:
    async with serving() as (words, server, client):
        # Connect `client` first: its connection is the only one at the end.
        assert await client.call("count", text="") == 0

        def send() -> None:
            with dial_daemon("test") as connection:
                connection.send_bytes(json.dumps({"method": "wait_anyway"}).encode())

        await asyncio.to_thread(send)
        await words.began.wait()
        await until(lambda: server.connections == 1)
        words.may_go_on.set()
        await until(lambda: words.ended == ["wait_anyway, caller gone: True"])


@in_loop
async def test_a_stream_that_a_thread_has_made_is_cancelled() -> None:
    async with serving() as (words, _, client):
        async with client.stream("chosen_in_a_thread") as stream:
            assert [await anext(stream)] == ["begun"]
            await words.began.wait()
        await until(lambda: words.ended == ["waiting cancelled"])


@in_loop
async def test_a_drain_cancels_a_method_that_outlives_its_caller() -> None:
    async with serving(grace_period=0) as (words, server, client):
        asking = asyncio.create_task(client.call("wait_anyway"))
        await words.began.wait()
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionLost):
            await asking
        assert words.ended == ["wait_anyway cancelled"]
