"""CDP over FIFOs: bytes and messages, transports with a simulated browser, and calls over any transport."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from harness_ipc.browser.connection import MAX_SENT, Connection, ConnectionFailed, TransportClosed
from harness_ipc.browser.errors import BrowserLost, CDPError
from harness_ipc.browser.pipe import FrameDecoder
from tests.support.marks import needs_linux, needs_posix, needs_root
from tests.support.processes import PATIENCE

if sys.platform != "win32":
    from harness_ipc.browser.pipe import PipeTransport, create_fifos, open_pipe

STRANGER = 12345
# Bytes: more than a pipe holds.
LARGE = 3 * 1024 * 1024


# Bytes.


@pytest.mark.parametrize(
    ("chunks", "frames"),
    [
        ([], []),
        ([b"{}\0"], [b"{}"]),
        ([b"{}"], []),
        ([b"{", b"}\0"], [b"{}"]),
        ([b"{}", b"\0"], [b"{}"]),
        ([b"1\x002\x003"], [b"1", b"2"]),
        ([b"1\x002\x003", b"4\0"], [b"1", b"2", b"34"]),
        ([b"\0"], [b""]),
        ([b"\0\0"], [b"", b""]),
        ([b"1\0", b"", b"\x002\0"], [b"1", b"", b"2"]),
        ([b"\xc3", b"\xa4\0"], [b"\xc3\xa4"]),
        ([bytes([byte]) for byte in b"12\x0034\0"], [b"12", b"34"]),
    ],
)
def test_nul_ends_a_message(chunks: list[bytes], frames: list[bytes]) -> None:
    decoder = FrameDecoder(4)
    assert [bytes(frame) for chunk in chunks for frame in decoder.feed(chunk)] == frames


@pytest.mark.parametrize("chunks", [[b"12345"], [b"123", b"45"], [b"12345\0"], [b"1\x0012345"], [b"1234\x0012", b"345\0"]])
def test_a_message_beyond_the_limit_is_refused_before_its_end(chunks: list[bytes]) -> None:
    decoder = FrameDecoder(4)
    *first, last = chunks
    for chunk in first:
        decoder.feed(chunk)
    with pytest.raises(ValueError, match="more than 4 bytes"):
        decoder.feed(last)


# Transports.


class Peer:
    """The browser's side of a transport: its descriptors, which are blocking."""

    def __init__(self, transport: PipeTransport, reader: int, writer: int) -> None:
        self.transport = transport
        self.reader = reader
        self.writer = writer
        self._decoder = FrameDecoder(10 * LARGE)
        self._frames: list[bytearray] = []

    def receive(self) -> str:
        while not self._frames:
            self._frames += self._decoder.feed(os.read(self.reader, 4096))
        return self._frames.pop(0).decode()

    def send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.writer, data) :]

    def close(self) -> None:
        for descriptor in (self.reader, self.writer):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.asynccontextmanager
async def connected(base: Path, pid: int = 0) -> AsyncIterator[Peer]:
    """Yield a simulated browser. Its process is `pid`; 0 means this one."""
    places = str(base / "in"), str(base / "out")
    with create_fifos(*places) as (reader, writer):
        transport = open_pipe(*places, pid or os.getpid())
        peer = Peer(transport, os.dup(reader), os.dup(writer))
    try:
        yield peer
    finally:
        peer.close()
        await transport.close()


def run(test: Callable[[Peer], Awaitable[None]], base: Path, pid: int = 0) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE), connected(base, pid) as peer:
            await test(peer)

    asyncio.run(main())


@needs_posix
def test_messages_of_any_size_go_both_ways_in_order(private_directories: Path) -> None:
    texts = ["{}", "", "ä" * 10, "x" * LARGE, "y" * 65536, "z"]

    async def test(peer: Peer) -> None:
        sends = [asyncio.create_task(peer.transport.send(text)) for text in texts]
        assert [await asyncio.to_thread(peer.receive) for _ in texts] == texts
        await asyncio.gather(*sends)
        answer = asyncio.create_task(asyncio.to_thread(peer.send, "".join(f"{text}\0" for text in texts).encode()))
        assert [await peer.transport.receive() for _ in texts] == texts
        await answer

    run(test, private_directories)


