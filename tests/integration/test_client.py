"""The blocking client: each caller, in any thread or process, gets its own reply or a typed error."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, TypeAlias

import psutil
import pytest

from harness_ipc import (
    AuthenticationFailed,
    Busy,
    Client,
    ClientClosed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    InvalidName,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    connect_daemon,
    daemon_status,
    identify,
    ping,
    request,
)
from harness_ipc._protocol.framing import StreamFraming
from harness_ipc._protocol.handshake import Keys, ServerHandshake
from tests.support import scripted
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, DaemonProcess, run_python, serves, spawn_daemon, spawn_python, wait_until
from tests.support.scripted import Generation

# Seconds: longer than any test.
NEVER = 3600.0


def begun(tag: str) -> bool:
    """Whether the request to sleep with this tag runs in the daemon."""
    return ["begin", tag] in request("test", {"method": "log"})["result"]


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with connect_daemon("test") as client:
        yield client


# Requests and replies.


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ({"result": {"a": [1, None, "ü \ud800"]}}, {"a": [1, None, "ü \ud800"]}),
        ({"result": None}, None),
        ({"result": 1, "more": 2}, 1),
        ({"error": {"type": "KeyError", "message": "gone"}}, ("KeyError", "gone")),
        ({"error": {"message": "gone"}}, ("RemoteError", "gone")),
        ({"error": {"code": 1}}, ("RemoteError", "{'code': 1}")),
        ({"error": "gone", "result": 1}, ("RemoteError", "gone")),
        ({"error": None}, ("RemoteError", "None")),
        ({"error": {"type": 1, "message": ["gone"]}}, ("1", "['gone']")),
        ({}, ProtocolError),
        ({"results": 1}, ProtocolError),
    ],
)
def test_a_reply_is_a_result_or_one_error(client: Client, reply: dict[str, Any], outcome: Any) -> None:
    if isinstance(outcome, tuple):
        with pytest.raises(RemoteError) as caught:
            client.call("reply", reply=reply)
        assert (caught.value.type, caught.value.message) == outcome
    elif outcome is ProtocolError:
        with pytest.raises(ProtocolError):
            client.call("reply", reply=reply)
    else:
        assert client.call("reply", reply=reply) == outcome
    # `request` returns the reply unchanged, and the connection is still usable.
    assert client.request({"method": "reply", "params": {"reply": reply}}) == reply


@pytest.mark.parametrize("message", [[1], None, {"a": {1}}, {"a": math.nan}, {(1, 2): 3}, {"a": object()}])
def test_an_invalid_message_is_not_sent(client: Client, message: Any) -> None:
    with pytest.raises(ProtocolError):
        client.request(message)
    assert client.call("echo", n=1) == {"n": 1}


@pytest.mark.parametrize("timeout", [-1.0, math.nan, -math.inf])
def test_an_invalid_timeout_is_refused(client: Client, timeout: float) -> None:
    calls: list[Callable[[], object]] = [
        lambda: connect_daemon("test", timeout=timeout),
        lambda: request("test", {}, timeout=timeout),
        lambda: client.request({}, timeout=timeout),
        lambda: ping("test", timeout),
        lambda: identify("test", timeout),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="timeout"):
            call()


@pytest.mark.parametrize("timeout", [60, 60.0, 30 * 86400.0, 1e10, 1e300, math.inf])
def test_very_long_timeouts_are_accepted(daemon: DaemonProcess, timeout: float) -> None:
    with connect_daemon("test", timeout=timeout, request_timeout=timeout) as client:
        # With a sleep, the client has to wait for the reply.
        assert client.call("sleep", seconds=0.01, tag=1) == 1
        assert client.call("sleep", seconds=0.01, tag=2, timeout=timeout) == 2
    assert ping("test", timeout)


def test_a_timeout_of_zero_sends_nothing(client: Client) -> None:
    with pytest.raises(DaemonTimeout):
        client.call("sleep", seconds=0, tag="never", timeout=0)
    with pytest.raises(DaemonTimeout):
        connect_daemon("test", timeout=0)
    assert not ping("test", 0)
    assert client.call("log") == []


def test_a_late_reply_is_not_taken_for_the_next_ones(client: Client) -> None:
    generation = client.generation
    with pytest.raises(DaemonTimeout):
        client.call("sleep", seconds=0.5, tag="late", timeout=0.1)
    assert client.call("sleep", seconds=1.0, tag="next") == "next"
    assert client.generation == generation


@pytest.mark.parametrize("name", ["", "a b", "../test", "x" * 65, "naïve", "test\n", "test\0"])
def test_a_bad_name_is_refused_by_all(name: str) -> None:
    for call in (connect_daemon, ping, identify, lambda name: request(name, {})):
        with pytest.raises(InvalidName):
            call(name)


# Threads and processes.


def test_threads_that_share_a_client_each_get_their_own_reply(client: Client) -> None:
    def converse(thread: int) -> bool:
        return all(client.call("echo", thread=thread, n=n) == {"thread": thread, "n": n} for n in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(converse, range(8)))


def test_threads_that_share_a_client_are_answered_at_once(client: Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        # None is answered before all have been sent.
        assert sum(pool.map(lambda n: client.call("meet", tag=n, of=16), range(16))) == sum(range(16))
    # The next calls reuse one of the connections.
    before = daemon_status("test").connections
    assert before is not None
    assert before <= 8 + 1
    for n in range(20):
        assert client.call("echo", n=n) == {"n": n}
    assert daemon_status("test").connections == before


FORKING = """
import os, random, threading
from harness_ipc import ClientClosed, connect_daemon

