"""The asyncio client, in the loop and over threads: each task gets its own reply or a typed error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import (
    AsyncClient,
    Client,
    ClientClosed,
    DaemonNotRunning,
    DaemonTimeout,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    _aclient,
    aconnect_daemon,
)
from tests.support import scripted
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, serves, spawn_daemon, stopped, wait_until
from tests.support.scripted import Served

# Seconds: longer than any test.
NEVER = 3600.0


@pytest.fixture(params=[pytest.param("loop", marks=needs_posix), "threads"], autouse=True)
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The I/O of the client; on Windows only threads."""
    if request.param == "threads":
        monkeypatch.setattr(_aclient, "_LOOP_IO", None)
    return str(request.param)


def run(main: Callable[[AsyncClient], Awaitable[None]], *, refuse_threads: bool = True) -> None:
    """Run `main` with a client, in a loop whose default executor raises. Assert that no thread is left."""

    class Refusing(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("the loop's default executor is not ours to use")

    async def in_time() -> None:
        if refuse_threads:
            asyncio.get_running_loop().set_default_executor(Refusing())
        async with asyncio.timeout(PATIENCE), await aconnect_daemon("test") as client:
            await main(client)

    before = set(threading.enumerate())
    asyncio.run(in_time())
    # A cancelled call does not wait for its thread, which ends shortly after.
    wait_until(lambda: set(threading.enumerate()) == before)


def test_coroutines_have_the_same_verbs(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        assert client.pid == daemon.pid
        assert await client.request({"a": 1}) == {"raw": {"a": 1}}
        assert await client.call("echo", n=1) == {"n": 1}
        with pytest.raises(RemoteError, match="as told"):
            await client.call("raise")
        with pytest.raises(ProtocolError):
            await client.call("unknown")
        with pytest.raises(ValueError, match="timeout"):
            await client.call("echo", timeout=-1)
        with pytest.raises(DaemonTimeout):
            await client.call("sleep", seconds=NEVER, timeout=0.1)
        assert await client.call("echo", n=2) == {"n": 2}

    run(main)


def test_coroutines_at_once_each_get_their_own_reply(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        assert await asyncio.gather(*(client.call("echo", n=n) for n in range(100))) == [{"n": n} for n in range(100)]

    run(main)


def test_the_loop_turns_while_a_request_waits(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        async with await aconnect_daemon("test") as other:
            # Neither is answered before both have been sent.
            assert sum(await asyncio.gather(client.call("meet", tag=1), other.call("meet", tag=2))) == 3

    run(main)


async def begin(client: AsyncClient, tag: str) -> asyncio.Task[Any]:
    """Send a request that does not end, and return its task once it runs in the daemon."""
    task = asyncio.create_task(client.call("sleep", seconds=NEVER, tag=tag, timeout=NEVER))
    async with await aconnect_daemon("test") as observer:
        while ["begin", tag] not in await observer.call("log"):
            pass
    return task


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


def test_a_cancelled_request_blocks_nobody(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        for tag in ("first", "second"):
            await cancel(await begin(client, tag))
            assert await client.call("echo", n=1) == {"n": 1}

    run(main)


def test_one_client_runs_calls_at_once(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        # None is answered before all have been sent.
        calls = [client.call("meet", tag=n, of=50) for n in range(50)]
        assert sum(await asyncio.gather(*calls)) == sum(range(50))

    run(main)


def test_a_call_above_the_limit_waits_and_can_be_cancelled(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        running = [await begin(client, f"running {n}") for n in range(64)]
        queued = [asyncio.create_task(client.call("sleep", seconds=0, tag=f"queued {n}")) for n in range(3)]
        with pytest.raises(DaemonTimeout, match="64 other calls"):
            await client.call("sleep", seconds=0, tag="late", timeout=0.1)
        await cancel(queued[0])
        await cancel(queued[2])
        await cancel(running[0])
        assert await queued[1] == "queued 1"
        for task in running[1:]:
            task.cancel()
        await asyncio.wait(running[1:])
        async with await aconnect_daemon("test") as other:
            log = await other.call("log")
        assert sorted(tag for event, tag in log if event == "begin" and "running" not in tag) == ["queued 1"]

    run(main)


def test_cancellation_at_the_deadline_keeps_turns_apart(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        running = [await begin(client, f"running {n}") for n in range(64)]
        late = asyncio.create_task(client.call("echo", timeout=0.1))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.15, late.cancel)
        # The reply and the cancellation are due in the same iteration of the loop.
        time.sleep(0.2)
        await asyncio.wait({late})
        assert late.cancelled()
        with pytest.raises(DaemonTimeout, match="64 other calls"):
            await client.call("echo", timeout=0.1)
        for task in running:
            task.cancel()
        await asyncio.wait(running)

    run(main)


def test_one_client_serves_one_event_loop_after_another(daemon: DaemonProcess) -> None:
    client = AsyncClient(Client("test", timeout=PATIENCE, request_timeout=PATIENCE, max_message=2**20))
    for n in range(3):
        assert asyncio.run(client.call("echo", n=n)) == {"n": n}
    asyncio.run(client.close())


def test_cancelling_at_any_moment_spoils_nothing_for_the_others(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        for turns in range(300):
            doomed = asyncio.create_task(client.call("sleep", seconds=0.001 * (turns % 2), tag=-1))
            spared = asyncio.create_task(client.call("echo", n=turns, timeout=PATIENCE))
            for _ in range(turns % 30):
                await asyncio.sleep(0)
            doomed.cancel()
            assert await spared == {"n": turns}
            await asyncio.wait({doomed})

    run(main)


@needs_posix
def test_cancelling_a_connect_ends_it(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        with stopped(daemon):
            connecting = asyncio.create_task(aconnect_daemon("test", timeout=NEVER))
            done, _ = await asyncio.wait({connecting}, timeout=0.2)
            assert not done
            async with asyncio.timeout(10):
                await cancel(connecting)

    run(main)


def test_threads_of_a_client_that_is_dropped_end(daemon: DaemonProcess) -> None:
    async def main() -> None:
        client = await aconnect_daemon("test")
        assert await client.call("echo", n=1) == {"n": 1}

    before = set(threading.enumerate())
    asyncio.run(main())
    gc.collect()
    wait_until(lambda: set(threading.enumerate()) == before)


def test_closing_ends_requests_and_may_be_repeated(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        task = await begin(client, "blocked")
        other_task = asyncio.create_task(client.call("sleep", seconds=NEVER, tag="just begun"))
        await asyncio.sleep(0)
        await client.close()
        await client.close()
        outcomes = await asyncio.gather(task, other_task, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ClientClosed] * 2
        with pytest.raises(ClientClosed):
            await client.call("echo")
        async with await aconnect_daemon("test") as other:
            assert ["end", "blocked"] not in await other.call("log")

    run(main)


@contextlib.contextmanager
def no_new_thread() -> Iterator[None]:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def test_coroutine_without_a_thread_never_runs_its_request(daemon: DaemonProcess, driver: str) -> None:
    if driver == "loop":
        pytest.skip("the loop needs no thread")

    async def main(client: AsyncClient) -> None:
        with no_new_thread(), pytest.raises(ResourceExhausted, match="ulimit -u"):
            await aconnect_daemon("test")
        with no_new_thread():
            other = AsyncClient(Client("test", timeout=PATIENCE, request_timeout=PATIENCE, max_message=2**20))
            with pytest.raises(ResourceExhausted, match="ulimit -u") as caught:
                await other.call("sleep", seconds=0, tag="refused")
            assert not caught.value.maybe_executed
        assert await other.call("log") == []
        await other.close()
        assert await client.call("log") == []

    run(main)


def test_coroutines_follow_a_restart() -> None:
    async def main(client: AsyncClient) -> None:
        before = client.generation
        old.process.kill()
        old.wait()
        with pytest.raises(DaemonNotRunning):
            await client.call("echo")
        with pytest.raises(DaemonNotRunning):
            await aconnect_daemon("test")
        stack.enter_context(spawn_daemon("test"))
        assert await client.call("echo", n=1) == {"n": 1}
        assert client.generation != before

    with contextlib.ExitStack() as stack:
        old = stack.enter_context(spawn_daemon("test"))
        run(main)
        assert serves()


def test_cancelling_while_a_request_connects_again_ends_it() -> None:
    reopened, may_go_on = threading.Event(), threading.Event()

    def serve(served: Served) -> None:
        if served.daemon.connections == 1:
            served.prove()
            served.receive()
            served.send({"result": 1})
            return
        if not reopened.is_set():
            reopened.set()
            assert may_go_on.wait(PATIENCE)
        served.prove()
        while True:
            served.receive()
            served.send({"result": 2})

    async def main(client: AsyncClient) -> None:
        assert await client.call("early") == 1
        await asyncio.to_thread(generation.threads[1].join)
        late = asyncio.create_task(client.call("late", timeout=PATIENCE))
        while not reopened.is_set():
            await asyncio.sleep(0.001)
        await cancel(late)
        may_go_on.set()
        assert await client.call("next", timeout=PATIENCE) == 2
        assert [message["method"] for message in generation.requests] == ["early", "next"]

    with scripted.daemon(serve) as generation:
        run(main, refuse_threads=False)


# Streams.


ITEMS = [{"continues": True, "result": n} for n in range(3)]


def produce(served: Served) -> None:
    served.prove()
    while True:
        served.receive()
        served.send(*ITEMS, {"result": "done"})


def test_a_stream_gives_its_items_and_then_its_result() -> None:
    async def main(client: AsyncClient) -> None:
        for _ in range(3):
            async with client.stream("m", {"a": 1}, b=2) as stream:
                assert [item async for item in stream] == [0, 1, 2]
                assert stream.result == "done"
                assert [item async for item in stream] == []
        seen: list[Any] = []
        assert await client.call("m", {"a": 1}, b=2, on_progress=seen.append) == "done"
        assert seen == [0, 1, 2]

    with scripted.daemon(produce) as daemon:
        run(main)
        assert daemon.connections == 1
        assert all(message["params"] == {"a": 1, "b": 2} and message["more"] for message in daemon.requests)


def never_ends(served: Served) -> None:
    served.prove()
    served.receive()
    served.send(ITEMS[0])
    served.wait_for_departure()
    departed.set()


departed = threading.Event()


async def leave_the_block(client: AsyncClient) -> None:
    async with client.stream("m") as stream:
        assert await anext(stream) == 0


async def leave_the_loop(client: AsyncClient) -> None:
    async for item in client.stream("m"):
        assert item == 0
        break


async def close_twice(client: AsyncClient) -> None:
    stream = client.stream("m")
    assert await anext(stream) == 0
    await stream.close()
    await stream.close()
    assert [item async for item in stream] == []


async def be_cancelled(client: AsyncClient) -> None:
    stream = client.stream("m")
    assert await anext(stream) == 0
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.05)
    await cancel(waiting)


async def be_closed_by_another_task(client: AsyncClient) -> None:
    stream = client.stream("m")
    assert await anext(stream) == 0
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.05)
    await stream.close()
    with pytest.raises(ClientClosed) as caught:
        await waiting
    assert caught.value.maybe_executed


async def wait_too_long(client: AsyncClient) -> None:
    stream = client.stream("m", timeout=0.2)
    assert await anext(stream) == 0
    with pytest.raises(DaemonTimeout, match="answer 'm'") as caught:
        await anext(stream)
    assert caught.value.maybe_executed


@pytest.mark.parametrize(
    "leave", [leave_the_block, leave_the_loop, close_twice, be_cancelled, be_closed_by_another_task, wait_too_long]
)
def test_a_stream_that_is_left_early_ends_its_connection(leave: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with await aconnect_daemon("test") as client:
            await leave(client)
            assert await asyncio.to_thread(departed.wait, PATIENCE)

    departed.clear()
    with scripted.daemon(never_ends):
        asyncio.run(main())


def test_a_stream_takes_no_turn_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(served: Served) -> None:
        served.prove()
        while True:
            if "more" in served.receive():
                served.send(ITEMS[0])
            else:
                served.send({"result": 1})

    async def main(client: AsyncClient) -> None:
        streams = [client.stream("m") for _ in range(70)]
        assert await asyncio.gather(*map(anext, streams)) == [0] * 70
        assert await client.call("m", timeout=PATIENCE) == 1
        for stream in streams:
            await stream.close()

    with scripted.daemon(serve):
        run(main)


# The loop.


@needs_posix
def test_a_daemon_that_accepts_nothing_does_not_block_the_loop(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        with stopped(daemon):
            waiting = [asyncio.create_task(aconnect_daemon("test", timeout=2.0)) for _ in range(200)]
            turns = 0
            while not all(task.done() for task in waiting):
                await asyncio.sleep(0.01)
                turns += 1
            assert {type(task.exception()) for task in waiting} == {DaemonTimeout}
        # Usually about 200. With a blocking connect, there would be one or two.
        assert turns > 5

    run(main)


def test_large_messages_pass_both_ways_beside_others(daemon: DaemonProcess) -> None:
    async def main(client: AsyncClient) -> None:
        text = "x" * 5_000_000
        calls = [client.call("echo", text=text), *(client.call("echo", n=n) for n in range(20))]
        replies = await asyncio.gather(*calls)
        assert replies == [{"text": text}, *({"n": n} for n in range(20))]

    run(main)


def test_a_client_of_the_daemons_own_loop_is_answered() -> None:
    from harness_ipc import start_daemon_server

    async def handle(message: dict[str, Any]) -> dict[str, Any]:
        return {"result": message["params"]}

    async def main() -> None:
        server, _ = await start_daemon_server(handle, "test")
        async with server, await aconnect_daemon("test") as client:
            assert await client.call("echo", n=1) == {"n": 1}

    asyncio.run(main())
