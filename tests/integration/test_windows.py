"""Behavior specific to Windows: access to pipes, open files, jobs, redirectors, code pages.

The other integration tests run on Windows too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import (
    AlreadyRunning,
    AuthenticationFailed,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    Namespace,
    RemoteError,
    StartFailed,
    UnsafeDirectory,
    cleanup_endpoint,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    identify,
    log_path,
    request,
    restart_daemon,
    runtime_path,
    spawn_kwargs,
    start_daemon_server,
    stop_daemon,
)
from harness_ipc._protocol.handshake import Keys
from harness_ipc._registry import files, records
from harness_ipc._registry.lifetime import Registration
from harness_ipc._server.server import acquire_name
from harness_ipc._transport import deadline_after, listen
from tests.support.managed import AT_ONCE, assert_none_left, assert_one_daemon, at_once, command, ensure, the_log
from tests.support.marks import needs_windows
from tests.support.processes import PATIENCE, run_python, runtime_files, serves, spawn_daemon, spawn_python, wait_until
from tests.support.wire import FrameConnection, dial_daemon

if sys.platform == "win32":
    import _winapi

    from harness_ipc._windows_security import check_pipe_security, pipe_security_descriptor

    advapi32, kernel32 = ctypes.WinDLL("advapi32"), ctypes.WinDLL("kernel32")
else:
    check_pipe_security: Any = None
    pipe_security_descriptor: Any = None
    _winapi: Any = None
    advapi32: Any = None
    kernel32: Any = None

pytestmark = [needs_windows, pytest.mark.usefixtures("base")]

MIB = 2**20
# Seconds: longer than any test.
NEVER = 3600.0
# Characters inside and outside of the code page of Western Europe, and spaces.
FOREIGN = "Zoë Müller 日本"
REQUEST = b'{"method": "echo", "params": {"text": "more than the sixty-four bytes that it is cut to, each in turn"}}'


def connections() -> int:
    """Return the number of authenticated connections, including that of this request."""
    return int(request("test", {"meta": "ping"}, timeout=PATIENCE)["connections"])


def write(connection: FrameConnection, data: bytes) -> Any:
    """Begin to write one raw message to the pipe, without framing."""
    return _winapi.WriteFile(connection.fileno(), data, overlapped=True)[0]


@contextlib.contextmanager
def dialled() -> Iterator[FrameConnection]:
    with FrameConnection(records.load("test").address) as connection:
        yield connection


# Access to pipes.


class Calls:
    """A record of the calls of `_winapi` that create and open pipes, and of the access lists of created pipes."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.protection: list[str] = []
        self.opened: list[tuple[Any, ...]] = []
        self.make, self.open = _winapi.CreateNamedPipe, _winapi.CreateFile
        patched.setattr(_winapi, "CreateNamedPipe", self.create_named_pipe)
        patched.setattr(_winapi, "CreateFile", self.create_file)

    def create_named_pipe(self, *arguments: Any) -> int:
        handle: int = self.make(*arguments)
        self.made.append(arguments)
        self.protection.append(protection_of(handle))
        return handle

    def create_file(self, *arguments: Any) -> int:
        self.opened.append(arguments)
        handle: int = self.open(*arguments)
        return handle


def protection_of(handle: int) -> str:
    """Return owner and access list of a pipe in the system's "Security Descriptor String Format"."""
    kernel_object, owner, access_list = 6, 1, 4
    descriptor = ctypes.c_void_p()
    asked = [ctypes.c_void_p(handle), kernel_object, owner | access_list, None, None, None, None, ctypes.byref(descriptor)]
    assert advapi32.GetSecurityInfo(*asked) == 0
    return to_text(descriptor, owner | access_list)


def to_text(descriptor: ctypes.c_void_p, parts: int) -> str:
    """Return the parts of a security descriptor as text."""
    text = ctypes.c_wchar_p()
    convert = advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW
    assert convert(descriptor, 1, parts, ctypes.byref(text), None)
    return text.value or ""


