"""Attacks by another user, without the key, on the wire, through files, and by expensive messages with the key.

After each attack, a normal client is served. Run as a program, this acts as another user.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import (
    AuthenticationFailed,
    ConnectionLost,
    HarnessIPCError,
    RemoteError,
    StartFailed,
    UnsafeDirectory,
    cleanup_endpoint,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    list_daemons,
    log_path,
    request,
    runtime_dir,
    runtime_path,
    stop_daemon,
)
from harness_ipc._protocol.handshake import Keys, role_key
from harness_ipc._registry import files, records
from tests.fuzz import targets
from tests.integration import test_access
from tests.integration.test_hostile import HONEST, HONEST_FRAME, attacked_daemon, frame, raw_socket, read_to_eof, serves
from tests.support.commands import run_command
from tests.support.marks import needs_linux, needs_posix, needs_root
from tests.support.processes import PATIENCE, DaemonProcess, run_python, spawn_daemon, spawn_python, wait_until
from tests.support.wire import FrameConnection, dial_daemon

MIB = 1024 * 1024
NAME = "victim"
CHALLENGE, WELCOME, FAILURE = b"#CHALLENGE#", b"#WELCOME#", b"#FAILURE#"


@pytest.fixture
def victim() -> Iterator[DaemonProcess]:
    with attacked_daemon() as daemon:
        yield daemon


def requests_of(name: str = NAME) -> int:
    """Return the number of requests that the daemon has answered."""
    return int(request(name, {"meta": "ping"}, timeout=PATIENCE)["requests"])


def plant(name: str, **changes: Any) -> records.Record:
    """Write the victim's record with `changes` as that of `name`. This requires the victim's uid."""
    fields = {**json.loads(runtime_path(NAME, "json").read_bytes()), "name": name, **changes}
    files.write_private_file(str(runtime_path(name, "json")), json.dumps(fields).encode())
    return records.load(name)


# The wire: relaying and replaying.


class Wire:
    """A socket that records frames, and answers with `answer`, or like the daemon at `forward_to`."""

    def __init__(
        self, address: str, forward_to: str | None = None, answer: Callable[[socket.socket, bytes], None] | None = None
    ) -> None:
        self.address = address
        self.up, self.down = bytearray(), bytearray()
        self._forward_to = forward_to
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._listener.accept()[0] as ours:
            ours.settimeout(PATIENCE)
            if self._forward_to is None:
                while piece := ours.recv(65536):
                    self.up += piece
                    if self._answer is not None:
                        self._answer(ours, piece)
                return
            with socket.socket(socket.AF_UNIX) as theirs:
                theirs.settimeout(PATIENCE)
                theirs.connect(self._forward_to)
                back = threading.Thread(target=self._pump, args=(theirs, ours, self.down))
                back.start()
                self._pump(ours, theirs, self.up)
                back.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                kept += piece
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:
            last.connect(self.address)
        self._thread.join(PATIENCE)
        self._listener.close()
        assert not self._thread.is_alive()


def sent_frames(wire: Wire) -> list[bytes]:
    """Return the frames of a client. Assert that they are complete."""
    frames, _ = targets.split_frames(bytes(wire.up), MIB)
    assert b"".join(map(frame, frames)) == wire.up
    return frames


def proves_nothing(frames: list[bytes]) -> bool:
    """Whether a client sent only its challenge and a failed verdict."""
    return not frames or (len(frames) <= 2 and frames[0].startswith(CHALLENGE) and frames[1:] in ([], [FAILURE]))


def dial_through(address: str, record: records.Record) -> FrameConnection:
    """Connect to `address` like a client that has it in a record."""
    connection = FrameConnection(address)
    try:
        connection.prove(Keys(record.authkey, record.address))
        connection.send_bytes(HONEST_FRAME)
        connection.confirm()
    except BaseException:
        connection.close()
        raise
    return connection


@needs_posix
def test_a_relay_at_another_address_is_not_taken_for_the_daemon(victim: DaemonProcess, private_directories: Path) -> None:
    """The relay has no key, but lets the daemon answer; a record with the right key sends the client to it."""
    with Wire(str(private_directories / "relay"), forward_to=records.load(NAME).address) as wire:
        plant("relayed", address=wire.address)
        served = requests_of()
        with pytest.raises(AuthenticationFailed):
            request("relayed", HONEST, timeout=PATIENCE)
        wait_until(lambda: wire.up.endswith(FAILURE))
        assert proves_nothing(sent_frames(wire))
        assert requests_of() == served


@needs_posix
def test_a_recorded_handshake_cannot_be_replayed(victim: DaemonProcess, private_directories: Path) -> None:
    record = records.load(NAME)
    relay = str(private_directories / "relay")
    # A transparent relay is allowed: the handshake succeeds and is recorded.
    with Wire(relay, forward_to=record.address) as wire, dial_through(relay, record) as connection:
        assert json.loads(connection.recv_bytes(MIB)) == {"result": HONEST["params"]}
    assert HONEST_FRAME in wire.up
    assert b'"result"' in wire.down
    served = requests_of()
    # Replayed to the daemon, whose challenge is different this time.
    with raw_socket(bytes(wire.up)) as again:
        answer = read_to_eof(again)
    assert answer.endswith(frame(FAILURE))
    assert b'"result"' not in answer
    assert requests_of() == served
    # Replayed to a client, whose challenge is different as well.
    down, recorded = bytes(wire.down), str(private_directories / "recorded")
    with Wire(recorded, answer=lambda peer, _: peer.sendall(down)) as daemon:
        with pytest.raises((AuthenticationFailed, ConnectionLost)):
            dial_through(recorded, record)
        wait_until(lambda: len(daemon.up) > 0)
    assert proves_nothing(sent_frames(daemon))
    assert HONEST_FRAME not in daemon.up


def listener_of(kind: str, directory: Path) -> contextlib.AbstractContextManager[Any]:
    address = str(directory / "elsewhere")
    match kind:
        case "an echo":
            return Wire(address, answer=lambda peer, piece: peer.sendall(piece))
        case "a service of another kind":
            return Wire(address, answer=lambda peer, _: peer.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n"))
        case "a liar":
            return Wire(address, answer=lambda peer, _: peer.sendall(frame(WELCOME) * 3))
        case "datagrams":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.bind(address)
            return sock
        case "a directory":
            os.mkdir(address)
        case "a file":
            Path(address).write_text("precious")
    return contextlib.nullcontext()


@needs_posix
@pytest.mark.parametrize(
    "kind", ["an echo", "a service of another kind", "a liar", "datagrams", "a directory", "a file", "nothing"]
)
def test_a_record_that_points_elsewhere_is_a_typed_error(victim: DaemonProcess, kind: str, private_directories: Path) -> None:
    elsewhere = private_directories / "elsewhere"
    with listener_of(kind, private_directories) as peer:
        plant("odd", address=str(elsewhere))
        with pytest.raises(HarnessIPCError) as caught:
            request("odd", HONEST, timeout=PATIENCE)
        if kind in ("an echo", "a service of another kind", "a liar"):
            assert type(caught.value) is AuthenticationFailed
            wait_until(lambda: len(peer.up) > 0)
            assert proves_nothing(sent_frames(peer))
        # The process that the record names is running.
        assert cleanup_endpoint("odd") is False
        assert elsewhere.exists() is (kind != "nothing")
        assert kind != "a file" or elsewhere.read_text() == "precious"


@needs_posix
@pytest.mark.parametrize("key", ["the first's", "the second's"])
def test_a_record_that_points_to_another_daemon_reaches_none(victim: DaemonProcess, key: str) -> None:
    with spawn_daemon("second"):
        second = records.load("second")
        # Address and key of the other daemon would be its valid record: here only one of both is its own.
        changes = {"address": second.address} if key == "the first's" else {"authkey": second.authkey.hex()}
        plant("odd", **changes)
        served = [requests_of(NAME), requests_of("second")]
        with pytest.raises(AuthenticationFailed):
            request("odd", HONEST, timeout=PATIENCE)
        assert daemon_status("odd").state == "forbidden"
        with pytest.raises(AuthenticationFailed):
            stop_daemon("odd")
        assert [requests_of(NAME), requests_of("second")] == served
        assert serves("second")


# Another user.


def listen(address: str) -> int:
    """Listen like a daemon, and return the number of bytes received."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o777)
        listener.listen()
        print("listening", flush=True)
        with listener.accept()[0] as peer:
            return len(read_to_eof(peer))


