"""Framing as rows: bytes in, frames out, and errors. The bytes are those of the standard library."""

from __future__ import annotations

import os
import struct
import tracemalloc
from multiprocessing import connection as stock
from typing import Any

import pytest

from harness_ipc._protocol.framing import Framing, PipeFraming, StreamFraming
from harness_ipc.errors import HarnessIPCError, MessageTooLarge, ProtocolError
from tests.support.marks import needs_posix

MIB = 1024 * 1024
LIMIT = 1000


def header(size: int) -> bytes:
    return struct.pack("!i", size)


def long_header(size: int) -> bytes:
    return struct.pack("!iQ", -1, size)


def frames_of(framing: Framing, limit: int = LIMIT) -> list[bytes]:
    frames = []
    while (frame := framing.next_frame(limit)) is not None:
        frames.append(frame)
    return frames


ROWS: dict[str, tuple[bytes, list[bytes], int]] = {
    "nothing": (b"", [], 0),
    "half a length": (b"\0\0", [], 2),
    "a length": (header(5), [], 4),
    "half a frame": (header(5) + b"abc", [], 7),
    "a frame": (header(5) + b"abcde", [b"abcde"], 0),
    "an empty frame": (header(0), [b""], 0),
    "three frames and a half": (header(1) + b"a" + header(0) + header(2) + b"bc" + header(3) + b"d", [b"a", b"", b"bc"], 5),
    "half a long length": (long_header(2)[:9], [], 9),
    "a long length": (long_header(2) + b"xy" + header(1) + b"z", [b"xy", b"z"], 0),
    "a frame at the limit": (header(LIMIT) + bytes(LIMIT), [bytes(LIMIT)], 0),
}


@pytest.mark.parametrize(("stream", "frames", "left"), ROWS.values(), ids=ROWS)
def test_a_stream_may_be_split_at_any_byte(stream: bytes, frames: list[bytes], left: int) -> None:
    for cut in range(len(stream) + 1):
        framing = StreamFraming()
        received = []
        for piece in (stream[:cut], stream[cut:]):
            framing.feed(piece)
            received += frames_of(framing)
        assert (received, framing.buffered) == (frames, left)
    framing = StreamFraming()
    received = []
    for byte in stream:
        framing.feed(bytes([byte]))
        received += frames_of(framing)
    assert (received, framing.buffered) == (frames, left)


@pytest.mark.parametrize(
    ("stream", "kind", "size"),
    [
        (header(LIMIT + 1), MessageTooLarge, LIMIT + 1),
        (header(2**31 - 1), MessageTooLarge, 2**31 - 1),
        (long_header(LIMIT + 1), MessageTooLarge, LIMIT + 1),
        (long_header(2**64 - 1), MessageTooLarge, 2**64 - 1),
        (header(-2), ProtocolError, None),
        (header(-(2**31)), ProtocolError, None),
    ],
)
def test_an_invalid_length_is_refused_before_its_frame_arrives(stream: bytes, kind: type[HarnessIPCError], size: int) -> None:
    framing = StreamFraming()
    framing.feed(header(1) + b"a" + stream)
    assert framing.next_frame(LIMIT) == b"a"
    with pytest.raises(kind) as caught:
        framing.next_frame(LIMIT)
    if isinstance(caught.value, MessageTooLarge):
        assert (caught.value.size, caught.value.limit) == (size, LIMIT)


def test_an_announced_length_allocates_nothing() -> None:
    framing = StreamFraming()
    tracemalloc.start()
    try:
        framing.feed(header(63 * MIB) + bytes(100_000))
        assert framing.next_frame(64 * MIB) is None
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_long_frame_in_many_pieces_is_joined_once() -> None:
    payload = os.urandom(4 * MIB)
    framing = StreamFraming()
    framing.feed(header(len(payload)))
    for start in range(0, len(payload), 1024):
        assert framing.next_frame(len(payload)) is None
        framing.feed(payload[start : start + 1024])
    assert framing.next_frame(len(payload)) == payload
    assert framing.buffered == 0


@pytest.mark.parametrize(
    "sizes", [[0], [1, 2, 3], [65535], [65536], [65537], [10, 65536, 10], [70_000, 70_000, 5], [5, 200_000]]
)
def test_encoding_round_trip(sizes: list[int]) -> None:
    frames = [os.urandom(size) for size in sizes]
    framing = StreamFraming()
    chunks = StreamFraming.encode(frames)
    for chunk in chunks:
        framing.feed(chunk)
    assert frames_of(framing, MIB) == frames
    # A short frame is one write; a long one is not copied.
    assert len(chunks) == 1 or any(chunk is frame for chunk in chunks for frame in frames)


def test_nothing_is_encoded_as_nothing() -> None:
    assert StreamFraming.encode([]) == PipeFraming.encode([]) == []


@needs_posix
@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 70_000])
def test_the_bytes_are_those_of_the_standard_library(size: int) -> None:
    payload = os.urandom(size)
    ours, theirs = stock.Pipe()
    with ours, theirs:
        theirs.send_bytes(payload)
        sent = b""
        while len(sent) < size + 4:
            sent += os.read(ours.fileno(), size + 5)
        assert sent == b"".join(StreamFraming.encode([payload]))
        os.write(ours.fileno(), sent)
        assert theirs.recv_bytes() == payload


def test_each_message_of_a_pipe_is_a_frame() -> None:
    framing = PipeFraming()
    for message in (b"one", b"", b"three"):
        framing.feed(message)
    assert framing.buffered == 8
    assert frames_of(framing) == [b"one", b"", b"three"]
    assert framing.buffered == 0
    framing.feed(bytes(LIMIT + 1))
    with pytest.raises(MessageTooLarge):
        framing.next_frame(LIMIT)
    assert PipeFraming.encode([b"a", b"", b"b"]) == [b"a", b"", b"b"]


@pytest.mark.parametrize("make", [StreamFraming, PipeFraming])
def test_clear_discards_fed_data(make: Any) -> None:
    framing: Framing = make()
    framing.feed(header(100) + b"half")
    framing.next_frame(LIMIT)
    framing.feed(b"more")
    framing.clear()
    assert framing.buffered == 0
    assert framing.next_frame(LIMIT) is None
    framing.feed(header(1) + b"a")
    assert framing.next_frame(LIMIT) is not None
