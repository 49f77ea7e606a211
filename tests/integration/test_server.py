"""The server in the test's own event loop: serving, closing, and leaving nothing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import (
    AlreadyRunning,
    Client,
    ConnectionLost,
    DaemonNotRunning,
    DaemonServer,
    PeerCredentials,
    cleanup_endpoint,
    connect_daemon,
    current_request,
    ping,
    request,
    runtime_dir,
    start_daemon_server,
)
from harness_ipc._protocol.handshake import Keys
from harness_ipc._registry import records
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, run_python, runtime_files, wait_until
from tests.support.wire import FrameConnection, dial_daemon

pytestmark = pytest.mark.usefixtures("driver")

# Seconds: longer than any test.
NEVER = 3600.0
# Seconds: a period that expires during a test.
SOON = 0.2


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(PATIENCE):
            await main()

    asyncio.run(in_time())


async def echo(message: dict[str, Any]) -> dict[str, Any]:
    return {"result": message}


async def ask(message: dict[str, Any] | None = None, name: str = "test") -> dict[str, Any]:
    return await asyncio.to_thread(request, name, message or {"n": 1}, timeout=PATIENCE)


async def serves(name: str = "test") -> bool:
    return await ask(name=name) == {"result": {"n": 1}}


def threads() -> set[threading.Thread]:
    """Return the running threads, without those of `asyncio.to_thread`."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


@contextlib.asynccontextmanager
async def serving(handler: Any = echo, **options: Any) -> AsyncIterator[DaemonServer]:
    """Serve as the daemon "test". Assert at the end that nothing is left and that a successor can serve."""
    before = threads()
    server, address = await start_daemon_server(handler, "test", **options)
    assert address == server.record.address == records.load("test").address
    async with server:
        assert server.is_serving()
        yield server
    assert not server.is_serving()
    assert threads() == before
    assert runtime_files() == []
    successor, _ = await start_daemon_server(echo, "test")
    async with successor:
        assert await serves()


