"""Closing a server: every received request is answered or fails with a typed error, and nothing hangs or is left.

These tests use the public API, and a raw connection for messages that a `Client` cannot send.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from harness_ipc import (
    Client,
    ConnectionLost,
    DaemonNotRunning,
    DaemonServer,
    HarnessIPCError,
    cleanup_endpoint,
    connect_daemon,
    request,
    start_daemon_server,
)
from tests.integration.test_server import (
    NEVER,
    SOON,
    Unstoppable,
    Waiting,
    ask,
    echo,
    run,
    serves,
    serving,
    task_factories,
    threads,
)
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, run_python, runtime_files, spawn_python, wait_until
from tests.support.wire import FrameConnection, dial_daemon

LIMIT = 2**20
pytestmark = pytest.mark.usefixtures("driver")


# Requests that are cancelled.


@pytest.mark.parametrize("closing", [False, True])
def test_a_request_cancelled_before_it_starts_is_answered(closing: bool) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        # An eager task would begin at once (3.12 and later).
        loop.set_task_factory(lambda loop, run, **options: asyncio.Task(run, loop=loop, **options))
        async with serving(grace_period=NEVER) as server:
            client = await asyncio.to_thread(connect_daemon, "test")
            asking = asyncio.create_task(asyncio.to_thread(client.request, {"n": 1}, timeout=PATIENCE))
            known = asyncio.all_tasks()

            def cancel_new_tasks() -> None:
                # In each iteration of the loop, cancel new tasks before their first step.
                new = asyncio.all_tasks(loop) - known
                for task in new:
                    task.cancel()
                if not new:
                    loop.call_soon(cancel_new_tasks)
                elif closing:
                    server.close()

            loop.call_soon(cancel_new_tasks)
            assert (await asking)["error"]["type"] == "CancelledError"
            if not closing:
                assert await asyncio.to_thread(client.request, {"n": 2}) == {"result": {"n": 2}}
            await asyncio.to_thread(client.close)

    run(main)


def read_to_the_end(connection: FrameConnection) -> list[dict[str, Any]]:
    replies = []
    with suppress(ConnectionLost):
        while True:
            replies.append(json.loads(connection.recv_bytes(LIMIT)))
    return replies


@task_factories
def test_a_request_read_after_the_cancellation_does_not_run(factory: Any) -> None:
    async def main() -> None:
        handler = Waiting()
        seen: list[int] = []

        async def note(message: dict[str, Any]) -> dict[str, Any]:
            seen.append(message["n"])
            return await handler(message)

        async with serving(note, grace_period=SOON) as server:
            asyncio.get_running_loop().set_task_factory(factory)
            with await asyncio.to_thread(dial_daemon, "test") as connection:
                for n in range(100):
                    connection.send_bytes(json.dumps({"n": n}).encode())
                await handler.began.wait()
                server.close()
                await server.wait_closed()
                first, *others = await asyncio.to_thread(read_to_the_end, connection)
        assert first["error"]["type"] == "DaemonStopping"
        assert not any("result" in reply for reply in others)
        assert (seen, handler.cancelled) == ([0], 1)

    run(main)


def test_ignoring_cancellation_is_answered_with_an_error() -> None:
    async def main() -> None:
        handler = Unstoppable()
        async with serving(handler, grace_period=SOON) as server:
            in_flight = asyncio.create_task(ask())
            await handler.began.wait()
            server.close()
            await server.wait_closed()
            with pytest.raises(ConnectionLost, match="stopped") as caught:
                await in_flight
            assert caught.value.maybe_executed
        handler.may_go_on.set()

    run(main)


def test_closing_answers_requests_of_a_blocked_loop() -> None:
    def outcome(message: dict[str, Any]) -> str:
        try:
            return "error reply" if "error" in request("test", message, timeout=PATIENCE) else "reply"
        except HarnessIPCError as error:
            return type(error).__name__

    async def main() -> None:
        async def block(message: dict[str, Any]) -> dict[str, Any]:
            if "block" in message:
                blocked.set()
                assert others_ask.wait(PATIENCE)
                server.close()
            return {"result": message}

        def talk() -> None:
            with ThreadPoolExecutor(5) as pool:
                try:
                    blocker = pool.submit(outcome, {"block": True})
                    assert blocked.wait(PATIENCE)
                    others = [pool.submit(outcome, {"n": n}) for n in range(4)]
                finally:
                    others_ask.set()
                assert blocker.result(PATIENCE) == "reply"
                assert {other.result(PATIENCE) for other in others} <= {
                    "error reply",
                    "Busy",
                    "ConnectionLost",
                    "DaemonNotRunning",
                }

        blocked, others_ask = threading.Event(), threading.Event()
        async with serving(block, grace_period=0) as server:
            await asyncio.to_thread(talk)

    run(main)


def test_closing_during_requests_leaves_nobody_waiting() -> None:
    async def pause(message: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(NEVER if message["n"] % 5 == 4 else 0)
        return {"result": message}

    def ask_until_the_end(client: Client, rounds: list[int]) -> None:
        with client, suppress(HarnessIPCError):
            for n in range(10_000):
                rounds.append(n)
                if "error" in client.request({"n": n}, timeout=PATIENCE):
                    return
            raise AssertionError("the server did not close")

    async def main() -> None:
        for grace_period in [0, 0.01] * 5:
            async with serving(pause, grace_period=grace_period) as server:
                rounds: list[int] = []
                clients = [await asyncio.to_thread(connect_daemon, "test") for _ in range(8)]
                asking = [asyncio.create_task(asyncio.to_thread(ask_until_the_end, client, rounds)) for client in clients]
                while len(rounds) < 20:
                    await asyncio.sleep(0)
                server.close()
                await asyncio.gather(*asking, server.wait_closed())

    run(main)


# Exceptions of handlers.


class Ending(BaseException):
    """A BaseException like SystemExit."""


class ExitingReply(dict[str, Any]):
    """A reply that raises SystemExit when it is encoded."""

    def items(self) -> Any:
        raise SystemExit("as told")


KINDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (SystemExit, KeyboardInterrupt, Ending, asyncio.CancelledError)
}


@task_factories
@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize("name", [*KINDS, "reply"])
def test_handler_exception_reaches_its_caller_only(name: str, pause: bool, factory: Any) -> None:
    async def main() -> None:
        waiting = Waiting()

        async def end(message: dict[str, Any]) -> dict[str, Any]:
            match message.get("do"):
                case "wait":
                    return await waiting(message)
                case "end":
                    if pause:
                        await asyncio.sleep(0)
                    if name == "reply":
                        return ExitingReply(result=1)
                    raise KINDS[name]("as told")
            return {"result": message}

        async with serving(end, grace_period=NEVER):
            asyncio.get_running_loop().set_task_factory(factory)
            other = asyncio.create_task(ask({"do": "wait"}))
            await waiting.began.wait()
            with await asyncio.to_thread(connect_daemon, "test") as client:
                for _ in range(2):
                    error = (await asyncio.to_thread(client.request, {"do": "end"}))["error"]
                    assert error["type"] == ("SystemExit" if name == "reply" else name)
                assert await asyncio.to_thread(client.request, {"n": 1}) == {"result": {"n": 1}}
            assert await serves()
            waiting.may_go_on.set()
            assert await other == {"result": {"do": "wait"}}

    run(main)


async def exit_health() -> dict[str, Any]:
    raise SystemExit("as told")


def test_a_health_check_that_exits_is_an_error_reply() -> None:
    async def main() -> None:
        async with serving(health=exit_health):
            assert await ask({"meta": "health"}) == {"error": {"type": "SystemExit", "message": "as told"}}
            assert await serves()

    run(main)


APP_EXITS = """
import asyncio
from harness_ipc import run_daemon

