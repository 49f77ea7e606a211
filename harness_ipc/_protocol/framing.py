"""Frames in a stream of bytes, as `multiprocessing.connection` writes them, and in a pipe whose messages are frames. No I/O.

In a stream a frame is its length in four bytes, big-endian, and its payload. A length of -1 announces one of eight bytes.
"""

from __future__ import annotations

import struct
from collections import deque

from ..errors import MessageTooLarge, ProtocolError

_LENGTH = struct.Struct("!i")
_LONG_LENGTH = struct.Struct("!Q")
_MAX_SHORT = 2**31 - 1
# Bytes up to which frames are copied together, so that one write sends them.
_MAX_COALESCED = 64 * 1024


class StreamFraming:
    """Both directions of an AF_UNIX connection. `buffered` is how many bytes were fed and not yet taken as frames."""

    __slots__ = ("_data", "_pieces", "_start", "_wanted", "buffered")

    def __init__(self) -> None:
        # `_pieces` follow `_data`, which was taken up to `_start`. They are joined once `_wanted` bytes are there.
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

        An announced length allocates nothing. Raises `MessageTooLarge` for one above `limit` bytes and `ProtocolError` for a
        negative one; nothing more can be read from this peer then.
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
        # An idle connection holds no message.
        self._data, self._start = (data, end) if left else (b"", 0)
        return data[body:end]

    def clear(self) -> None:
        """Drop what was fed."""
        self._data, self._start, self._wanted, self.buffered = b"", 0, _LENGTH.size, 0
        self._pieces.clear()

    @staticmethod
    def encode(frames: list[bytes]) -> list[bytes]:
        """Return the chunks to write for `frames`: short ones in one chunk, a long one as it is, after its length."""
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
    """Both directions of an AF_PIPE connection, where each message of the pipe is a frame."""

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
    """Raise `MessageTooLarge` if a message of `size` bytes, sent or announced, is above `limit`, `ProtocolError` below 0."""
    if size < 0:
        raise ProtocolError("the peer sent a frame of a negative length: it does not speak this protocol")
    if size > limit:
        raise MessageTooLarge(
            f"a message of {size} bytes is above the limit of {limit} bytes: send less, or raise max_message on both sides",
            size=size,
            limit=limit,
        )


Framing = StreamFraming | PipeFraming