def each(plans: str) -> list[Any]:
    """Run the attempts in order, and return their results."""
    outcomes: list[Any] = []
    for verb, *arguments in json.loads(plans):
        try:
            outcomes.append(test_access.ATTEMPTS[verb](*arguments))
        except OSError as error:
            outcomes.append([type(error).__name__])
    return outcomes


test_access.ATTEMPTS.update({"listen": listen, "hard link": os.link, "each": each})


@contextlib.contextmanager
def stranger(verb: str, *arguments: str) -> Iterator[DaemonProcess]:
    with spawn_python("-m", "tests.integration.test_attacks", verb, *arguments) as process:
        yield process


def attempt(verb: str, *arguments: str) -> Any:
    with stranger(verb, *arguments) as process:
        return json.loads(process.read_line())


@needs_posix
@needs_root
def test_a_client_tells_another_users_listener_nothing(victim: DaemonProcess, private_directories: Path) -> None:
    address = str(private_directories / "squatted")
    with test_access.mode(private_directories, 0o1777), stranger("listen", address) as squatter:
        assert squatter.read_line() == "listening"
        plant("odd", address=address)
        with pytest.raises(AuthenticationFailed, match=f"belongs to uid {test_access.STRANGER}"):
            request("odd", HONEST, timeout=PATIENCE)
        assert json.loads(squatter.read_line()) == 0