def to_descriptor(text: str) -> ctypes.c_void_p:
    """Return the security descriptor that `text` describes."""
    descriptor = ctypes.c_void_p()
    assert advapi32.ConvertStringSecurityDescriptorToSecurityDescriptorW(text, 1, ctypes.byref(descriptor), None), text
    return descriptor


def user_sid() -> str:
    """Return the SID of this process's user."""
    name, size = ctypes.create_unicode_buffer(257), ctypes.c_ulong(257)
    assert advapi32.GetUserNameW(name, ctypes.byref(size))
    sid, sid_size = ctypes.create_string_buffer(256), ctypes.c_ulong(256)
    domain, domain_size, kind = ctypes.create_unicode_buffer(257), ctypes.c_ulong(257), ctypes.c_ulong()
    found = [sid, ctypes.byref(sid_size), domain, ctypes.byref(domain_size), ctypes.byref(kind)]
    assert advapi32.LookupAccountNameW(None, name, *found), name.value
    text = ctypes.c_wchar_p()
    assert advapi32.ConvertSidToStringSidW(sid, ctypes.byref(text))
    return text.value or ""


@contextlib.contextmanager
def pipe_with(text: str | None) -> Iterator[int]:
    """Create a pipe with the security descriptor `text`, or with the default one. Yield its handle."""
    layout = struct.Struct("IPi0P")
    attributes = ctypes.create_string_buffer(layout.pack(layout.size, to_descriptor(text).value if text else 0, 0))
    handle = _winapi.CreateNamedPipe(
        *(rf"\\.\pipe\harness-ipc-test-{os.getpid()}", _winapi.PIPE_ACCESS_DUPLEX, _winapi.PIPE_TYPE_MESSAGE, 1, 0, 0, 0),
        ctypes.addressof(attributes) if text else 0,
    )
    try:
        yield handle
    finally:
        _winapi.CloseHandle(handle)


async def echo(message: dict[str, Any]) -> dict[str, Any]:
    return {"result": message}


def test_every_pipe_instance_is_closed_to_others() -> None:
    reject_remote_clients, identification = 8, 0x100000 | 0x10000  # winbase.h

    def ask(number: int) -> None:
        assert request("test", {"n": number}, timeout=PATIENCE) == {"result": {"n": number}}

    async def main() -> None:
        server, _ = await start_daemon_server(echo, "test")
        async with server:
            for number in range(5):
                await asyncio.to_thread(ask, number)

    with pytest.MonkeyPatch.context() as patched:
        calls = Calls(patched)
        asyncio.run(main())
    # A pipe with the default descriptor has another access list: the check can fail.
    with pipe_with(None) as open_pipe:
        assert protection_of(open_pipe) != calls.protection[0]

    owner_and_list = 1 | 4
    expected = to_text(to_descriptor(f"O:{user_sid()}D:P(A;;GA;;;{user_sid()})"), owner_and_list)
    assert len(calls.made) > 5
    first = _winapi.FILE_FLAG_FIRST_PIPE_INSTANCE
    assert [bool(arguments[1] & first) for arguments in calls.made] == [True] + [False] * (len(calls.made) - 1)
    for arguments, protection in zip(calls.made, calls.protection, strict=True):
        assert arguments[2] & reject_remote_clients
        assert arguments[-1]
        # Nothing is inherited. The only entry gives this user full access: "generic all", GA, becomes FA for files.
        assert re.sub(r";(FA|0x1f01ff);", ";GA;", protection) == expected
    # The server of a pipe may identify its client, but not impersonate it.
    pipes = [arguments for arguments in calls.opened if arguments[0].startswith("\\\\.\\pipe\\")]
    assert len(pipes) > 5
    assert all(arguments[5] & identification == identification for arguments in pipes)


