"""Fuzz targets: functions of bytes, which raise if there is a bug. For hypothesis and atheris.

Each needs the environment of the tests: its own runtime and log directory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from multiprocessing import connection as stock
from pathlib import Path
from typing import Any

from harness_ipc import Namespace, _calls, cli, daemon_status, log_path, runtime_path
from harness_ipc._protocol import messages
from harness_ipc._protocol.framing import StreamFraming
from harness_ipc._protocol.handshake import MAX_FRAME, ClientHandshake, Keys, ServerHandshake, receive_verdict
from harness_ipc._registry import files, records
from harness_ipc.errors import (
    DaemonNotRunning,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
)

NAME = "fuzz"
KEY = bytes(range(1, 33))
ADDRESS = "/run/user/1000/harness-ipc/0123456789abcdef.sock"
KEYS = Keys(KEY, ADDRESS)
# Bytes: no target needs more.
MOST = 32 * 1024
# Bytes in a frame.
LIMIT = 1024


def check_text(error: BaseException) -> None:
    """Check that the text of an error is printable, and contains no key."""
    text = str(error)
    assert KEY.hex()[:8] not in text
    assert text.isprintable(), ascii(text)
    assert 0 < len(text) < 600, len(text)


# Frames.


def split_frames(data: bytes, limit: int) -> tuple[list[bytes], type[HarnessIPCError] | None]:
    """Return the frames in a stream and the error that ends it, according to the documented wire format."""
    frames: list[bytes] = []
    stream = io.BytesIO(data)
    while len(head := stream.read(4)) == 4:
        size = int.from_bytes(head, "big", signed=True)
        if size == -1:
            if len(head := stream.read(8)) < 8:
                break
            size = int.from_bytes(head, "big")
        if size > limit:
            return frames, MessageTooLarge
        if size < 0:
            return frames, ProtocolError
        if len(payload := stream.read(size)) < size:
            break
        frames.append(payload)
    return frames, None


def frames(data: bytes) -> None:
    """Receive a stream, at once or in pieces: the first byte says which."""
    how, stream = data[:1], data[1:MOST]
    expected, end = split_frames(stream, LIMIT)
    step = how[0] // 2 + 1 if how and how[0] % 2 else MOST
    framing = StreamFraming()
    received: list[bytes] = []
    failure: type[HarnessIPCError] | None = None
    for start in range(0, len(stream), step):
        framing.feed(stream[start : start + step])
        try:
            while (frame := framing.next_frame(LIMIT)) is not None:
                received.append(frame)
        except HarnessIPCError as error:
            check_text(error)
            failure = type(error)
            break
    assert (received, failure) == (expected, end)


# The challenge.


class Peer:
    """The other end of a handshake: sends the frames of its script, and records frames of both directions."""

    def __init__(self, script: bytes, key: bytes) -> None:
        self._script = io.BytesIO(script)
        self._key = key
        self.received: list[bytes] = []
        self.sent: list[bytes] = []
        self.has_proved_itself = False

    def send_bytes(self, frame: bytes) -> None:
        self.received.append(bytes(frame))

    def recv_bytes(self, limit: int) -> bytes:
        head = self._script.read(2)
        if len(head) < 2:
            raise EOFError
        verb, size = head
        frame = self._script.read(size)
        match verb % 5:
            case 1:
                frame = b"#CHALLENGE#" + frame
            case 2:
                frame = b"#WELCOME#"
            case 3 if self.received:  # reflects
                frame = self.received[-1]
            case 4 if challenges := [frame for frame in self.received if frame.startswith(b"#CHALLENGE#")]:  # has the key
                frame = answer_to(challenges[0], self._key)
                self.has_proved_itself = True
        if len(frame) > limit:
            raise MessageTooLarge("above the limit", size=len(frame), limit=limit)
        self.sent.append(frame)
        return frame


def answer_to(challenge: bytes, key: bytes) -> bytes:
    """Return the answer of `multiprocessing.connection` to a challenge."""
    sent: list[bytes] = []

    class Link:
        def recv_bytes(self, limit: int) -> bytes:
            return b"#WELCOME#" if sent else challenge

        def send_bytes(self, frame: bytes) -> None:
            sent.append(frame)

    stock.answer_challenge(Link(), key)  # type: ignore[arg-type]
    return bytes(sent[0])


def shake_hands(peer: Peer, handshake: ClientHandshake | ServerHandshake) -> None:
    try:
        while not (handshake.may_send if isinstance(handshake, ClientHandshake) else handshake.done):
            for frame in handshake.output:
                peer.send_bytes(frame)
            handshake.output.clear()
            handshake.receive_frame(peer.recv_bytes(MAX_FRAME))
    finally:
        for frame in handshake.output:
            peer.send_bytes(frame)


def challenge(data: bytes) -> None:
    """Do a handshake with a peer: the first byte chooses the role."""
    role, script = data[0] % 3 if data else 0, data[1:MOST]
    peer = Peer(script, KEYS.client if role == 1 else KEYS.daemon)
    try:
        if role == 2:
            receive_verdict(peer.recv_bytes(MAX_FRAME))
        else:
            shake_hands(peer, ClientHandshake(KEYS) if role == 0 else ServerHandshake(KEYS))
    except EOFError:
        pass
    except HarnessIPCError as error:
        check_text(error)
    else:
        assert peer.sent == [b"#WELCOME#"] if role == 2 else peer.has_proved_itself, "let in without the key"
    if role == 0 and not peer.has_proved_itself:
        # A challenge, and the verdict that it failed.
        assert peer.received[1:] in ([], [b"#FAILURE#"]), "a peer without the key got more than a verdict"
    sent = b"\n".join(peer.received)
    assert not any(key in sent for key in (KEY, KEYS.daemon, KEYS.client)), "sent the key"


# Messages.


def message(data: bytes) -> None:
    """Decode a frame, and use it as a request and as a reply."""
    try:
        decoded = messages.decode(data)
    except ProtocolError as error:
        check_text(error)
        return
    assert isinstance(decoded, dict)
    # A number like 1e999 is decoded as infinity, which can't be encoded.
    with contextlib.suppress(ProtocolError):
        assert messages.decode(messages.encode(decoded)) == decoded
    try:
        assert _calls.result_of(decoded, {"KeyError": RemoteError}) == decoded["result"]
    except (RemoteError, ProtocolError):
        assert "error" in decoded or "result" not in decoded


# The record and the notes beside it.


@contextlib.contextmanager
def private_file(ext: str, content: bytes) -> Iterator[None]:
    files.create_private_dir(Namespace().runtime_dir)
    path = runtime_path(NAME, ext)
    files.write_private_file(str(path), content)
    try:
        yield
    finally:
        path.unlink()


def changed(fields: dict[str, Any], data: bytes) -> bytes:
    """Return `fields` updated by the JSON object in `data`, or `data` if it is not an object."""
    try:
        changes = json.loads(data)
        return json.dumps({**fields, **changes}).encode() if isinstance(changes, dict) else data
    except (ValueError, RecursionError):
        return data


def check_status() -> None:
    """Check that the state is a valid one, found without waiting: there is no daemon."""
    status = daemon_status(NAME, timeout=0.0)
    assert status.state in ("absent", "stale", "starting", "unresponsive", "incompatible", "forbidden"), status
    json.dumps(status.to_json(), allow_nan=False)


def record(data: bytes) -> None:
    """Load a record of these bytes, or a valid one updated by this JSON object."""
    data = data[:MOST]
    nowhere = str(runtime_path(NAME, "sock"))
    good = {
        "schema": 2,
        "name": NAME,
        "generation": "0" * 32,
        "family": "AF_PIPE" if sys.platform == "win32" else "AF_UNIX",
        "address": nowhere,
        "authkey": KEY.hex(),
        # A pid that no system has, so that no running process is found.
        "pid": 2**31 - 1,
        "create_time": 1.5,
        "version": "1",
        "python": "3.11.0",
        "started_at": 1.5,
        "argv": ["python"],
        "environment": {"COLOUR": "red"},
        "max_message": 1000,
        "state": "ready",
    }
    with private_file("json", changed(good, data)):
        try:
            found = records.load(NAME, again=True)
        except (DaemonNotRunning, IncompatibleDaemon) as error:
            check_text(error)
            with contextlib.suppress(DaemonNotRunning, IncompatibleDaemon):
                if records.read(NAME).address != nowhere:
                    # The pid may be another process's.
                    return
            check_status()
            return
        assert (found.name, len(found.authkey)) == (NAME, 32)
        assert found.pid > 0
        assert found.max_message > 0
        assert found.authkey.hex() not in f"{found!r}{found}{found.public()!r}"
        assert records.load(NAME) is found
        if found.address == nowhere and found.pid == good["pid"]:
            check_status()


# Names and the command line.


def name(data: bytes) -> None:
    """Use a text as the name of a daemon."""
    text = data.decode("utf-8", "surrogateescape")
    good = re.fullmatch("[A-Za-z0-9_-]{1,64}", text) is not None and "\n" not in text
    try:
        path = runtime_path(text, "json")
        log = log_path(text)
    except InvalidName as error:
        assert not good
        # It quotes the name.
        if len(text) < 64:
            check_text(error)
    else:
        assert good
        assert path == Path(Namespace().runtime_dir) / f"{text}.json"
        assert log.parent == Path(os.environ["HARNESS_IPC_LOG_DIR"])


def command(data: bytes) -> None:
    """Run the command line without a daemon, with a hostile argument or input: the first byte says which."""
    how, word = data[0] % 6 if data else 0, data[1:MOST]
    # Decoded like sys.argv; arguments have no NUL.
    text = word.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    if how > 2 and text == "--":
        # argparse of 3.11 does not accept this as the value of an option.
        return
    arguments = [
        ["call", f"--name={NAME}", "--", text],
        ["call", f"--name={NAME}", text],
        ["call", f"--name={NAME}", "-"],
        ["call", f"--name={NAME}", f"--timeout={text}", "{}"],
        ["call", f"--name={text}", "{}"],
        ["logs", f"--name={NAME}", f"-n{text}"],
    ][how]
    if how == 5:
        log = log_path(NAME)
        log.parent.mkdir(mode=0o700, exist_ok=True)
        log.touch(mode=0o600)
        log.write_bytes(word)
    output, errors = io.StringIO(), io.StringIO()
    saved, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(word))
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = cli.main(arguments)
    except SystemExit as end:
        # From argparse: a usage error, or help.
        if end.code not in (0, 2):
            raise
        assert errors.getvalue().replace("\n", "").isprintable() or not errors.getvalue()
        return
    finally:
        sys.stdin = saved
    if status == 0:
        assert how == 5
        assert output.getvalue().replace("\n", "").replace("\t", "").isprintable() or not output.getvalue()
        assert not errors.getvalue()
    else:
        # A timeout of 0 expires at once.
        assert status in ((2, 3, 4) if how == 3 else (2, 3))
        assert output.getvalue() == ""
        line, end_of_line, rest = errors.getvalue().partition("\n")
        assert (line.startswith("harness-ipc: "), end_of_line, rest) == (True, "\n", "")
        assert line.isprintable()


def frame(payload: bytes) -> bytes:
    """Return a frame as sent over an AF_UNIX socket."""
    return struct.pack("!i", len(payload)) + payload


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "challenge": challenge,
    "message": message,
    "record": record,
    "name": name,
    "command": command,
}
CORPUS = Path(__file__).parent / "corpus"


def corpus(target: str) -> dict[str, bytes]:
    """Return the stored inputs of a target, by file name."""
    folder = CORPUS / target
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}
