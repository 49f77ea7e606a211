"""Framing of a byte stream, as in `multiprocessing.connection`, and of a pipe, where each message is a frame. No I/O.

In a stream, a frame is a big-endian length of four bytes and the payload. A length of -1 is followed by one of eight bytes.
"""

from __future__ import annotations

import struct
from collections import deque

from ..errors import MessageTooLarge, ProtocolError

_LENGTH = struct.Struct("!i")
_LONG_LENGTH = struct.Struct("!Q")
_MAX_SHORT = 2**31 - 1
# Frames of up to this many bytes together are joined, to send them with one write.
_MAX_COALESCED = 64 * 1024


class StreamFraming:
    """The framing of an AF_UNIX connection, in both directions. `buffered` counts the bytes not yet returned as frames."""

    __slots__ = ("_data", "_pieces", "_start", "_wanted", "buffered")

    def __init__(self) -> None:
        # `_data` is consumed up to `_start`; `_pieces` follow it. They are joined once there are `_wanted` bytes.
        self._data = b""
        self._start = 0
        self._pieces: list[bytes] = []
        self._wanted = _LENGTH.size
        self.buffered = 0

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        if self.buffered:
            self._pieces.append(data)
        else:
            self._data, self._start = data, 0
        self.buffered += len(data)

    def next_frame(self, limit: int) -> bytes | None:
        """Return the payload of the next frame, or None until it is complete.

        An announced length allocates no memory. Raises `MessageTooLarge` for one above `limit` bytes and `ProtocolError` for a
        negative one; the connection can't be read any further then.
        """
        if self.buffered < self._wanted:
            return None
        if self._pieces:
            self._data = b"".join((self._data[self._start :], *self._pieces))
            self._start = 0
            self._pieces.clear()
        data, start = self._data, self._start
        (size,) = _LENGTH.unpack_from(data, start)
        body = start + _LENGTH.size
        if size == -1:
            self._wanted = _LENGTH.size + _LONG_LENGTH.size
            if self.buffered < self._wanted:
                return None
            (size,) = _LONG_LENGTH.unpack_from(data, body)
            body = start + self._wanted
        if not 0 <= size <= limit:
            check_size(size, limit)
        end = body + size
        left = len(data) - end
        if left < 0:
            self._wanted = end - start
            return None
        self.buffered = left
        self._wanted = _LENGTH.size
        # An idle connection must not keep a message in memory.
        self._data, self._start = (data, end) if left else (b"", 0)
        return data[body:end]

    def clear(self) -> None:
        """Drop what was fed."""
        self._data, self._start, self._wanted, self.buffered = b"", 0, _LENGTH.size, 0
        self._pieces.clear()

    @staticmethod
    def encode(frames: list[bytes]) -> list[bytes]:
        """Return the chunks to write for `frames`: short frames are joined; a long payload is a separate chunk, not copied."""
        if sum(map(len, frames)) <= _MAX_COALESCED:
            return [b"".join([_LENGTH.pack(len(frame)) + frame for frame in frames])] if frames else []
        chunks: list[bytes] = []
        short: list[bytes] = []
        size = 0
        for frame in frames:
            length = len(frame)
            short.append(_LENGTH.pack(length) if length <= _MAX_SHORT else _LENGTH.pack(-1) + _LONG_LENGTH.pack(length))
            size += length
            if size <= _MAX_COALESCED:
                short.append(frame)
            else:
                chunks += [b"".join(short), frame]
                short.clear()
                size = 0
        if short:
            chunks.append(b"".join(short))
        return chunks


class PipeFraming:
    """The framing of an AF_PIPE connection, in both directions: each message of the pipe is a frame."""

    __slots__ = ("_frames", "buffered")

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self.buffered = 0

    def feed(self, data: bytes) -> None:
        """Add a received message."""
        self._frames.append(data)
        self.buffered += len(data)

    def next_frame(self, limit: int) -> bytes | None:
        """Return the next frame, or None. Raises `MessageTooLarge`."""
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self.buffered -= len(frame)
        if len(frame) > limit:
            check_size(len(frame), limit)
        return frame

    def clear(self) -> None:
        """Drop what was fed."""
        self._frames.clear()
        self.buffered = 0

    @staticmethod
    def encode(frames: list[bytes]) -> list[bytes]:
        """Return the chunks to write for `frames`."""
        return list(frames)


def check_size(size: int, limit: int) -> None:
    """Raise `MessageTooLarge` if the `size` of a message is above `limit`, and `ProtocolError` if it is negative. In bytes."""
    if size < 0:
        raise ProtocolError("the peer sent a negative frame length: it does not speak this protocol")
    if size > limit:
        raise MessageTooLarge(
            f"a message of {size} bytes is above the limit of {limit} bytes: send less, or raise max_message on both sides",
            size=size,
            limit=limit,
        )


Framing = StreamFraming | PipeFraming