class App:
    async def start(self):
        self.background = asyncio.create_task(self.exit())
        self.asked = asyncio.Event()

    async def exit(self):
        await self.asked.wait()
        raise SystemExit(7)

    async def handle(self, message):
        self.asked.set()
        await asyncio.sleep(3600)

    async def stop(self):
        print("stopped", flush=True)

run_daemon(App(), "test", grace_period=3600, on_ready=lambda _: print("ready", flush=True))
"""


def test_system_exit_in_a_task_ends_the_daemon() -> None:
    with spawn_python("-c", APP_EXITS) as daemon:
        assert daemon.read_line() == "ready"
        assert request("test", {}, timeout=PATIENCE)["error"]["type"] == "CancelledError"
        assert daemon.read_line() == "stopped"
        assert daemon.wait() == 7
    assert runtime_files() == []


DRAINS = """
import asyncio
from harness_ipc import run_daemon

ends = asyncio.Event()

async def handle(message):
    yield 1
    await ends.wait()
    yield 2

run_daemon(handle, "test", grace_period=3600, on_ready=lambda _: print("ready", flush=True), on_drain=ends.set)
"""


def test_an_app_ends_its_streams_when_the_daemon_drains() -> None:
    with spawn_python("-c", DRAINS) as daemon:
        assert daemon.read_line() == "ready"
        with connect_daemon("test") as client, client.stream("any", timeout=PATIENCE) as items:
            assert next(items) == 1
            request("test", {"meta": "shutdown"})
            assert list(items) == [2]
        assert daemon.wait() == 0
    assert runtime_files() == []


# Threads.


def test_a_server_may_be_closed_as_soon_as_it_serves() -> None:
    """Even before its threads have started to run."""

    async def main() -> None:
        for _ in range(50):
            server, _ = await start_daemon_server(Waiting(), "test")
            server.close()
            await server.wait_closed()
        async with serving():
            assert await serves()

    run(main)


def test_closing_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        handler = Waiting()
        with ExitStack() as stack:
            async with serving(handler, grace_period=SOON) as server:
                stack.enter_context(await asyncio.to_thread(connect_daemon, "test"))
                in_flight = asyncio.create_task(ask())
                await handler.began.wait()
                with monkeypatch.context() as patch:
                    patch.setattr(threading.Thread, "start", refuse)
                    server.close()
                    await server.wait_closed()
                with pytest.raises(ConnectionLost, match="stopped"):
                    await in_flight

    run(main)


CLOSE_AT_EXIT = """
import asyncio, atexit, sys
from harness_ipc import start_daemon_server