def test_pipe_security_descriptor() -> None:
    all_parts = 1 | 2 | 4 | 0x10  # owner, group, access list, mandatory label
    descriptor = ctypes.create_string_buffer(pipe_security_descriptor())
    text = to_text(ctypes.c_void_p(ctypes.addressof(descriptor)), all_parts)
    sid = user_sid()
    levels = ("ME", "HI")
    expected = [f"O:{sid}G:{sid}D:P(A;;GA;;;{sid})S:(ML;;NWNRNX;;;{level})" for level in levels]
    assert text in [to_text(to_descriptor(wanted), all_parts) for wanted in expected]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("O:{sid}D:P(A;;GA;;;{sid})", None),
        ("O:{sid}D:P(A;;GA;;;OW)", "others"),
        ("O:{sid}D:P(A;;GA;;;{sid})(A;;GR;;;WD)", "others"),
        ("O:{sid}D:P(A;;GA;;;BA)", "others"),
        ("O:{sid}D:P(D;;GA;;;{sid})", "others"),
        ("O:{sid}D:P", "others"),
        ("O:{sid}D:NO_ACCESS_CONTROL", "others"),
        (None, "the pipe"),
        ("O:BAD:P(A;;GA;;;{sid})", "another user"),
    ],
)
def test_a_pipe_that_others_can_open_is_refused(text: str | None, problem: str | None) -> None:
    sid = user_sid()
    with pipe_with(text.format(sid=sid) if text else None) as handle:
        if problem is None:
            check_pipe_security(handle)
        else:
            with pytest.raises(StartFailed, match=problem):
                check_pipe_security(handle)


def test_accepting_threads_wait_on_the_oldest_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client gets the oldest free instance of a pipe, so a thread has to wait on each older one."""
    files.create_private_dir(Namespace().runtime_dir)
    listener = listen.Listener(listen.new_address("", records.new_generation_id()))
    make, second_began = _winapi.CreateNamedPipe, threading.Event()
    calls: list[int] = []

    def create_named_pipe(*arguments: Any) -> int:
        handle: int = make(*arguments)
        calls.append(handle)
        # Delay the first thread after it has created its instance, so the second one could overtake it.
        if len(calls) == 1:
            second_began.wait(0.5)
        else:
            second_began.set()
        return handle

    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        patched.setattr(_winapi, "CreateNamedPipe", create_named_pipe)
        accepts = [pool.submit(listener.accept_port)]
        wait_until(lambda: bool(calls))
        accepts.append(pool.submit(listener.accept_port))
        try:
            for _ in range(2):
                before = sum(accept.done() for accept in accepts)
                stack.enter_context(FrameConnection(listener.address))
                wait_until(lambda: sum(accept.done() for accept in accepts) > before, AT_ONCE)  # noqa: B023
        finally:
            for _ in range(3):
                listener.wake()
        for accept in accepts:
            stack.callback(accept.result(PATIENCE).close)
    listener.close()
    assert_a_daemon_serves()


def test_fifty_clients_connect_and_ask_at_once() -> None:
    together = threading.Barrier(50)

    def ask(number: int) -> None:
        together.wait(PATIENCE)
        with connect_daemon("test", timeout=PATIENCE, request_timeout=PATIENCE) as client:
            together.wait(PATIENCE)
            for n in range(20):
                assert client.call("echo", n=n, number=number) == {"n": n, "number": number}
            if not together.wait(PATIENCE):
                assert connections() == 51
            together.wait(PATIENCE)

    with spawn_daemon("test"), ThreadPoolExecutor(50) as pool:
        for _ in range(2):
            assert list(pool.map(ask, range(50))) == [None] * 50
        wait_until(lambda: connections() == 1)
        assert serves()


def silent(_: int) -> FrameConnection:
    return FrameConnection(records.load("test").address)


def says_garbage(number: int) -> FrameConnection:
    garbage = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 256, struct.pack("!i", 2**31 - 1), b"x" * 60_000, b"#WELCOME#", REQUEST]
    connection = silent(number)
    write(connection, garbage[number % len(garbage)])
    return connection


def has_a_wrong_key(number: int) -> FrameConnection:
    connection = silent(number)
    with pytest.raises(AuthenticationFailed):
        connection.prove(Keys(bytes(32), records.load("test").address))
    return connection


def stops_in_the_proof(number: int) -> FrameConnection:
    connection = silent(number)
    write(connection, b"#CHALLENGE#{sha256}" + os.urandom(32))
    return connection


def test_sixty_peers_without_the_key_keep_no_honest_one_waiting() -> None:
    over = threading.Event()

    def be_honest() -> int:
        served = 0
        while not over.is_set() or not served:
            assert serves()
            served += 1
        return served

    kinds = [silent, says_garbage, has_a_wrong_key, stops_in_the_proof]
    with spawn_daemon("test", handshake_timeout=NEVER), ThreadPoolExecutor(4) as pool:
        honest = [pool.submit(be_honest) for _ in range(4)]
        with contextlib.ExitStack() as stack:
            stack.callback(over.set)
            for number in range(60):
                stack.enter_context(kinds[number % len(kinds)](number // len(kinds)))
            # Silent peers and unfinished handshakes are still connected.
            for _ in range(10):
                assert serves()
        assert all(job.result(PATIENCE) for job in honest)
        wait_until(lambda: connections() == 1)
        assert "Traceback" not in the_log()
        assert serves()


@pytest.mark.parametrize("stage", ["before the proof", "in the proof", "after the proof"])
def test_a_client_killed_at_any_byte_of_a_message_leaves_nothing(stage: str) -> None:
    def connect() -> contextlib.AbstractContextManager[FrameConnection]:
        return dial_daemon("test") if stage == "after the proof" else dialled()

    with spawn_daemon("test", handshake_timeout=NEVER):
        for length in range(64):
            with connect() as connection:
                if stage == "in the proof":
                    connection.send_bytes(b"#CHALLENGE#{sha256}" + os.urandom(32))
                    assert connection.recv_bytes(256)
                write(connection, REQUEST[:length])
        assert serves()
        wait_until(lambda: connections() == 1)
        assert "Traceback" not in the_log()


SENDS = """
from tests.support.wire import dial_daemon
with dial_daemon("test") as connection:
    print("sends", flush=True)
    while True:
        connection.send_bytes(bytes(8 * 2**20))