AS_USER = """
import asyncio, os, shlex, sys
from harness_ipc import UnsafeDirectory, aconnect_daemon, runtime_dir, start_daemon_server

async def main():
    async def echo(message):
        return {"result": message["params"]}
    server, _ = await start_daemon_server(echo, "mine")
    async with server, await aconnect_daemon("mine") as client:
        return await client.call("echo", n=1), str(runtime_dir())

# Run once before the switch, so that all is imported: the other user may have no access to the library.
asyncio.run(main())
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
os.environ.pop("HARNESS_IPC_RUNTIME_DIR")
try:
    print(*asyncio.run(main()))
except UnsafeDirectory as error:
    print("refused", error.path, error.remedy)
sys.stdout.flush()
# Skip exit handlers: coverage cannot write its data as that user.
os._exit(0)
"""


@needs_linux
@needs_root
@pytest.mark.parametrize("squat", ["directory", "open directory", "link", "file"])
def test_a_default_directory_of_another_user_is_refused(squat: str, private_directories: Path) -> None:
    """Without a login session the directory is below /tmp, where any user can create it."""
    uid = 2_000_000_000 + os.getpid()
    place = Path(f"/tmp/harness-ipc-runtime-{uid}")
    try:
        match squat:
            case "directory":
                place.mkdir(0o700)
            case "open directory":
                place.mkdir()
                place.chmod(0o777)
            case "link":
                # The link leads to a private directory of the user.
                private_directories.chmod(0o755)
                target = private_directories / "target"
                target.mkdir(0o700)
                os.chown(target, uid, uid)
                place.symlink_to(target)
            case "file":
                place.write_text("")
        os.chown(place, test_access.STRANGER, test_access.STRANGER, follow_symlinks=False)
        done = run_python("-c", AS_USER, str(uid))
        assert done.stdout.startswith(f"refused {place} ") or f"StartFailed: {place} is a file" in done.stderr, done
        if not place.is_file():
            # The remedy requires root.
            os.system(done.stdout.rstrip().removeprefix(f"refused {place} ").removeprefix("sudo "))
        else:
            place.unlink()
        done = run_python("-c", AS_USER, str(uid))
        assert (done.stdout, done.stderr) == (f"{{'n': 1}} {place}\n", "")
    finally:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)