class Waiting:
    """A handler that signals its start and waits."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        self.began.set()
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return {"result": message}


class Unstoppable(Waiting):
    """A handler that ignores cancellation."""

    async def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        while not self.may_go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await super().__call__(message)
        return {"result": message}


# The handshake.


# In a pipe of Windows, frames are separate messages.
@needs_posix
def test_the_verdict_travels_with_the_first_reply() -> None:
    def begin() -> FrameConnection:
        record = records.load("test")
        connection = FrameConnection(record.address)
        proof = connection.check_daemon(Keys(record.authkey, record.address))
        connection.send_all([*proof, b'{"n": 1}'])
        return connection

    def end(connection: FrameConnection) -> None:
        with connection:
            connection.confirm()
            assert json.loads(connection.recv_bytes()) == {"result": {"n": 1}}

    async def main() -> None:
        handler = Waiting()
        async with serving(handler):
            connection = await asyncio.to_thread(begin)
            await handler.began.wait()
            assert not connection.is_readable()
            handler.may_go_on.set()
            await asyncio.to_thread(end, connection)

    run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_a_refusal_is_in_the_log_before_the_client_sees_it(fails: bool) -> None:
    class Look(logging.Handler):
        connection: FrameConnection

        def emit(self, entry: logging.LogRecord) -> None:
            if "refused the client" in entry.getMessage():
                seen.append(self.connection.is_readable())
                logged.set()
                if fails:
                    raise LookupError("a handler of the app's")

    def be_refused(connection: FrameConnection) -> None:
        with connection:
            connection.send_bytes(b"no challenge")
            assert logged.wait(PATIENCE)
            with pytest.raises(ConnectionLost):
                connection.recv_bytes()

    async def main() -> None:
        async with serving():
            look.connection = await asyncio.to_thread(FrameConnection, records.load("test").address)
            await asyncio.to_thread(be_refused, look.connection)

    seen: list[bool] = []
    logged = threading.Event()
    look = Look(logging.WARNING)
    logging.getLogger("harness_ipc").addHandler(look)
    try:
        run(main)
    finally:
        logging.getLogger("harness_ipc").removeHandler(look)
    assert seen == [False]


# Closing.


def test_start_returns_a_context_manager() -> None:
    async def main() -> None:
        async with serving() as server:
            assert server.record.pid == os.getpid()
            assert await serves()

    run(main)


def test_close_and_wait_closed_are_idempotent() -> None:
    async def main() -> None:
        async with serving() as server:
            waiting = [asyncio.create_task(server.wait_closed()) for _ in range(3)]
            server.close()
            server.close()
            await asyncio.gather(*waiting)
            await server.wait_closed()
            server.close()

    run(main)


def test_cancelling_wait_closed_closes_nothing() -> None:
    async def main() -> None:
        async with serving():
            server, _ = await start_daemon_server(echo, "other")
            async with server:
                waiting = asyncio.create_task(server.wait_closed())
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                assert waiting.cancelled()
                assert server.is_serving()
                assert await serves("other")

    run(main)


@pytest.mark.parametrize("way", ["close", "shutdown", "cancel"])
def test_serve_forever_ends(way: str) -> None:
    async def main() -> None:
        async with serving() as server:
            forever = asyncio.create_task(server.serve_forever())
            assert await serves()
            assert not forever.done()
            if way == "close":
                server.close()
            elif way == "shutdown":
                assert await ask({"meta": "shutdown"}) == {"shutdown": True}
            else:
                forever.cancel()
            await asyncio.wait({forever})
            assert forever.cancelled() == (way == "cancel")
            assert not server.is_serving()
            # Closing is complete, not only begun.
            assert cleanup_endpoint("test")
            assert runtime_files() == []

    run(main)


def test_on_shutdown_replaces_close() -> None:
    async def main() -> None:
        notified = asyncio.Event()
        async with serving(on_shutdown=notified.set) as server:
            assert await ask({"meta": "shutdown"}) == {"shutdown": True}
            await notified.wait()
            assert server.is_serving()
            assert await serves()

    run(main)


@needs_linux
def test_thirty_servers_one_after_the_other_leave_nothing() -> None:
    async def live() -> None:
        async with serving():
            with await asyncio.to_thread(connect_daemon, "test") as kept, await asyncio.to_thread(dial_daemon, "test"):
                assert await asyncio.to_thread(kept.request, {"n": 2}) == {"result": {"n": 2}}

    async def main() -> None:
        await live()  # with lazy imports
        before = os.listdir("/proc/self/fd")
        for _ in range(30):
            await live()
        assert len(os.listdir("/proc/self/fd")) <= len(before)
        assert os.listdir(runtime_dir()) == ["test.lock"]

    run(main)


def test_a_request_in_flight_finishes_and_nobody_else_comes_in() -> None:
    async def main() -> None:
        handler = Waiting()
        async with serving(handler, grace_period=NEVER) as server:
            in_flight = asyncio.create_task(ask())
            await handler.began.wait()
            server.close()
            with pytest.raises(DaemonNotRunning):
                await ask()
            assert not in_flight.done()
            handler.may_go_on.set()
            assert await in_flight == {"result": {"n": 1}}

    run(main)


@pytest.mark.parametrize("kind", [Waiting, Unstoppable])
def test_a_request_longer_than_the_grace_period_is_cancelled(kind: type[Waiting]) -> None:
    async def main() -> None:
        handler = kind()
        async with serving(handler, grace_period=SOON) as server:
            in_flight = asyncio.create_task(ask())
            await handler.began.wait()
            server.close()
            await server.wait_closed()
            with contextlib.suppress(ConnectionLost):
                assert (await in_flight)["error"]["type"] == "DaemonStopping"
            assert handler.cancelled
        handler.may_go_on.set()

    run(main)


def test_requests_that_were_sent_ahead_do_not_prolong_the_end() -> None:
    async def main() -> None:
        handler = Waiting()
        async with serving(handler, grace_period=SOON):
            with await asyncio.to_thread(dial_daemon, "test") as connection:
                for _ in range(100):
                    connection.send_bytes(b"{}")
                await handler.began.wait()

    run(main)


def test_idle_and_silent_clients_do_not_delay_the_end() -> None:
    async def main() -> None:
        async with serving(grace_period=NEVER, handshake_timeout=NEVER) as server:
            with contextlib.ExitStack() as stack:
                kept = [stack.enter_context(await asyncio.to_thread(connect_daemon, "test")) for _ in range(10)]
                silent = [stack.enter_context(FrameConnection(server.record.address)) for _ in range(10)]
                assert await asyncio.to_thread(kept[0].request, {"n": 1}) == {"result": {"n": 1}}
                server.close()
                await server.wait_closed()
                assert all(connection.is_readable() for connection in silent)
                with pytest.raises(DaemonNotRunning):
                    await asyncio.to_thread(kept[0].request, {"n": 1})

    run(main)


def test_an_unread_long_reply_does_not_prevent_closing() -> None:
    async def main() -> None:
        async def fill(message: dict[str, Any]) -> dict[str, Any]:
            replied.set()
            return {"result": "x" * 40_000_000}

        replied = asyncio.Event()
        async with serving(fill, grace_period=SOON):
            with await asyncio.to_thread(dial_daemon, "test") as connection:
                connection.send_bytes(b"{}")
                await replied.wait()
                assert len((await ask())["result"]) == 40_000_000

    run(main)


def test_the_runtime_directory_may_be_gone_at_the_end() -> None:
    async def main() -> None:
        before = threads()
        server, _ = await start_daemon_server(echo, "test", grace_period=NEVER)
        async with server:
            with await asyncio.to_thread(connect_daemon, "test") as kept:
                shutil.rmtree(runtime_dir(), ignore_errors=os.name == "nt")
                assert await asyncio.to_thread(kept.request, {"n": 1}) == {"result": {"n": 1}}
        assert threads() == before
        async with serving():
            assert await serves()

    run(main)


@pytest.mark.parametrize("name", ["test", "other"])
def test_a_name_is_served_once(name: str) -> None:
    async def main() -> None:
        async with serving() as server:
            if name == "test":
                with pytest.raises(AlreadyRunning, match=str(os.getpid())) as caught:
                    await start_daemon_server(echo, name)
                assert caught.value.pid == os.getpid()
            else:
                other, address = await start_daemon_server(Waiting(), name)
                assert address != server.record.address
                async with other:
                    assert await asyncio.to_thread(ping, name)
                assert runtime_files(".json") == ["test.json"]
            assert await serves()

    run(main)


# Requests.


def test_only_a_handler_has_a_current_request() -> None:
    async def main() -> None:
        async def peer(message: dict[str, Any]) -> dict[str, Any]:
            return {"result": current_request().peer, "inner": await asyncio.create_task(inner())}

        async def inner() -> PeerCredentials:
            return current_request().peer

        async with serving(peer):
            uid = os.geteuid() if hasattr(os, "geteuid") else None
            assert await ask() == {"result": [os.getpid(), uid], "inner": [os.getpid(), uid]}
            script = "import os, harness_ipc; print(os.getpid(), harness_ipc.request('test', {})['result'][0])"
            pids = (await asyncio.to_thread(run_python, "-c", script)).stdout.split()
            assert pids[0] == pids[1] != str(os.getpid())
            with pytest.raises(LookupError, match="no current request"):
                current_request()

    run(main)


def test_context_variables_do_not_leak_between_requests() -> None:
    variable = contextvars.ContextVar("variable", default="of nobody")

    async def main() -> None:
        async def exchange(message: dict[str, Any]) -> dict[str, Any]:
            before = variable.get()
            variable.set(message["new"])
            await asyncio.sleep(0)
            return {"before": before, "after": variable.get()}

        variable.set("of the server")
        async with serving(exchange):
            with await asyncio.to_thread(connect_daemon, "test") as kept:
                for new in ("one", "two"):
                    expected = {"before": "of the server", "after": new}
                    assert await asyncio.to_thread(kept.request, {"new": new}) == expected
                    assert await ask({"new": new}) == expected
            assert variable.get() == "of the server"

    run(main)


class Blocker:
    """A handler that blocks its event loop on request."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self._blocked = threading.Event()

    async def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("block"):
            self._blocked.set()
            assert self.release.wait(PATIENCE)
        return {"result": message}

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """Block the loop by a client's request until the end of the block, or until `release` is set."""
        asking = threading.Thread(target=request, args=("test", {"block": True}), kwargs={"timeout": PATIENCE})
        asking.start()
        try:
            assert self._blocked.wait(PATIENCE)
            yield
        finally:
            self.release.set()
            asking.join()