"""


def test_a_client_killed_while_sending_leaves_nothing() -> None:
    with spawn_daemon("test"):
        for _ in range(3):
            # The client does not read, so in the end client and daemon wait for each other to read.
            with spawn_python("-c", SENDS) as client:
                assert client.read_line() == "sends"
                assert serves()
                client.process.kill()
                client.wait()
            assert serves()
        wait_until(lambda: connections() == 1)
        assert "Traceback" not in the_log()


def test_a_client_that_does_not_read_times_out() -> None:
    with spawn_daemon("test"), dial_daemon("test") as connection:
        # A request whose reply is not read, one that the daemon reads ahead, and one that it does not read.
        connection.send_bytes(b'{"method": "fill", "params": {"size": 1000000}}')
        connection.send_bytes(bytes(8 * MIB))
        connection.connection.deadline = deadline_after(0.2)
        with pytest.raises(DaemonTimeout):
            connection.send_bytes(bytes(8 * MIB))
        assert serves()
        with connect_daemon("test") as client, pytest.raises(DaemonTimeout):
            client.call("sleep", seconds=NEVER, timeout=0.2)
        assert serves()


# Files that another program has open.


def reads(path: Path) -> Callable[[], None]:
    """Open a file as most programs do, and return a function that closes it."""
    return open(path, "rb").close


def holds(path: Path) -> Callable[[], None]:
    """Open a file without sharing it, like virus scanners and backups. Return a function that closes it."""
    handle = _winapi.CreateFile(str(path), _winapi.GENERIC_READ, 0, 0, _winapi.OPEN_EXISTING, 0, 0)
    return lambda: _winapi.CloseHandle(handle)


def reads_without_sharing_removal(path: Path) -> Callable[[], None]:
    share_read_and_write = 3
    handle = _winapi.CreateFile(str(path), _winapi.GENERIC_READ, share_read_and_write, 0, _winapi.OPEN_EXISTING, 0, 0)
    return lambda: _winapi.CloseHandle(handle)


OPENING = pytest.mark.parametrize("opening", [reads, reads_without_sharing_removal, holds])


@contextlib.contextmanager
def close_after_a_failure(name: str, close: Callable[[], None]) -> Iterator[list[OSError]]:
    """Close the open file as soon as `os.<name>` has failed, and yield the failures."""
    real = getattr(os, name)
    failures: list[OSError] = []

    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return real(*arguments, **options)
        except PermissionError as error:
            if not failures:
                close()
            failures.append(error)
            raise

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, name, call)
        yield failures


def publish() -> Registration:
    registration = acquire_name("test")
    registration.publish(app_version=None, max_message=MIB)
    return registration


def assert_a_daemon_serves() -> None:
    ensure()
    assert_one_daemon()


@OPENING
def test_a_record_open_elsewhere_is_replaced(opening: Callable[[Path], Callable[[], None]]) -> None:
    registration = acquire_name("test")
    # The daemon also reads the record, to see whose it is.
    call = "open" if opening is holds else "replace"
    with close_after_a_failure(call, opening(runtime_path("test", "json"))) as failures:
        registration.publish(app_version=None, max_message=MIB)
    assert len(failures) == 1
    assert records.load("test").generation == registration.record.generation
    registration.release()
    assert_a_daemon_serves()


@OPENING
def test_a_record_that_stays_open_elsewhere_is_a_failed_start(opening: Callable[[Path], Callable[[], None]]) -> None:
    registration = acquire_name("test")
    close = opening(runtime_path("test", "json"))
    try:
        with at_once(), pytest.raises(HarnessIPCError, match=r"test\.json can't be") as caught:
            registration.publish(app_version=None, max_message=MIB)
        assert "\n" not in str(caught.value)
    finally:
        close()
    assert records.read("test", again=True).state == "starting"
    assert runtime_files() == ["test.json"]
    registration.release()
    assert_a_daemon_serves()


@OPENING
@pytest.mark.parametrize(("verb", "call"), [("drain", "replace"), ("release", "unlink")])
def test_record_that_is_open_elsewhere_is_withdrawn(
    opening: Callable[[Path], Callable[[], None]], verb: str, call: str
) -> None:
    registration = publish()
    call = "open" if opening is holds else call
    with close_after_a_failure(call, opening(runtime_path("test", "json"))) as failures:
        getattr(registration, verb)()
    assert len(failures) == 1
    with pytest.raises(DaemonNotRunning):
        records.load("test")
    assert runtime_files() == ([] if verb == "release" else ["test.json"])
    registration.release()
    assert runtime_files() == []
    assert_a_daemon_serves()


@OPENING
def test_stale_record_that_is_open_elsewhere_is_removed(
    opening: Callable[[Path], Callable[[], None]],
) -> None:
    pid = ensure().pid
    assert pid is not None
    psutil.Process(pid).kill()
    wait_until(lambda: daemon_status("test").state == "stale")
    call = "open" if opening is holds else "rename"
    with close_after_a_failure(call, opening(runtime_path("test", "json"))):
        assert cleanup_endpoint("test") is True
    assert [file for file in runtime_files() if not file.endswith(".start")] == []
    assert_a_daemon_serves()


def test_a_record_locked_for_a_moment_is_read() -> None:
    registration = publish()
    with close_after_a_failure("open", holds(runtime_path("test", "json"))) as failures:
        assert records.load("test", again=True).generation == registration.record.generation
    assert len(failures) == 1
    registration.release()
    assert_a_daemon_serves()


def test_a_record_that_cannot_be_opened_at_all_is_a_typed_error() -> None:
    registration = publish()
    close = holds(runtime_path("test", "json"))
    try:
        with at_once(), pytest.raises(UnsafeDirectory, match="icacls") as caught:
            records.load("test", again=True)
        assert "\n" not in str(caught.value)
        with at_once():
            assert daemon_status("test").state == "forbidden"
    finally:
        close()
    registration.release()
    assert_a_daemon_serves()


def test_a_lock_that_cannot_be_opened_for_a_moment_is_taken() -> None:
    acquire_name("test").release()
    path = runtime_path("test", "lock")
    with close_after_a_failure("open", holds(path)) as failures:
        acquire_name("test").release()
    assert len(failures) == 1
    close = holds(path)
    try:
        with at_once(), pytest.raises(AlreadyRunning) as caught:
            acquire_name("test")
        assert caught.value.pid is None
    finally:
        close()
    assert_a_daemon_serves()


def test_daemons_start_and_stop_while_the_record_is_read() -> None:
    over = threading.Event()

    def read() -> int:
        seen = set()
        while not over.is_set():
            with contextlib.suppress(OSError, ValueError), open(runtime_path("test", "json"), "rb") as file:
                seen.add(json.loads(file.read())["generation"])
        return len(seen)

    async def live() -> None:
        server, _ = await start_daemon_server(echo, "test")
        async with server:
            assert await asyncio.to_thread(request, "test", {"n": 1}, timeout=PATIENCE) == {"result": {"n": 1}}

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            for _ in range(20):
                asyncio.run(live())
                assert runtime_files() == []
        finally:
            over.set()
        assert reading.result(PATIENCE) > 5
    assert_a_daemon_serves()


# Processes.


def test_a_child_has_a_console_of_its_own_that_nobody_sees() -> None:
    assert spawn_kwargs() == {"creationflags": _winapi.CREATE_NEW_PROCESS_GROUP | _winapi.CREATE_NO_WINDOW}
    assert not spawn_kwargs()["creationflags"] & _winapi.DETACHED_PROCESS


# A request returns the types of the standard streams (GetFileType): 1 is a disk file, 2 a device, 3 a pipe.
STREAMS = """
import ctypes, _winapi
async def streams(self, message):
    if message.get("method") != "streams":
        return await _handle(self, message)
    handles = [_winapi.GetStdHandle(number) for number in (-10, -11, -12)]
    is_console = ctypes.windll.kernel32.GetConsoleMode(ctypes.c_void_p(handles[0]), ctypes.byref(ctypes.c_ulong()))
    os.write(1, b"print" + b"ed")
    return {"result": [[_winapi.GetFileType(handle) for handle in handles], is_console, os.read(0, 100).decode()]}