@needs_posix
@needs_root
def test_another_user_can_plant_no_link_and_make_none(victim: DaemonProcess, private_directories: Path) -> None:
    public = private_directories / "public"
    public.mkdir()
    public.chmod(0o1777)
    own = str(public / "own")
    files = [*(runtime_path(NAME, ext) for ext in ("json", "lock", "start", "starting", "draining")), log_path(NAME)]
    there = [path for path in files if path.exists()]
    assert {path.suffix for path in there} == {".json", ".lock", ".log"}
    plans = [
        ["create", own],
        *([verb, own, str(path)] for path in files for verb in ("link", "hard link")),
        *([verb, own, str(path.with_name("next"))] for path in files for verb in ("link", "hard link")),
        *(["hard link", str(path), str(public / path.name)] for path in there),
        *(["open", str(path)] for path in there),
    ]
    with test_access.mode(private_directories, 0o755):
        first, *others = attempt("each", json.dumps(plans))
    assert first is None
    assert [outcome[0] for outcome in others] == ["PermissionError"] * len(others)
    assert [path.name for path in public.iterdir()] == ["own"]


@needs_posix
@pytest.mark.parametrize(
    ("kind", "ext"),
    [
        *(("symbolic", ext) for ext in ("json", "lock", "start", "starting", "draining")),
        # Locks are left out: filelock before 4 opens a hard-linked file of the user as the lock, and empties it.
        *(("hard", ext) for ext in ("json", "starting", "draining")),
    ],
)
def test_a_link_that_is_there_before_the_daemon_harms_nothing(kind: str, ext: str, private_directories: Path) -> None:
    files.create_private_dir(str(private_directories / "run"))
    precious = private_directories / "precious"
    precious.write_text("precious")
    precious.chmod(0o600)
    path = runtime_path(NAME, ext)
    (path.symlink_to if kind == "symbolic" else path.hardlink_to)(precious)
    argv = [sys.executable, "-W", "error", "-m", "tests.support.processes", NAME, "{}"]
    try:
        # The daemon replaces the link, or refuses it with a typed error that names it.
        text = str(path)
        try:
            ensure_daemon(NAME, argv, timeout=PATIENCE)
        except (StartFailed, UnsafeDirectory) as refused:
            text = str(refused)
            path.unlink()
            ensure_daemon(NAME, argv, timeout=PATIENCE)
        assert str(path) in text
        assert precious.read_text() == "precious"
        assert serves(NAME)
    finally:
        stop_daemon(NAME)
    assert precious.read_text() == "precious"


# Weaker digests. On CPython 3.11 the digest is fixed; later versions let the peer choose it.

DIGESTS = ["", "md5", "sha1", "sha256", "sha384", "sha512", "sha3_256", "MD5", "no such"]


def prove(key: bytes, challenge: bytes, digest: str) -> bytes:
    """Return the proof with that digest, or an invalid one for an unknown digest."""
    prefix = b"{%s}" % digest.encode() if digest else b""
    try:
        return prefix + hmac.digest(key, challenge, digest or "md5")
    except ValueError:
        return prefix + bytes(32)


def test_a_peer_without_the_key_gains_nothing_by_another_digest(victim: DaemonProcess) -> None:
    record = records.load(NAME)
    wrong = role_key(bytes(32), "client", record.address)
    for digest in DIGESTS:
        with FrameConnection(record.address) as connection:
            prefix = b"{%s}" % digest.encode() if digest else b""
            connection.send_bytes(CHALLENGE + prefix + os.urandom(20))
            verdicts = []
            # The daemon drops a peer whose digest it does not support.
            with contextlib.suppress(EOFError, OSError):
                # The daemon's proof, which is useless without the key, and its challenge.
                connection.recv_bytes(256)
                challenge = connection.recv_bytes(256)
                assert challenge.startswith(CHALLENGE), digest
                connection.send_bytes(WELCOME)
                connection.send_bytes(prove(wrong, challenge.removeprefix(CHALLENGE), digest))
                verdicts.append(connection.recv_bytes(256))
                connection.send_bytes(HONEST_FRAME)
                verdicts.append(connection.recv_bytes(256))
            assert verdicts in ([], [FAILURE]), digest