def test_a_blocked_loop_is_unresponsive_not_dead() -> None:
    blocker = Blocker()

    def look() -> None:
        def pong() -> dict[str, Any]:
            return request("test", {"meta": "ping"}, timeout=PATIENCE)

        assert pong()["responsive"] is True
        with blocker.blocking():
            assert ping("test")
            reply = pong()
            assert (reply["pong"], reply["pid"], reply["responsive"]) == (True, os.getpid(), False)
            assert reply["loop_lag"] > 0
        wait_until(lambda: pong()["responsive"] is True)
        assert request("test", {"n": 1}) == {"result": {"n": 1}}

    async def main() -> None:
        async with serving(blocker):
            await asyncio.to_thread(look)

    run(main)


def test_blocked_loop_still_answers_pings() -> None:
    blocker = Blocker()

    def talk() -> None:
        with blocker.blocking(), dial_daemon("test") as connection:
            for message in ({"meta": "ping"}, {"meta": "ping"}, {"n": 1}, {"meta": "ping"}, {"n": 2}):
                connection.send_bytes(json.dumps(message).encode())
            lags = []
            for _ in range(2):
                pong = json.loads(connection.recv_bytes(2**20))
                assert (pong["pong"], pong["responsive"]) == (True, False)
                lags.append(pong["loop_lag"])
            # The lag grows: it is measured from the first unanswered check of the loop.
            assert 0 < lags[0] < lags[1]
            blocker.release.set()
            replies = [json.loads(connection.recv_bytes(2**20)) for _ in range(3)]
            assert [replies[0], replies[2]] == [{"result": {"n": 1}}, {"result": {"n": 2}}]
            assert replies[1]["responsive"] is True

    async def main() -> None:
        async with serving(blocker):
            await asyncio.to_thread(talk)

    run(main)


