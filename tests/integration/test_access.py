"""Another, real user gets no record, no connection and no name. Run as a program, this is that user."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection, deliver_challenge
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from harness_ipc import (
    StartFailed,
    UnsafeDirectory,
    _transport,
    cleanup_endpoint,
    connect_daemon,
    identify,
    log_path,
    ping,
    request,
    run_daemon,
    runtime_dir,
    runtime_path,
)
from harness_ipc._protocol.handshake import role_key
from harness_ipc._registry import records
from tests.support.marks import needs_posix, needs_root
from tests.support.processes import PATIENCE, App, DaemonProcess, serves, spawn_daemon, spawn_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [needs_posix, needs_root]

STRANGER = 12345
NAME = "private"
# Errors of a connection whose peer closed it without reading.
RESET = ("ConnectionResetError", "BrokenPipeError")
Attempt: TypeAlias = "Callable[..., Any]"


def try_raw(address: str) -> str:
    """Send nothing, and return what the daemon sends."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        return sock.recv(100).decode()


def try_with_the_key(address: str, authkey: str) -> None:
    """Act as a client with a known record, but without checking the peer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        with Connection(sock.detach()) as connection:
            deliver_challenge(connection, role_key(bytes.fromhex(authkey), "daemon", address))


# Attempts of the stranger, by name.
ATTEMPTS: dict[str, Callable[..., object]] = {
    "load": lambda: records.load(NAME).address,
    "request": lambda: request(NAME, {"method": "echo"}),
    "connect": lambda: connect_daemon(NAME),
    "ping": lambda: ping(NAME),
    "clean up": lambda: cleanup_endpoint(NAME),
    "serve": lambda: run_daemon(App(), NAME),
    "dial": lambda address: _transport.connect(address, _transport.deadline_after(PATIENCE)).close(),
    "raw": try_raw,
    "with the key": try_with_the_key,
    "open": lambda path: open(path, "rb").close(),
    "create": lambda path: open(path, "xb").close(),
    "unlink": os.unlink,
    "mkdir": lambda path: os.mkdir(path, 0o700),
    "link": os.symlink,
    "who": lambda: [os.getuid(), os.geteuid(), os.getgid(), os.getgroups()],
}


def make_attempt(verb: str, arguments: list[str]) -> Any:
    """Become the stranger for good. Return the result of an attempt, or the names of the error and its base classes."""
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    try:
        return ATTEMPTS[verb](*arguments)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__]


def import_all() -> None:
    """Import before the switch: the stranger may have no access to the interpreter's library."""
    for module in ("asyncio", "shlex", "filelock", "platformdirs", "psutil"):
        importlib.import_module(module)