@needs_posix
def test_a_sender_waits_while_the_browser_does_not_read(private_directories: Path) -> None:
    async def test(peer: Peer) -> None:
        first = asyncio.create_task(peer.transport.send("x" * LARGE))
        second = asyncio.create_task(peer.transport.send("second"))
        done, _ = await asyncio.wait({first, second}, timeout=0.1)
        assert done == set()
        # A message that was not begun is dropped, one that was is sent completely.
        first.cancel()
        second.cancel()
        await asyncio.wait({first, second})
        third = asyncio.create_task(peer.transport.send("third"))
        assert await asyncio.to_thread(peer.receive) == "x" * LARGE
        assert await asyncio.to_thread(peer.receive) == "third"
        await third

    run(test, private_directories)


@needs_posix
def test_data_before_the_end_of_the_browser_is_received(private_directories: Path) -> None:
    async def test(peer: Peer) -> None:
        sending = asyncio.create_task(peer.transport.send("x" * LARGE))
        peer.send(b"1\x002\x00and a half")
        peer.close()
        assert [await peer.transport.receive(), await peer.transport.receive()] == ["1", "2"]
        with pytest.raises(TransportClosed, match="closed its end"):
            await peer.transport.receive()
        with contextlib.suppress(TransportClosed):
            await sending
        with pytest.raises(TransportClosed, match="closed its end"):
            await peer.transport.send("more")

    run(test, private_directories)


@needs_linux
def test_the_end_of_the_process_is_noticed_despite_an_open_pipe(private_directories: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def test(peer: Peer) -> None:
        peer.send(b"last\0")
        receiving = asyncio.gather(peer.transport.receive(), peer.transport.receive(), return_exceptions=True)
        process.kill()
        first, second = await receiving
        assert first == "last"
        assert isinstance(second, TransportClosed)
        assert str(second) == "its process ended"

    try:
        run(test, private_directories, process.pid)
    finally:
        process.kill()
        process.communicate()


@needs_posix
def test_a_browser_that_reads_no_longer_is_lost(private_directories: Path) -> None:
    places = str(private_directories / "in"), str(private_directories / "out")

    async def main() -> None:
        with create_fifos(*places) as (_, writer):
            transport = open_pipe(*places, os.getpid())
            kept = os.dup(writer)
        try:
            await transport.send("x")
            with pytest.raises(TransportClosed, match="can't be written: Broken pipe"):
                await transport.receive()
        finally:
            os.close(kept)
            await transport.close()

    asyncio.run(main())


@needs_posix
def test_a_message_that_the_browser_can_not_take_is_not_sent(private_directories: Path) -> None:
    async def test(peer: Peer) -> None:
        with pytest.raises(CDPError, match="too large"):
            await peer.transport.send("x" * MAX_SENT)
        await peer.transport.send("small")
        assert await asyncio.to_thread(peer.receive) == "small"

    run(test, private_directories)


@needs_posix
def test_a_message_beyond_the_limit_is_the_end(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness_ipc.browser.pipe.MAX_MESSAGE", 1000)

    async def test(peer: Peer) -> None:
        peer.send(b"1\0")
        assert await peer.transport.receive() == "1"
        peer.send(b"x" * 1001)
        with pytest.raises(TransportClosed, match="more than 1000 bytes"):
            await peer.transport.receive()

    run(test, private_directories)


@needs_posix
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_fifos_are_private_whatever_the_umask(umask: int, private_directories: Path) -> None:
    places = [private_directories / "in", private_directories / "out"]
    previous = os.umask(umask)
    try:
        with create_fifos(*map(str, places)) as descriptors:
            assert [stat.S_IMODE(place.lstat().st_mode) for place in places] == [0o600, 0o600]
            assert [os.get_blocking(descriptor) for descriptor in descriptors] == [True, True]
            assert [os.get_inheritable(descriptor) for descriptor in descriptors] == [False, False]
    finally:
        os.umask(previous)


@needs_posix
@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "FIFO", "socket's name"])
def test_planted_files_are_replaced_by_fifos(kind: str, private_directories: Path) -> None:
    victim, place = private_directories / "victim", private_directories / "in"
    victim.write_text("precious")
    match kind:
        case "symbolic link":
            place.symlink_to(victim)
        case "hard link":
            os.link(victim, place)
        case "FIFO":
            os.mkfifo(place, 0o666)
        case _:
            place.write_text("")
    with create_fifos(str(place), str(private_directories / "out")):
        assert stat.S_ISFIFO(place.lstat().st_mode)
    assert victim.read_text() == "precious"