def test_md5_requires_the_key_as_well(victim: DaemonProcess) -> None:
    """The same steps succeed with the key, so its lack is what fails above."""
    record = records.load(NAME)
    with FrameConnection(record.address) as connection:
        connection.send_bytes(CHALLENGE + os.urandom(20))
        proof = connection.recv_bytes(256)
        challenge = connection.recv_bytes(256).removeprefix(CHALLENGE)
        connection.send_bytes(WELCOME)
        # A client's proof depends on the role and on the challenge.
        mine = role_key(record.authkey, "client", record.address)
        assert proof != prove(mine, challenge, "")
        connection.send_bytes(prove(mine, challenge, ""))
        assert connection.recv_bytes(256) == WELCOME
        connection.send_bytes(HONEST_FRAME)
        assert json.loads(connection.recv_bytes(256)) == {"result": HONEST["params"]}


@needs_posix
def test_a_client_refuses_a_daemon_with_another_digest(victim: DaemonProcess, private_directories: Path) -> None:
    for number, digest in enumerate(DIGESTS):
        address = str(private_directories / f"forged {number}")
        wrong = role_key(bytes(32), "daemon", address)

        def answer(peer: socket.socket, piece: bytes, digest: str = digest, wrong: bytes = wrong) -> None:
            proof = prove(wrong, piece[4:].removeprefix(CHALLENGE), digest)
            peer.sendall(frame(proof) + frame(CHALLENGE + os.urandom(20)) + frame(WELCOME))

        with Wire(address, answer=answer) as forged:
            plant(f"odd-{number}", address=address)
            with pytest.raises(AuthenticationFailed):
                request(f"odd-{number}", HONEST, timeout=PATIENCE)
        assert proves_nothing(sent_frames(forged)), digest


# Leaks of the key.


def forms(key: bytes) -> Iterator[bytes]:
    """Yield the key in various notations."""
    yield from (key, key.hex().encode(), key.hex().upper().encode(), repr(key)[2:-1].encode(), base64.b64encode(key)[:-2])
    yield from (key.hex(" ").encode(), str(list(key))[1:-1].encode(), str(int.from_bytes(key, "big")).encode())


def shows_key(data: bytes | str, record: records.Record) -> bool:
    """Whether `data` contains the key, a derived key, or a part of one."""
    data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape")
    keys = Keys(record.authkey, record.address)
    return any(
        form in data
        for key in (record.authkey, keys.daemon, keys.client)
        for part in (key, key[:8], key[-8:])
        for form in forms(part)
    )


KEPT = """
import signal, sys
from harness_ipc import connect_daemon
with connect_daemon(sys.argv[1]) as daemon:
    print("ready", daemon.call("echo", n=1), daemon, vars(daemon), flush=True)
    signal.pause()
"""
FAILING = """
import logging, os, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from harness_ipc import *
from harness_ipc import _exchange
from harness_ipc._registry import records
record = records.load(sys.argv[1])
async def handle(message): return message
failures = [
    lambda: connect_daemon(sys.argv[1]).call("raise"),
    lambda: connect_daemon(sys.argv[1]).call("block", seconds=0.2, timeout=0.01),
    lambda: connect_daemon(sys.argv[1], timeout=0.0),
    lambda: connect_daemon("nobody"),
    lambda: run_daemon(handle, sys.argv[1]),
    lambda: request(sys.argv[1], {"a": float("nan")}),
    lambda: record.replace(authkey=record.authkey.hex()[1:]),
    lambda: record.replace(pid="x"),
]
for failure in failures:
    try:
        failure()
    except Exception:
        traceback.print_exc()
    else:
        sys.exit("it did not fail")
_exchange._derive_keys = lambda *_: wrong
wrong = object.__new__(type("Keys", (), {"daemon": bytes(32), "client": bytes(32)}))
request(sys.argv[1], {})
"""