def main() -> None:
    """Make each attempt that is read, in a child process, and print its result."""
    import_all()
    for line in sys.stdin:
        environment, verb, arguments = json.loads(line)
        if (child := os.fork()) == 0:
            os.environ.update(environment)
            print(json.dumps(make_attempt(verb, arguments)), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def parent() -> Iterator[DaemonProcess]:
    """The parent of the processes of the stranger."""
    with spawn_python("-m", "tests.integration.test_access", stdin=subprocess.PIPE) as process:
        yield process


@pytest.fixture
def attempt(parent: DaemonProcess) -> Attempt:
    def make(verb: str, *arguments: str) -> Any:
        environment = {name: value for name, value in os.environ.items() if name.startswith("HARNESS_IPC_")}
        parent.write_line(json.dumps([environment, verb, arguments]))
        return json.loads(parent.read_line())

    return make


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with spawn_daemon(NAME, handshake_timeout=3600) as process:
        yield process
        assert serves(NAME)
        assert process.process.poll() is None


@contextlib.contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.fixture(params=["closed", "searchable", "open"])
def reach(request: pytest.FixtureRequest, private_directories: Path, daemon: DaemonProcess) -> Iterator[str]:
    """Open the parent directories of the runtime directory to others, but not that directory itself."""
    outer = {"closed": 0o700, "searchable": 0o711, "open": 0o755}[request.param]
    with mode(private_directories, outer):
        yield request.param


def test_the_stranger_is_a_stranger(attempt: Attempt) -> None:
    assert attempt("who") == [STRANGER, STRANGER, STRANGER, []]


@pytest.mark.usefixtures("reach")
def test_another_user_gets_a_typed_error_by_name(attempt: Attempt) -> None:
    for verb in ("load", "request", "connect", "ping", "clean up", "serve"):
        assert attempt(verb)[:3] == ["UnsafeDirectory", "HarnessIPCError", "PermissionError"], verb


@pytest.mark.usefixtures("reach")
def test_another_user_can_neither_read_nor_replace_known_files(attempt: Attempt) -> None:
    for ext in ("json", "lock"):
        path = str(runtime_path(NAME, ext))
        assert attempt("open", path)[0] == "PermissionError"
        assert attempt("unlink", path)[0] == "PermissionError"
        assert attempt("create", path + "x")[0] == "PermissionError"


@pytest.mark.usefixtures("reach")
def test_another_user_cannot_connect_to_a_known_socket(attempt: Attempt) -> None:
    address = records.load(NAME).address
    assert attempt("dial", address)[:3] == ["AuthenticationFailed", "HarnessIPCError", "PermissionError"]
    assert attempt("raw", address)[0] == "PermissionError"


@pytest.fixture
def opened(private_directories: Path, daemon: DaemonProcess) -> Iterator[records.Record]:
    """Open all files to others, and restore the modes at the end."""
    record = records.load(NAME)
    with mode(private_directories, 0o755), mode(runtime_dir(), 0o711), mode(Path(record.address), 0o666):
        yield record


def test_other_uid_is_refused_before_a_byte_is_read(attempt: Attempt, opened: records.Record) -> None:
    # The peer sent nothing and the handshake may take an hour, so its uid is the reason of the refusal.
    assert attempt("raw", opened.address) == ""
    assert attempt("with the key", opened.address, opened.authkey.hex())[0] in ("EOFError", *RESET)
    log = log_path(NAME).read_text(encoding="utf-8")
    # The log is rate-limited: one line for both.
    assert log.count(f"belongs to uid {STRANGER}, not to 0") == 1
    assert opened.authkey.hex() not in log


def test_a_client_refuses_a_daemon_of_another_user(attempt: Attempt, opened: records.Record) -> None:
    """Here the stranger is the client, and this process the other user."""
    assert attempt("dial", opened.address)[:3] == ["AuthenticationFailed", "HarnessIPCError", "PermissionError"]


def test_an_opened_directory_is_refused_by_its_owner(opened: records.Record) -> None:
    for call in (lambda: request(NAME, {}), lambda: connect_daemon(NAME), runtime_dir):
        with pytest.raises(UnsafeDirectory, match="mode 0711") as caught:
            call()
        assert caught.value.remedy == f"chmod 700 {os.environ['HARNESS_IPC_RUNTIME_DIR']}"


@pytest.mark.parametrize("squat", ["mkdir", "link", "create"])
def test_a_runtime_directory_of_another_user_is_refused(attempt: Attempt, private_directories: Path, squat: str) -> None:
    run, elsewhere = private_directories / "run", private_directories / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    with mode(private_directories, 0o1777):
        assert attempt(squat, *([str(elsewhere)] if squat == "link" else []), str(run)) is None
        calls: list[Callable[[], object]] = [
            runtime_dir,
            lambda: records.load(NAME),
            lambda: request(NAME, {}),
            lambda: cleanup_endpoint(NAME),
            lambda: ping(NAME),
            lambda: identify(NAME),
        ]
        for call in calls:
            with pytest.raises(UnsafeDirectory) as caught:
                call()
            assert caught.value.path == str(run)
            assert str(run) in caught.value.remedy
        with pytest.raises((UnsafeDirectory, StartFailed), match=str(run)):
            run_daemon(App(), NAME)
        assert not list(elsewhere.iterdir())
        os.system(caught.value.remedy.removeprefix("sudo "))
        with spawn_daemon(NAME):
            assert ping(NAME)


def test_other_users_socket_directory_is_refused(
    attempt: Attempt, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = private_directories / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / ("deep" * 30)))
    short = temporary / f"harness-ipc-{os.geteuid()}"
    with mode(private_directories, 0o711):
        assert attempt("mkdir", str(short)) is None
        with pytest.raises(UnsafeDirectory) as caught:
            run_daemon(App(), NAME)
        assert caught.value.path == str(short)
        short.rmdir()
        with spawn_daemon(NAME):
            assert ping(NAME)
            assert Path(records.load(NAME).address).parent == short


if __name__ == "__main__":
    main()