@needs_posix
@pytest.mark.parametrize(
    "kind", ["nothing", "no reader", "file", "link", "readable", pytest.param("foreign", marks=needs_root)]
)
@pytest.mark.parametrize("direction", ["in", "out"])
def test_only_a_fifo_of_ours_with_a_browser_is_opened(kind: str, direction: str, private_directories: Path) -> None:
    places = {name: private_directories / name for name in ("in", "out")}
    place = places[direction]

    async def main() -> None:
        open_pipe(str(places["in"]), str(places["out"]), os.getpid())

    with create_fifos(str(places["in"]), str(places["out"])):
        match kind:
            case "nothing":
                place.unlink()
            case "no reader":
                places["in"].unlink()
                os.mkfifo(places["in"], 0o600)
            case "file":
                place.unlink()
                place.touch(0o600)
            case "link":
                place.rename(private_directories / "other")
                place.symlink_to(private_directories / "other")
            case "readable":
                place.chmod(0o640)
            case _:
                os.chown(place, STRANGER, -1)
        with pytest.raises(ConnectionFailed, match="can't be opened"):
            asyncio.run(main())
    if sys.platform == "linux":
        opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not [path for path in opened if path.startswith(str(private_directories))]


# Connections over any transport.


class Script:
    """A transport whose messages come from the test."""

    def __init__(self, *messages: str | bytes) -> None:
        self.sent: asyncio.Queue[str] = asyncio.Queue()
        self.messages: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        for message in messages:
            self.messages.put_nowait(message)

    def feed(self, **message: Any) -> None:
        self.messages.put_nowait(json.dumps(message))

    async def send(self, text: str) -> None:
        self.sent.put_nowait(text)

    async def receive(self) -> str | bytes:
        message = await self.messages.get()
        if message is None:
            raise TransportClosed("it was closed")
        if message == b"\xff":
            return str(message, "utf-8")
        return message

    async def close(self) -> None:
        self.messages.put_nowait(None)

    async def answer(self, **result: Any) -> dict[str, Any]:
        """Answer the next call, and return it."""
        call: dict[str, Any] = json.loads(await self.sent.get())
        session = {"sessionId": call["sessionId"]} if "sessionId" in call else {}
        self.feed(id=call["id"], result=result, **session)
        return call


Events = list[tuple[str, dict[str, Any], str | None]]


async def adopt(transport: Script, events: Events) -> Connection:
    """Enter the root session "root", where an earlier daemon had "stale"."""
    connection = Connection(transport, None, adopted=True)
    entering = asyncio.create_task(connection.enter_root_session("stale", lambda *event: events.append(event[:3])))
    # It completes a message that the earlier daemon may have half written.
    assert await transport.sent.get() == ""
    detached = await transport.answer()
    assert (detached["method"], detached["params"]) == ("Target.detachFromTarget", {"sessionId": "stale"})
    assert (await transport.answer(sessionId="root"))["method"] == "Target.attachToBrowserTarget"
    assert await entering == "root"
    return connection