_handle, App.handle = App.handle, streams
"""


def test_daemon_reads_the_null_device_and_writes_into_the_log() -> None:
    assert ensure(then=STREAMS).detached in ("breakaway", "job")
    assert request("test", {"method": "streams"}, timeout=PATIENCE) == {"result": [[2, 1, 1], 0, ""]}
    assert "printed" in the_log()
    assert_one_daemon()


def test_without_breakaway_a_daemon_starts_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    popen, tried = subprocess.Popen, []

    def refuse(*arguments: Any, creationflags: int, **options: Any) -> Any:
        tried.append(creationflags)
        if creationflags & _winapi.CREATE_BREAKAWAY_FROM_JOB:
            raise PermissionError(13, "Access is denied", None, 5)
        return popen(*arguments, creationflags=creationflags, **options)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        assert ensure().detached == "job"
    base = spawn_kwargs()["creationflags"]
    assert tried == [base | _winapi.CREATE_BREAKAWAY_FROM_JOB, base]
    assert_one_daemon()


# The starter enters a job object whose processes are killed when it is closed ("Job Objects" and
# JOBOBJECT_EXTENDED_LIMIT_INFORMATION in the Win32 documentation). Terminals and agents run programs like this.
STARTER = """
import ctypes, json, struct, sys, threading
from harness_ipc import ensure_daemon
kill_on_job_close, breakaway_ok, extended_limits = 0x2000, 0x800, 9
kernel32 = ctypes.WinDLL("kernel32")
kernel32.CreateJobObjectW.restype = kernel32.GetCurrentProcess.restype = ctypes.c_void_p
job = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
limits = struct.pack("qqI", 0, 0, kill_on_job_close | (breakaway_ok if sys.argv[2] == "may leave" else 0)).ljust(144, b"\\0")
assert kernel32.SetInformationJobObject(job, extended_limits, limits, len(limits))
assert kernel32.AssignProcessToJobObject(job, ctypes.c_void_p(kernel32.GetCurrentProcess()))
print(ensure_daemon("test", json.loads(sys.argv[1])).detached, flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("may_leave", [True, False])
def test_daemon_outlives_its_starter_and_its_job(may_leave: bool) -> None:
    with spawn_python("-c", STARTER, json.dumps(command()), "may leave" if may_leave else "") as starter:
        assert starter.read_line() == ("breakaway" if may_leave else "job")
        assert serves()
        pid = identify("test")
        starter.process.kill()
        starter.wait()
    if not may_leave:
        # Without breakaway, the daemon is killed with the job.
        wait_until(lambda: daemon_status("test").state == "stale")
        ensure()
    assert (identify("test") == pid) is may_leave
    assert_one_daemon()


# Like a venv's python.exe on Windows: it starts the real interpreter with its own handles, and waits for it.
REDIRECTOR = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:], close_fds=False))"