@needs_linux
def test_the_key_shows_nowhere_but_in_the_record() -> None:
    """The key is not in a command line, environment, log, report, error, traceback or other file."""
    cli = ["-m", "harness_ipc"]
    shown = [run_python(*cli, "start", "tests.support.processes:App", "--name", NAME, "--json")]
    try:
        record = records.load(NAME)
        assert shows_key(runtime_path(NAME, "json").read_bytes(), record)
        for command in ("status", "ping", "list", "doctor"):
            options = [] if command in ("list", "doctor") else ["--name", NAME]
            shown += [run_command(command, *options), run_command(command, *options, "--json")]
        for message in ("{}", '{"meta": "health"}', '{"method": "raise"}', "nonsense"):
            shown.append(run_command("call", "--name", NAME, message))
        shown.append(run_python(*cli, "serve", "tests.support.processes:App", "--name", NAME))
        shown.append(failing := run_python("-c", FAILING, NAME))
        assert failing.stderr.count("Traceback (most recent call last)") >= 9
        assert "another key" in failing.stderr
        with spawn_python("-c", KEPT, NAME) as client:
            line = client.read_line()
            assert line.startswith("ready")
            for pid in (record.pid, client.pid):
                for what in ("cmdline", "environ", "comm", "maps"):
                    assert not shows_key(Path(f"/proc/{pid}/{what}").read_bytes(), record), what
        assert not shows_key(line, record)
        for done in shown:
            assert not shows_key(done.stdout + done.stderr, record), done.args
        assert not shows_key(repr([daemon_status(NAME), list_daemons(), record, record.public()]), record)
        assert serves(NAME)
        # Only the record has the key: check all other files.
        files = [path for folder in (runtime_dir(), log_path(NAME).parent) for path in folder.iterdir() if path.is_file()]
        assert {path.name for path in files} >= {f"{NAME}.json", f"{NAME}.lock", f"{NAME}.start", f"{NAME}.log"}
        assert [path.name for path in files if shows_key(path.read_bytes(), record)] == [f"{NAME}.json"]
    finally:
        stop_daemon(NAME)
    shown.append(run_command("logs", "--name", NAME, "-n", "100000"))
    assert "Traceback" in shown[-1].stdout
    assert not shows_key(shown[-1].stdout, record)


# The log.

EVIL = "x\n2026-01-01 00:00:00,000 INFO harness_ipc.daemon: all is well \x1b]0;owned\x07\x1b[2J\r\x9b\u202e\ud800\0"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z_.]+: ")


def log_lines() -> list[str]:
    """Return the lines of the log that look like the start of an entry, after checking for control characters."""
    text = log_path(NAME).read_text(encoding="utf-8")
    assert all(c.isprintable() or c in "\n\t" for c in text), ascii(text)
    return [line for line in text.split("\n") if LOG_LINE.match(line)]


def test_text_of_unauthenticated_peers_is_not_logged(victim: DaemonProcess) -> None:
    evil = EVIL.encode("utf-8", "surrogatepass")
    for hostile in (evil, CHALLENGE + evil, CHALLENGE + b"{md5}" + evil, b"{%s}" % evil):
        with FrameConnection(records.load(NAME).address) as connection, contextlib.suppress(HarnessIPCError):
            for _ in range(3):
                connection.send_bytes(hostile)
            while connection.recv_bytes(MIB):
                pass
    with dial_daemon(NAME) as connection:
        for hostile in (evil, b'{"a": "%s"}' % evil, b'{"%s' % evil, b"[]"):
            connection.send_bytes(hostile)
            error = json.loads(connection.recv_bytes(MIB))["error"]
            assert error["message"].isprintable(), error
    with connect_daemon(NAME) as client:
        for message in ({EVIL: EVIL}, {"meta": EVIL}, {"method": EVIL, "params": {EVIL: EVIL}}):
            assert client.request(message, timeout=PATIENCE) == {"raw": message}
        with pytest.raises(RemoteError):
            client.call("return", what="set")
    assert not [line for line in log_lines() if "all is well" in line]


def test_clients_cannot_forge_log_lines() -> None:
    """The text of an exception often contains received text."""
    with spawn_daemon(NAME):
        with connect_daemon(NAME) as client:
            with pytest.raises(RemoteError) as caught:
                client.call("raise", text=EVIL)
            # The client gets the text unescaped.
            assert caught.value.message == EVIL
        assert serves(NAME)
        assert "all is well" in log_path(NAME).read_text(encoding="utf-8")
        assert not [line for line in log_lines() if line.startswith("2026-01-01")]