@pytest.mark.parametrize("first", ['lue": 1}}', "\ud83d", "", b"\xff", '{"id": 5, "result": {}}', "[" * 100000])
def test_adoption_skips_the_rest_of_one_message(first: str | bytes) -> None:
    async def main() -> None:
        transport = Script(first)
        connection = await adopt(transport, [])
        assert connection.lost is None
        await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "text", ['lue": 1}}', "", b"\xff", "1", "[]", '{"id": []}', '{"id": ID, "error": 1}', '{"method": 1, "params": 2}']
)
@pytest.mark.parametrize("adopted", [True, False])
def test_an_invalid_message_ends_the_connection(text: str | bytes, adopted: bool) -> None:
    async def main() -> None:
        transport = Script()
        messages: list[str | bytes] = ['rest"}', text] if adopted else [text]
        connection = Connection(transport, lambda *_: None, adopted=adopted)
        call = asyncio.create_task(connection.call("Browser.getVersion"))
        number = json.loads(await transport.sent.get())["id"]
        for message in messages:
            transport.messages.put_nowait(message.replace("ID", str(number)) if isinstance(message, str) else message)
        with pytest.raises(BrowserLost, match="it sent an invalid message"):
            await call
        with pytest.raises(BrowserLost, match="it sent an invalid message"):
            await connection.call("Browser.getVersion")
        await connection.close()

    asyncio.run(main())


def test_replies_and_events_of_an_earlier_daemon_are_not_ours() -> None:
    async def main() -> None:
        events: Events = []
        transport = Script()
        transport.feed(error={"code": -32700, "message": "JSON: invalid token"})
        transport.feed(method="Target.targetCreated", params={"targetInfo": {}}, sessionId="stale")
        transport.feed(id=1, result={"theirs": True}, sessionId="stale child")
        connection = await adopt(transport, events)
        assert events == []
        transport.feed(method="Target.targetCreated", params={"targetInfo": 1}, sessionId="root")
        transport.feed(method="Page.loadEventFired", sessionId="child")
        call = asyncio.create_task(connection.call("Runtime.evaluate", session="child"))
        sent = json.loads(await transport.sent.get())
        assert sent["sessionId"] == "child"
        # A reply with the same id in a session of the earlier daemon is ignored.
        transport.feed(id=sent["id"], result={"theirs": True}, sessionId="stale child")
        transport.feed(id=sent["id"], result={"ours": True}, sessionId="child")
        assert await call == {"ours": True}
        assert events == [("Target.targetCreated", {"targetInfo": 1}, None), ("Page.loadEventFired", {}, "child")]
        await connection.close()

    asyncio.run(main())


def test_calls_without_a_session_use_the_root_session() -> None:
    async def main() -> None:
        transport = Script()
        connection = await adopt(transport, [])
        call = asyncio.create_task(connection.call("Browser.getVersion"))
        assert (await transport.answer(product="x"))["sessionId"] == "root"
        assert await call == {"product": "x"}
        call = asyncio.create_task(connection.call("Browser.setDownloadBehavior", outlasting=True))
        assert "sessionId" not in await transport.answer()
        assert await call == {}
        await connection.close()

    asyncio.run(main())


def test_two_connections_number_their_calls_differently() -> None:
    async def main() -> None:
        numbers = set()
        for _ in range(20):
            transport = Script()
            connection = Connection(transport, None)
            call = asyncio.create_task(connection.call("Browser.getVersion"))
            numbers.add((await transport.answer())["id"])
            await call
            await connection.close()
        assert len(numbers) == 20
        # Chrome's ids are signed 32-bit integers.
        assert all(0 < number < 2**31 for number in numbers)

    asyncio.run(main())


def test_replies_with_an_unknown_id_are_ignored() -> None:
    async def main() -> None:
        transport = Script()
        connection = Connection(transport, None)
        transport.feed(id=-1, result={})
        transport.feed(error={"code": -32700, "message": "no"})
        call = asyncio.create_task(connection.call("Browser.getVersion"))
        await transport.answer(product="x")
        assert await call == {"product": "x"}
        await connection.close()

    asyncio.run(main())