async def echo(message):
    return {"result": message}

async def leave():
    sys.exit(3)

loop = asyncio.new_event_loop()
server, _ = loop.run_until_complete(start_daemon_server(echo, "test"))
atexit.register(lambda: print("closed"))
atexit.register(server.close)
"""


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("loop.close()", 0), ("sys.exit(3)", 3), ("loop.run_until_complete(leave())", 3)]
)
def test_a_server_can_be_closed_while_the_interpreter_shuts_down(end: str, status: int) -> None:
    done = run_python("-c", CLOSE_AT_EXIT + end)
    assert (done.returncode, done.stdout) == (status, "closed\n")
    assert "atexit" not in done.stderr
    with pytest.raises(DaemonNotRunning):
        request("test", {})
    # The interpreter does not wait for daemon threads, so a stale record may be left.
    assert cleanup_endpoint("test")
    assert runtime_files(".json") == []


def test_a_server_whose_loop_has_ended_can_be_closed() -> None:
    """With connected clients, and with some whose disconnect was not noticed."""
    before = threads()

    async def leave() -> tuple[DaemonServer, list[Client]]:
        server, _ = await start_daemon_server(echo, "test")
        clients = [await asyncio.to_thread(connect_daemon, "test") for _ in range(2)]
        for client in clients:
            assert await asyncio.to_thread(client.request, {"n": 1}) == {"result": {"n": 1}}
        return server, clients

    server, clients = asyncio.run(leave())
    clients[0].close()
    server.close()
    clients[1].close()
    wait_until(lambda: threads() == before)
    assert runtime_files() == []


@needs_posix
def test_no_thread_outlives_the_server() -> None:
    def delay_end(frame: Any, event: str, _: object) -> None:
        # The thread has finished its work, but is still running.
        if event == "return" and frame.f_code is threading.Thread.run.__code__:
            time.sleep(0.1)

    async def main() -> None:
        handler = Waiting()

        async def fill(message: dict[str, Any]) -> dict[str, Any]:
            await handler(message)
            return {"result": "x" * 1_000_000}

        # A long reply is sent by a thread, which starts while the server closes.
        async with serving(fill, grace_period=NEVER) as server:
            in_flight = asyncio.create_task(ask())
            await handler.began.wait()
            before = threads()
            server.close()
            await asyncio.to_thread(wait_until, lambda: not os.path.exists(server.record.address))
            threading.setprofile(delay_end)
            try:
                handler.may_go_on.set()
                assert len((await in_flight)["result"]) == 1_000_000
                await server.wait_closed()
                assert threads() <= before
            finally:
                threading.setprofile(None)

    run(main)


def test_a_server_that_gets_no_thread_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def start() -> DaemonServer:
        return (await start_daemon_server(echo, "test"))[0]

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(HarnessIPCError, match="ulimit -u"):
                await start()
        assert runtime_files() == []
        async with await start():
            assert await serves()

    run(main)