client = connect_daemon("test", request_timeout=60)
over = threading.Event()
# Connect in each thread before the first fork: a child could inherit a socket that is just being created.
connected = threading.Barrier(5)
failures = []

def converse(thread):
    client.call("block", seconds=0.2)
    connected.wait()
    n = 0
    while not over.is_set():
        n += 1
        try:
            assert client.call("echo", thread=thread, n=n) == {"thread": thread, "n": n}
        except BaseException as error:
            failures.append(repr(error))

threads = [threading.Thread(target=converse, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
connected.wait()
statuses = []
for n in range(60):
    threading.Event().wait(random.random() * 0.004)
    child = os.fork()
    if child == 0:
        try:
            # The child has closed the descriptors of its parent's connections before its first request.
            if os.path.isdir("/proc/self/fd"):
                names = []
                for fd in os.listdir("/proc/self/fd"):
                    try:
                        names.append(os.readlink(f"/proc/self/fd/{fd}"))
                    except OSError:
                        pass
                assert not any(name.startswith("socket") for name in names), names
            assert client.call("echo", child=n) == {"child": n}
            client.close()
            try:
                client.call("echo")
            except ClientClosed:
                os._exit(0)
        finally:
            os._exit(1)
    statuses.append(os.waitpid(child, 0)[1])
over.set()
for thread in threads:
    thread.join()
client.close()
print(set(statuses), failures)
"""


@needs_posix
def test_a_forked_child_opens_its_own_connections(daemon: DaemonProcess) -> None:
    process = run_python("-W", "ignore::DeprecationWarning", "-c", FORKING)
    assert (process.returncode, process.stdout, process.stderr) == (0, "{0} []\n", "")


@needs_posix
@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_handler_exception_leaks_no_connection(client: Client) -> None:
    class Interrupt(BaseException):
        pass

    left = moment = 0

    def count_down(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            sys.setprofile(None)
            raise Interrupt

    assert client.call("echo", n=0) == {"n": 0}
    before = psutil.Process().num_fds()
    interrupted = True
    while interrupted:
        # Each round begins with a kept connection.
        assert client.call("echo", n=0) == {"n": 0}
        left = moment = moment + 1
        with contextlib.suppress(Interrupt):
            sys.setprofile(count_down)
            try:
                assert client.call("echo", n=moment) == {"n": moment}
            finally:
                sys.setprofile(None)
        interrupted = left < 0
    assert moment > 50
    assert psutil.Process().num_fds() <= before


INTERRUPTED = """
import os, random, signal, sys, threading
from harness_ipc import HarnessIPCError, connect_daemon

def ask_and_close(*_):
    if sys.argv[1] == "ask":
        assert client.call("echo", n="handler") == {"n": "handler"}
    client.close()
    os._exit(0)

def converse():
    try:
        while True:
            client.call("echo")
    except HarnessIPCError:
        return

for _ in range(40):
    if (child := os.fork()) == 0:
        try:
            signal.signal(signal.SIGALRM, ask_and_close)
            with connect_daemon("test", request_timeout=60) as client:
                for _ in range(3):
                    threading.Thread(target=converse, daemon=True).start()
                signal.setitimer(signal.ITIMER_REAL, 0.001 + random.random() * 0.02)
                while True:
                    client.call("sleep", seconds=random.choice([0, 0, 0.05]), tag="s")
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
print("well")
"""


@needs_posix
@pytest.mark.parametrize("action", ["close", "ask"])
def test_a_signal_handler_may_ask_and_close_at_any_moment(daemon: DaemonProcess, action: str) -> None:
    process = run_python("-W", "ignore::DeprecationWarning", "-c", INTERRUPTED, action)
    assert (process.returncode, process.stdout, process.stderr) == (0, "well\n", "")


CONVERSE = """
import os
from harness_ipc import connect_daemon, request
with connect_daemon("test") as client:
    for n in range(100):
        assert client.call("echo", pid=os.getpid(), n=n) == {"pid": os.getpid(), "n": n}
    assert client.call("peer")[0] in (os.getpid(), None)
for n in range(20):
    assert request("test", {"method": "echo", "params": {"n": n}}, timeout=60) == {"result": {"n": n}}
"""


def test_processes_at_once_each_get_their_own_replies(daemon: DaemonProcess) -> None:
    with ThreadPoolExecutor(8) as pool:
        for process in pool.map(lambda _: run_python("-c", CONVERSE), range(8)):
            assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("waiting", [1, 3])
def test_closing_from_another_thread_ends_requests(client: Client, waiting: int) -> None:
    with ThreadPoolExecutor(waiting) as pool:
        jobs = [pool.submit(client.call, "sleep", seconds=NEVER, tag="blocked", timeout=NEVER) for _ in range(waiting)]
        wait_until(lambda: request("test", {"method": "log"})["result"] == [["begin", "blocked"]] * waiting)
        client.close()
        assert all(isinstance(job.exception(PATIENCE), ClientClosed) for job in jobs)


class BeingEncoded(dict[str, int]):
    """A part of a message that blocks its encoding: the request has begun, but nothing was sent."""

    def __init__(self) -> None:
        super().__init__(n=1)
        self.begun = threading.Event()
        self.may_go_on = threading.Event()

    def items(self) -> Any:
        self.begun.set()
        assert self.may_go_on.wait(PATIENCE)
        return super().items()


def test_closing_ends_a_request_that_just_begins(client: Client) -> None:
    assert client.call("echo") == {}
    part = BeingEncoded()
    with ThreadPoolExecutor(2) as pool:
        job = pool.submit(client.call, "sleep", seconds=NEVER, part=part, timeout=10)
        assert part.begun.wait(PATIENCE)
        closing = pool.submit(client.close)
        wait_until(lambda: "closed" in repr(client))
        part.may_go_on.set()
        error = job.exception(PATIENCE)
        closing.result(PATIENCE)
    assert isinstance(error, ClientClosed)
    assert not error.maybe_executed


def test_a_closed_client_is_closed(client: Client) -> None:
    assert client.call("echo") == {}
    client.close()
    client.close()
    for _ in range(2):
        with pytest.raises(ClientClosed, match="connect again") as caught:
            client.call("echo")
        assert not caught.value.maybe_executed


# Faulty daemons.


Served: TypeAlias = "Connection[Any, Any]"


def scripted_daemon(serve: Callable[[Served, Keys], None]) -> contextlib.AbstractContextManager[Generation]:
    """Run a daemon with scripted connections."""
    return scripted.daemon(lambda served: serve(served.connection, served.daemon.keys))


def prove(connection: Served, keys: Keys) -> None:
    answer_challenge(connection, keys.daemon)
    deliver_challenge(connection, keys.client)


def answer_all(connection: Served, keys: Keys) -> None:
    """Answer each request with 1, until the client disconnects."""
    prove(connection, keys)
    while True:
        connection.recv_bytes()
        connection.send_bytes(b'{"result": 1}')


@pytest.mark.parametrize("reply", [b"", b"{", b"[1]", b"null", b'{"result": NaN}', b'{"result": "\xff"}', b'{"a":' * 100_000])
def test_after_an_invalid_reply_the_next_one_is_read(reply: bytes) -> None:
    def serve(connection: Served, keys: Keys) -> None:
        prove(connection, keys)
        while True:
            message = json.loads(connection.recv_bytes())
            connection.send_bytes(reply if message["method"] == "odd" else b'{"result": 1}')

    with scripted_daemon(serve), connect_daemon("test") as client:
        with pytest.raises(ProtocolError):
            client.call("odd")
        assert client.call("even") == 1


@needs_posix
def test_the_proof_travels_with_the_first_request() -> None:
    framing = StreamFraming()

    def serve(served: scripted.Served) -> None:
        descriptor = served.connection.fileno()
        handshake = ServerHandshake(served.daemon.keys)
        handshake.receive_frame(served.connection.recv_bytes())
        os.write(descriptor, b"".join(framing.encode(handshake.output)))
        framing.feed(os.read(descriptor, 65536))
        frames = [framing.next_frame(1024) for _ in range(3)]
        assert frames[0] == b"#WELCOME#"
        assert json.loads(frames[2] or b"{}")["method"] == "m"
        served.connection.send_bytes(b"#WELCOME#")
        served.send({"result": 1})

    def delay(*_: object) -> None:
        # Separate writes would be read separately.
        time.sleep(0.001)

    with scripted.daemon(serve):
        sys.setprofile(delay)
        try:
            assert request("test", {"method": "m"}, timeout=PATIENCE) == {"result": 1}
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize(("verdict", "error"), [(None, ConnectionLost), (b"#FAILURE#", AuthenticationFailed)])
def test_a_client_that_is_refused_knows_it_when_it_connects(verdict: bytes | None, error: type[Exception]) -> None:
    refused = threading.Event()

    def serve(connection: Served, keys: Keys) -> None:
        if refused.is_set():
            answer_all(connection, keys)
        refused.set()
        answer_challenge(connection, keys.daemon)
        connection.send_bytes(b"#CHALLENGE#{sha256}" + bytes(32))
        connection.recv_bytes()
        if verdict is not None:
            connection.send_bytes(verdict)

    with scripted_daemon(serve):
        with pytest.raises(error):
            connect_daemon("test")
        with connect_daemon("test") as client:
            assert client.call("echo") == 1


def test_eof_instead_of_a_reply_is_an_error() -> None:
    def serve(connection: Served, keys: Keys) -> None:
        prove(connection, keys)
        connection.recv_bytes()

    with scripted_daemon(serve), connect_daemon("test") as client:
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                client.request({})
        with pytest.raises(ConnectionLost):
            request("test", {})
        assert not ping("test")


# Whether the request may have run.


def hang_up_in_request(connection: Served) -> None:
    assert connection.poll(PATIENCE)


def hang_up_after_request(connection: Served) -> None:
    connection.recv_bytes()


def read_nothing(connection: Served) -> None:
    assert given_up.wait(PATIENCE)


def replying(reply: bytes) -> Callable[[Served], None]:
    def serve(connection: Served) -> None:
        connection.recv_bytes()
        connection.send_bytes(reply)
        given_up.wait(PATIENCE)

    return serve


# Set once the client has timed out.
given_up = threading.Event()
SMALL = {"text": "x"}
LARGE = {"text": "x" * 40_000_000}


@pytest.mark.parametrize(
    ("serve", "params", "kind", "maybe_executed"),
    [
        (hang_up_after_request, SMALL, ConnectionLost, True),
        # The daemon did not receive the last byte.
        pytest.param(hang_up_in_request, LARGE, ConnectionLost, False, marks=needs_posix),
        pytest.param(read_nothing, LARGE, DaemonTimeout, False, marks=needs_posix),
        (read_nothing, SMALL, DaemonTimeout, True),
        (replying(b"{"), SMALL, ProtocolError, True),
        (replying(b'{"other": 1}'), SMALL, ProtocolError, True),
        (replying(b'{"result": "' + b"x" * 2000 + b'"}'), SMALL, MessageTooLarge, True),
        (replying(b'{"error": {"type": "KeyError", "message": "text"}}'), SMALL, RemoteError, True),
        (replying(b'{"error": {"type": "Busy", "message": "full", "executed": false}}'), SMALL, Busy, False),
        (read_nothing, {"text": {1}}, ProtocolError, False),
        (read_nothing, {"text": "x" * 2**26}, MessageTooLarge, False),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_an_error_says_whether_the_request_may_have_run(
    serve: Callable[[Served], None], params: dict[str, Any], kind: type[HarnessIPCError], maybe_executed: bool, kept: bool
) -> None:
    def prove_and_serve(connection: Served, keys: Keys) -> None:
        prove(connection, keys)
        if kept:
            connection.recv_bytes()
            connection.send_bytes(b'{"result": 1}')
        serve(connection)

    given_up.clear()
    timeout = 1.0 if kind is DaemonTimeout else PATIENCE
    limit = 1000 if kind is MessageTooLarge and params is SMALL else 2**27
    with scripted_daemon(prove_and_serve):
        client = Client("test", timeout=PATIENCE, request_timeout=timeout, max_message=limit)
        try:
            if kept:
                assert client.call("first", timeout=PATIENCE) == 1
            with pytest.raises(kind) as caught:
                client.call("call", **params)
        finally:
            given_up.set()
            client.close()
    assert caught.value.maybe_executed is maybe_executed


def refuse_proof(connection: Served, keys: Keys) -> None:
    answer_challenge(connection, keys.daemon)
    connection.send_bytes(b"#CHALLENGE#{sha256}" + bytes(32))
    connection.recv_bytes()
    connection.send_bytes(b"#FAILURE#")


def hang_up_before_proof(connection: Served, keys: Keys) -> None:
    connection.recv_bytes()


@pytest.mark.parametrize(("serve", "kind"), [(refuse_proof, AuthenticationFailed), (hang_up_before_proof, ConnectionLost)])
def test_a_request_without_a_proof_has_not_run(serve: Callable[[Served, Keys], None], kind: type[HarnessIPCError]) -> None:
    with scripted_daemon(serve), pytest.raises(kind) as caught:
        request("test", {}, timeout=PATIENCE)
    assert not caught.value.maybe_executed


def test_a_request_that_finds_no_daemon_has_not_run() -> None:
    with pytest.raises(DaemonNotRunning) as caught:
        request("test", {})
    assert not caught.value.maybe_executed


def test_a_request_that_closing_ends_may_have_run(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.call, "sleep", seconds=NEVER, tag="running", timeout=NEVER)
        wait_until(lambda: begun("running"))
        client.close()
        error = running.exception(PATIENCE)
    assert isinstance(error, ClientClosed)
    assert error.maybe_executed


class Reopening:
    """A daemon that disconnects its first client, and delays the proof for the next one until `may_go_on`."""

    def __init__(self) -> None:
        self.hung_up = threading.Event()
        self.reopened = threading.Event()
        self.may_go_on = threading.Event()
        self.requests: list[Any] = []

    def __call__(self, connection: Served, keys: Keys) -> None:
        if not self.hung_up.is_set():
            prove(connection, keys)
            connection.recv_bytes()
            connection.send_bytes(b'{"result": 1}')
            connection.close()
            self.hung_up.set()
            return
        self.reopened.set()
        assert self.may_go_on.wait(PATIENCE)
        with contextlib.suppress(OSError):
            prove(connection, keys)
            while True:
                self.requests.append(json.loads(connection.recv_bytes())["method"])
                if self.requests[-1] != "late":
                    connection.send_bytes(b'{"result": 2}')


def test_closing_while_a_request_connects_again_ends_it() -> None:
    daemon = Reopening()
    with scripted_daemon(daemon), ThreadPoolExecutor(2) as pool, connect_daemon("test", timeout=PATIENCE) as client:
        assert client.call("early") == 1
        assert daemon.hung_up.wait(PATIENCE)
        job = pool.submit(client.call, "late", timeout=10)
        assert daemon.reopened.wait(PATIENCE)
        closing = pool.submit(client.close)
        wait_until(lambda: "closed" in repr(client))
        daemon.may_go_on.set()
        assert isinstance(job.exception(PATIENCE), ClientClosed)
        closing.result(PATIENCE)
    assert daemon.requests == []


WITH_SIGPIPE = """
import signal
from harness_ipc import HarnessIPCError, connect_daemon
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with connect_daemon("test") as client:
    for text in ("x" * 40_000_000, "short"):
        try:
            print(client.call("echo", text=text))
        except HarnessIPCError as error:
            print(type(error).__name__, flush=True)
"""


@needs_posix
def test_a_daemon_that_disconnects_does_not_cause_sigpipe() -> None:
    def serve(connection: Served, keys: Keys) -> None:
        prove(connection, keys)
        # The socket's buffer is full: the client is in the middle of sending.
        assert connection.poll(PATIENCE)

    with scripted_daemon(serve):
        process = run_python("-c", WITH_SIGPIPE)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split() == ["ConnectionLost"] * 2
    with spawn_daemon("test"):
        assert serves()


SURVIVE = """
import os, signal
from harness_ipc import HarnessIPCError, connect_daemon
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with connect_daemon("test") as client:
    print(client.call("echo", n=1), flush=True)
    os.kill(client.pid, signal.SIGKILL)
    kinds = set()
    while "DaemonNotRunning" not in kinds:
        try:
            client.call("echo")
        except HarnessIPCError as error:
            kinds.add(type(error).__name__)
print(sorted(kinds - {"ConnectionLost"}), flush=True)
"""


@needs_posix
def test_a_daemon_that_is_killed_kills_no_client() -> None:
    with spawn_daemon("test") as daemon, spawn_python("-c", SURVIVE) as process:
        assert process.read_line() == "{'n': 1}"
        daemon.wait()
        assert process.read_line() == "['DaemonNotRunning']"
        assert process.wait() == 0
    with spawn_daemon("test"):
        assert serves()


# Resources of a client.


FRESH = """
import hmac, json, socket, sys, threading
before = set(sys.modules)
from harness_ipc import request
assert request("test", {"method": "echo", "params": {"n": 1}}) == {"result": {"n": 1}}
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("harness_ipc")))
"""
LEAN = {"__future__", "_struct", "contextlib", "struct"}


def test_a_client_imports_little_more_than_a_bare_socket_needs(daemon: DaemonProcess) -> None:
    process = run_python("-c", FRESH)
    assert (process.returncode, process.stderr) == (0, "")
    imported = set(process.stdout.split())
    if os.name == "posix":
        assert imported <= LEAN
    else:
        assert not imported & {"asyncio", "concurrent", "filelock", "multiprocessing", "platformdirs", "psutil"}


TIDY = """
import asyncio
from harness_ipc import aconnect_daemon, connect_daemon, ping, request
with connect_daemon("test") as client:
    client.call("echo")
assert ping("test") and not ping("nobody") and request("test", {})
async def main():
    async with await aconnect_daemon("test") as client:
        await client.call("echo")
    client = await aconnect_daemon("test")
    await client.close()
    try:
        await aconnect_daemon("nobody")
    except ConnectionRefusedError:
        print("refused")
asyncio.run(main(), debug=True)
"""


def test_clients_leave_no_resource_to_be_warned_of(daemon: DaemonProcess) -> None:
    process = run_python("-c", TIDY)
    assert (process.returncode, process.stdout, process.stderr) == (0, "refused\n", "")