def test_control_characters_of_a_daemon_are_escaped(private_directories: Path) -> None:
    (private_directories / "evil.py").write_text(f"raise ValueError({EVIL!a})\n", encoding="ascii")
    start = [sys.executable, "-m", "harness_ipc", "start", "evil:app", "--name", "evil"]
    failed = subprocess.run(start, cwd=private_directories, capture_output=True, timeout=PATIENCE, check=False)
    with spawn_daemon(NAME):
        called = run_python(
            "-m", "harness_ipc", "call", "--name", NAME, json.dumps({"method": "raise", "params": {"text": EVIL}})
        )
        assert json.loads(called.stdout)["error"] == {"type": "ValueError", "message": EVIL}
        failing = run_python("-m", "harness_ipc", "call", "--name", NAME, "raise", f"text:={json.dumps(EVIL)}")
        assert "all is well" in failing.stderr
        logs = run_python("-m", "harness_ipc", "logs", "--name", NAME)
        assert serves(NAME)
    assert (failed.returncode, called.returncode, logs.returncode) == (6, 1, 0)
    shown = failed.stdout + failed.stderr
    assert b"all is well" in shown
    assert "all is well" in logs.stdout
    for text in (shown.decode(), called.stdout, called.stderr, failing.stdout, failing.stderr, logs.stdout, logs.stderr):
        assert all(c.isprintable() or c in "\r\n\t" for c in text), ascii(text)
    assert "\r" not in shown.decode().replace(os.linesep, "")


# Arguments cannot contain a NUL or a lone surrogate.
EVIL_WORD = EVIL.replace("\0", "").replace("\ud800", "")