def redirected(**changes: str) -> list[str]:
    return [sys.executable, "-c", REDIRECTOR, *command(**changes)]


def redirector_of(pid: int | None) -> psutil.Process:
    assert pid is not None
    return next(process for process in psutil.Process(pid).parents() if REDIRECTOR in process.cmdline())


def test_a_daemon_behind_a_redirector_is_known_by_its_own_pid() -> None:
    status = ensure_daemon("test", redirected())
    redirector = redirector_of(status.pid)
    assert status.pid == identify("test") == records.load("test").pid == daemon_status("test").pid != redirector.pid
    assert ensure_daemon("test", redirected()).pid == status.pid
    restarted = restart_daemon("test")
    assert restarted.pid == identify("test") != status.pid
    redirector.wait(PATIENCE)
    # A restart runs the whole command line, with the redirector.
    assert redirector_of(restarted.pid).pid != redirector.pid
    assert stop_daemon("test") is True
    assert_none_left()


def test_a_daemon_behind_a_redirector_is_terminated(base: Path) -> None:
    status = ensure_daemon("test", redirected())
    redirector = redirector_of(status.pid)
    with pytest.raises(DaemonTimeout):
        request("test", {"method": "wedge"}, timeout=0.1)
    wait_until((base / "wedged").exists)
    assert status.pid is not None
    process = psutil.Process(status.pid)
    with at_once():
        assert stop_daemon("test", timeout=0.2) is True
    assert not process.is_running()
    redirector.wait(PATIENCE)
    assert_none_left()
    assert ensure_daemon("test", redirected()).pid == identify("test")
    assert serves()