def test_connections_that_have_ended_leave_nothing_to_collect() -> None:
    def sessions() -> int:
        return sum(type(one).__module__ == "harness_ipc._server.session" for one in gc.get_objects())

    async def main() -> None:
        async with serving() as server:
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    assert await serves()
                await asyncio.to_thread(wait_until, lambda: server.connections == 0 and sessions() == 0)
            finally:
                gc.enable()

    run(main)


# From 3.12 on, an app may use eager tasks.
task_factories = pytest.mark.parametrize("factory", [None, *filter(None, [getattr(asyncio, "eager_task_factory", None)])])


@task_factories
def test_answered_requests_leave_no_task(factory: Any) -> None:
    async def pause(message: dict[str, Any]) -> dict[str, Any]:
        if message["n"] % 2:
            await asyncio.sleep(0)
        return {"result": message}

    def talk() -> None:
        with connect_daemon("test") as client:
            for n in range(10):
                assert client.request({"n": n}) == request("test", {"n": n}) == {"result": {"n": n}}

    async def main() -> None:
        async with serving(pause):
            loop = asyncio.get_running_loop()
            before = asyncio.all_tasks()
            loop.set_task_factory(factory)
            await asyncio.to_thread(talk)
            await asyncio.to_thread(wait_until, lambda: asyncio.all_tasks(loop) <= before)

    run(main)


def answers(connection: FrameConnection, count: int) -> list[int]:
    """Return the numbers in the next `count` replies."""
    return [json.loads(connection.recv_bytes(1000))["result"]["n"] for _ in range(count)]


@task_factories
def test_pipelined_requests_are_answered_in_order(factory: Any) -> None:
    many = sys.getrecursionlimit()
    asked = threading.Event()
    seen: list[int] = []

    async def note(message: dict[str, Any]) -> dict[str, Any]:
        assert asked.wait(PATIENCE)
        seen.append(message["n"])
        return {"result": message}

    def ask(connection: FrameConnection, numbers: Iterable[int]) -> None:
        connection.send_all([json.dumps({"n": n}).encode() for n in numbers])

    async def main() -> None:
        async with serving(note):
            asyncio.get_running_loop().set_task_factory(factory)

            def talk() -> None:
                with dial_daemon("test") as connection, dial_daemon("test") as other:
                    ask(connection, range(many))
                    ask(other, [-1])
                    asked.set()
                    assert answers(other, 1) == [-1]
                    assert answers(connection, many) == list(range(many))

            await asyncio.to_thread(talk)
        assert seen.index(-1) < many

    run(main)