@pytest.mark.parametrize("words", [["ping", f"--{EVIL_WORD}"], ["ping", EVIL_WORD], ["call", "count", EVIL_WORD]])
def test_control_characters_in_arguments_are_escaped(words: list[str]) -> None:
    refused = run_python("-m", "harness_ipc", *words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "all is well" in refused.stderr
    assert all(c.isprintable() or c == "\n" for c in refused.stderr), ascii(refused.stderr)
    (line,) = [line for line in refused.stderr.splitlines() if "all is well" in line]
    assert line.startswith("harness-ipc")


def test_control_characters_of_a_foreground_daemon_are_escaped(private_directories: Path) -> None:
    """The log goes to the terminal as well. It contains the texts of exceptions."""
    source = f"async def handle(message): raise ValueError({EVIL!a})\n"
    (private_directories / "evil.py").write_text(source, encoding="ascii")
    serve = [sys.executable, "-m", "harness_ipc", "serve", "evil:handle", "--name", NAME, "--json"]
    with subprocess.Popen(serve, cwd=private_directories, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        assert request(NAME, {"any": 1})["error"]["message"] == EVIL
        request(NAME, {"meta": "shutdown"})
        shown = daemon.communicate(timeout=PATIENCE)[1].decode()
    assert "all is well" in shown
    assert all(c.isprintable() or c in "\n\t" for c in shown.replace(os.linesep, "\n")), ascii(shown)


# Small but expensive messages.

# The expected key of the reply ("error", "result", or "raw" for a request that the app does not parse), and the message.
Bomb = tuple[str, Callable[[], bytes]]
NESTED: list[Bomb] = [
    ("error", lambda: b'{"a":' * MIB),
    ("error", lambda: b'{"a":' + b"[" * 3 * MIB + b"]" * 3 * MIB + b"}"),
    ("raw", lambda: b'{"a":' * 300 + b"1" + b"}" * 300),
]
NUMBERS: list[Bomb] = [
    ("error", lambda: b'{"a":' + b"9" * 10_000_000 + b"}"),
    ("raw", lambda: b'{"a":1.' + b"9" * 10_000_000 + b"}"),
    # It is parsed as infinity, which cannot be sent back.
    ("error", lambda: b'{"a":1e' + b"9" * 1_000_000 + b"}"),
    ("raw", lambda: b'{"a":[' + b",".join([b"9" * 4000] * 500) + b"]}"),
]
MANY: list[Bomb] = [
    ("result", lambda: b'{"method":"log",' + b",".join(b'"%d":0' % number for number in range(1_000_000)) + b"}"),
    ("result", lambda: b'{"method":"log",' + b",".join([b'"a":0'] * 1_000_000) + b"}"),
    ("result", lambda: b'{"method":"log","a":[' + b",".join([b"[]"] * 1_000_000) + b"]}"),
    ("raw", lambda: b'{"a":"' + rb"\ud800" * 500_000 + b'"}'),
]


@pytest.mark.parametrize("bombs", [NESTED, NUMBERS, MANY], ids=["nested", "numbers", "many"])
def test_expensive_message_does_not_block_others(victim: DaemonProcess, bombs: list[Bomb]) -> None:
    for kind, bomb in bombs:
        data = bomb()
        with measured_replies(), dial_daemon(NAME) as connection:
            connection.send_bytes(data)
            reply = json.loads(connection.recv_bytes(64 * MIB))
            # The connection is usable in any case.
            connection.send_bytes(HONEST_FRAME)
            assert json.loads(connection.recv_bytes(MIB)) == {"result": HONEST["params"]}
        assert list(reply) == [kind], data[:20]
        if kind == "error":
            assert reply["error"]["type"] == "ProtocolError"
            assert len(reply["error"]["message"]) < 500


@contextlib.contextmanager
def measured_replies() -> Iterator[None]:
    """Send requests on another connection meanwhile, and print the longest time of a reply."""
    over = threading.Event()

    def ask() -> float:
        longest = 0.0
        with connect_daemon(NAME, request_timeout=PATIENCE) as client:
            while True:
                begun = time.monotonic()
                assert client.call("echo", n=1) == {"n": 1}
                longest = max(longest, time.monotonic() - begun)
                if over.is_set():
                    return longest

    with ThreadPoolExecutor(1) as pool:
        honest = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        print(f"the longest request of somebody else took {honest.result(PATIENCE):.3f} s")


# The corpus of the fuzzers, sent to a real daemon; and descriptors sent with a message.


def duplicate(connection: FrameConnection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


@needs_posix
def test_the_corpus_does_not_harm_a_daemon(victim: DaemonProcess) -> None:
    for stream in targets.corpus("frames").values():
        with raw_socket(stream[1:]) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert WELCOME not in read_to_eof(sock)
        with dial_daemon(NAME) as connection, duplicate(connection) as sock:
            sock.sendall(stream[1:])
    for script in targets.corpus("challenge").values():
        peer = targets.Peer(script[1:], bytes(32))
        with contextlib.suppress(EOFError, OSError, HarnessIPCError, AuthenticationError), raw_socket() as sock:
            while True:
                sock.sendall(frame(peer.recv_bytes(256)))
    with dial_daemon(NAME) as connection:
        for data in targets.corpus("message").values():
            connection.send_bytes(data)
            assert isinstance(json.loads(connection.recv_bytes(MIB)), dict)


@needs_linux
def test_descriptors_that_come_with_a_message_are_not_kept(victim: DaemonProcess) -> None:
    process = psutil.Process(victim.pid)
    before = process.num_fds()
    with open(os.devnull, "rb") as null, raw_socket() as silent, dial_daemon(NAME) as connection, duplicate(connection) as sock:
        socket.send_fds(silent, [frame(CHALLENGE)[:-1]], [null.fileno()] * 100)
        for _ in range(10):
            socket.send_fds(sock, [frame(HONEST_FRAME)], [null.fileno()] * 100)
            assert json.loads(connection.recv_bytes(MIB)) == {"result": HONEST["params"]}
        # Allow for the connections themselves and for files that are open briefly.
        assert process.num_fds() < before + 100
    wait_until(lambda: process.num_fds() <= before)


if __name__ == "__main__":
    test_access.import_all()
    print(json.dumps(test_access.make_attempt(sys.argv[1], sys.argv[2:])), flush=True)