def test_a_failed_start_behind_a_redirector_has_its_reason() -> None:
    with at_once(), pytest.raises(StartFailed, match="no model"):
        ensure_daemon("test", redirected(then="async def fail(self): raise LookupError('no model')\nApp.start = fail"))
    with at_once(), pytest.raises(StartFailed, match="status 7"):
        ensure_daemon("test", [sys.executable, "-c", REDIRECTOR, sys.executable, "-c", "raise SystemExit(7)"])
    assert_none_left()
    assert_a_daemon_serves()


# Text and directories.


@pytest.fixture
def code_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have new processes use the system's code page, which is the default."""
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    output = run_python("-c", "import sys; print(sys.flags.utf8_mode, sys.stdout.encoding)").stdout.split()
    if output[0] != "0" or output[1].lower().replace("-", "") in ("utf8", "cp65001"):
        pytest.skip("the code page of this system is UTF-8")


def run_command(*arguments: str) -> tuple[int, bytes, bytes]:
    """Return the exit status, and the bytes of stdout and stderr."""
    argv = [sys.executable, "-W", "error", "-m", "harness_ipc", *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def test_logs_and_commands_take_any_text_in_any_code_page(code_page: None) -> None:
    with spawn_daemon("test"):
        with connect_daemon("test", request_timeout=PATIENCE) as client, pytest.raises(RemoteError, match=FOREIGN):
            client.call("raise", text=FOREIGN)
        assert f"ValueError: {FOREIGN}" in log_path("test").read_text(encoding="utf-8")
        # Arguments are Unicode, whatever the code page.
        status, out, err = run_command(
            "call", "--name", "test", json.dumps({"method": "echo", "params": {"t": FOREIGN}}, ensure_ascii=False)
        )
        assert (status, json.loads(out), err) == (0, {"result": {"t": FOREIGN}}, b"")
        status, out, err = run_command("call", "--name", "test", json.dumps({"method": "raise", "params": {"text": FOREIGN}}))
        assert (status, json.loads(out)["error"]["message"]) == (1, FOREIGN)
        status, out, err = run_command("logs", "--name", "test")
        assert (status, err) == (0, b"")
        # Characters outside of the code page are escaped.
        assert b"\\u65e5\\u672c" in out
        assert serves()


def test_output_of_a_failing_daemon_is_logged_as_utf8(code_page: None) -> None:
    failing = f"async def fail(self): raise LookupError({FOREIGN!a})\nApp.start = fail"
    with at_once(), pytest.raises(StartFailed, match=FOREIGN) as caught:
        ensure(then=failing)
    assert caught.value.log_tail.rstrip().endswith(f"LookupError: {FOREIGN}")
    assert the_log().count(FOREIGN) >= 2
    assert_a_daemon_serves()


@contextlib.contextmanager
def directories(runtime: Path, log: Path) -> Iterator[None]:
    """Have daemons use these directories, and stop the daemon at the end."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HARNESS_IPC_RUNTIME_DIR", str(runtime))
        patched.setenv("HARNESS_IPC_LOG_DIR", str(log))
        try:
            yield
        finally:
            stop_daemon("test", timeout=1.0)


@pytest.mark.parametrize("encoding", ["code page", "UTF-8"])
def test_directories_may_have_any_name(base: Path, encoding: str, request: pytest.FixtureRequest) -> None:
    if encoding == "code page":
        request.getfixturevalue("code_page")
    home = base / FOREIGN
    with directories(home / "run time", home / "log files"):
        first = ensure()
        assert first.pid == identify("test")
        assert_one_daemon()
        assert runtime_path("test", "json").parent == home / "run time"
        for verb in ("status", "logs", "ping"):
            status, _, err = run_command(verb, "--name", "test")
            assert (status, err) == (0, b""), verb
        assert json.loads(run_command("status", "--name", "test", "--json")[1])["log_path"] == str(
            home / "log files" / "test.log"
        )
        status, _, err = run_command("doctor")
        assert status in (0, 1)
        assert b"Traceback" not in err
        second = restart_daemon("test")
        assert second.pid == identify("test") != first.pid
        assert_one_daemon()
        assert stop_daemon("test") is True
        assert_none_left()
        assert (home / "log files" / "test.log").exists()


def test_a_directory_may_have_a_long_path(base: Path) -> None:
    """The default limit of the system is 260 characters."""
    for length in (200, 400):
        name = "x" * ((length - len(str(base))) // 2 - 1)
        problem = None
        with directories(base / name / name, base / "log"):
            try:
                ensure()
                assert_one_daemon()
            except StartFailed as error:
                problem = str(error)
            assert problem is None or (length > 260 and "\n" not in problem)
    assert_a_daemon_serves()