def test_clients_are_admitted_while_the_loop_is_blocked() -> None:
    blocked, release = threading.Event(), threading.Event()
    seen: list[int] = []

    async def block(message: dict[str, Any]) -> dict[str, Any]:
        if "block" in message:
            blocked.set()
            assert release.wait(PATIENCE)
        seen.append(message["n"])
        return {"result": message}

    def talk(server: DaemonServer) -> None:
        with ThreadPoolExecutor(30) as pool:
            try:
                blocker = pool.submit(request, "test", {"n": -1, "block": True}, timeout=PATIENCE)
                assert blocked.wait(PATIENCE)
                asked = [pool.submit(request, "test", {"n": n}, timeout=PATIENCE) for n in range(20)]
                # All clients have finished their handshake; each ping needs one as well.
                wait_until(lambda: server.connections >= 21)
                assert all(ping("test", PATIENCE) for _ in range(5))
                assert seen == []
            finally:
                release.set()
            assert [job.result()["result"]["n"] for job in asked] == list(range(20))
            assert blocker.result()["result"]["n"] == -1
        assert sorted(seen) == list(range(-1, 20))
        wait_until(lambda: not server.connections)
        assert request("test", {"n": 20}, timeout=PATIENCE) == {"result": {"n": 20}}

    async def main() -> None:
        async with serving(block) as server:
            await asyncio.to_thread(talk, server)

    run(main)


async def healthy() -> dict[str, Any]:
    return {"upstream": "answers"}


async def unhealthy() -> dict[str, Any]:
    raise OSError("no upstream")


@pytest.mark.parametrize(
    ("health", "reply"),
    [
        (None, {"health": None}),
        (healthy, {"health": {"upstream": "answers"}}),
        (unhealthy, {"error": {"type": "OSError", "message": "no upstream"}}),
    ],
)
def test_health_is_the_apps_own_answer(health: Any, reply: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(health=health):
            assert await ask({"meta": "health"}) == reply
            assert await serves()

    run(main)


@pytest.mark.parametrize("message", [{"meta": "restart"}, {"meta": ["ping"]}, {"meta": None}, {"meta": {"ping": 1}}, {}])
def test_unknown_meta_requests_go_to_the_handler(message: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving():
            with await asyncio.to_thread(connect_daemon, "test") as kept:
                assert await asyncio.to_thread(kept.request, message) == {"result": message}

    run(main)


@pytest.mark.parametrize(
    ("code", "kind", "logged"),
    [
        ("1 / 0", "ZeroDivisionError", "Traceback"),
        ("[1]", "TypeError", "list"),
        ("None", "TypeError", "NoneType"),
        ("{'result': {1}}", "ProtocolError", "set"),
        ("{'result': float('nan')}", "ProtocolError", "JSON"),
        ("{'result': 'x' * 2000}", "MessageTooLarge", "2013"),
    ],
)
def test_a_failing_handler_is_logged_and_answered(caplog: pytest.LogCaptureFixture, code: str, kind: str, logged: str) -> None:
    async def main() -> None:
        async def misbehave(message: dict[str, Any]) -> Any:
            return eval(message["code"]) if "code" in message else {"result": message}

        async with serving(misbehave, max_message=1000):
            with await asyncio.to_thread(connect_daemon, "test") as kept:
                reply = await asyncio.to_thread(kept.request, {"code": code})
                assert reply["error"]["type"] == kind
                assert await asyncio.to_thread(kept.request, {"n": 1}) == {"result": {"n": 1}}
            assert await serves()

    with caplog.at_level(logging.INFO, "harness_ipc"):
        run(main)
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert logged in caplog.text


def test_one_connection_is_served_in_order_others_concurrently() -> None:
    async def main() -> None:
        handler = Waiting()
        seen: list[int] = []

        async def order(message: dict[str, Any]) -> dict[str, Any]:
            seen.append(message["n"])
            return await handler(message) if message["n"] == 0 else {"result": message}

        async with serving(order, grace_period=NEVER):
            with await asyncio.to_thread(dial_daemon, "test") as connection:
                for n in (0, 10, 20):
                    connection.send_bytes(json.dumps({"n": n}).encode())
                await handler.began.wait()
                assert await serves()
                assert seen == [0, 1]
                handler.may_go_on.set()
                assert await asyncio.to_thread(answers, connection, 3) == [0, 10, 20]
                assert seen == [0, 1, 10, 20]

    run(main)


def test_many_kept_clients_in_threads_get_their_own_replies() -> None:
    async def main() -> None:
        async with serving():
            with contextlib.ExitStack() as stack:
                kept = [stack.enter_context(await asyncio.to_thread(connect_daemon, "test")) for _ in range(40)]

                async def converse(client: Client, number: int) -> None:
                    for n in range(5):
                        assert await asyncio.to_thread(client.request, {"n": [number, n]}) == {"result": {"n": [number, n]}}

                await asyncio.gather(*(converse(client, number) for number, client in enumerate(kept)))
                assert await serves()

    run(main)
