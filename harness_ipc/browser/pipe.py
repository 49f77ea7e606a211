"""CDP over two FIFOs (`--remote-debugging-pipe`): NUL-terminated messages, no TCP port. POSIX only.

The browser holds both ends of both FIFOs, so they survive a killed daemon, and unread data stays for the next daemon. This side
holds one end of each, and sees EOF when the browser ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import sys
from collections import deque
from typing import TYPE_CHECKING

from . import MAX_MESSAGE
from .connection import ConnectionFailed, TransportClosed, check_size

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes of a pipe's buffer: the most that an unprivileged user may set (pipe(7), /proc/sys/fs/pipe-max-size).
_CAPACITY = 1024 * 1024
# Bytes of one read, as Chrome writes them (kWritePacketSize).
_CHUNK = 64 * 1024


class FrameDecoder:
    """Splits a stream into NUL-terminated messages."""

    def __init__(self, limit: int) -> None:
        self._partial = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> list[bytearray]:
        """Return the messages that `data` completes. Raises `ValueError` if one has more than `limit` bytes."""
        frames = []
        *ends, rest = data.split(b"\0")
        for end in ends:
            self._append(end)
            frames.append(self._partial)
            self._partial = bytearray()
        self._append(rest)
        return frames

    def _append(self, data: bytes) -> None:
        self._partial += data
        if len(self._partial) > self._limit:
            raise ValueError(f"a message of more than {self._limit} bytes")


if sys.platform != "win32":
    import fcntl

    @contextlib.contextmanager
    def create_fifos(to_browser: str, from_browser: str) -> Iterator[tuple[int, int]]:
        """Create both FIFOs in a private directory, replacing existing files, and yield the descriptors for the browser.

        They are open in both directions, and closed at the end of the block. Raises `OSError`.
        """
        with contextlib.ExitStack() as stack:
            descriptors = []
            for path in (to_browser, from_browser):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.mkfifo(path, 0o600)
                # The umask may have cleared the owner's bits too.
                os.chmod(path, 0o600)
                descriptor = _open_fifo(path, os.O_RDWR)
                stack.callback(os.close, descriptor)
                # The browser uses blocking reads and writes.
                os.set_blocking(descriptor, True)
                _enlarge(descriptor)
                descriptors.append(descriptor)
            yield descriptors[0], descriptors[1]

    def open_pipe(to_browser: str, from_browser: str, pid: int) -> PipeTransport:
        """Open the FIFOs of the browser with this `pid`. Raises `ConnectionFailed`."""
        try:
            # ENXIO without a reader: the browser has ended.
            writer = _open_fifo(to_browser, os.O_WRONLY)
            try:
                return PipeTransport(_open_fifo(from_browser, os.O_RDONLY), writer, pid)
            except OSError:
                os.close(writer)
                raise
        except OSError as error:
            raise ConnectionFailed(f"its pipe {error.filename or to_browser} can't be opened ({error.strerror})") from None

    def _open_fifo(path: str, direction: int) -> int:
        descriptor = os.open(path, direction | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        info = os.fstat(descriptor)
        if stat.S_ISFIFO(info.st_mode) and stat.S_IMODE(info.st_mode) == 0o600 and info.st_uid == os.geteuid():
            return descriptor
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it is not a FIFO of mode 0600 that belongs to you", path)

    def _enlarge(descriptor: int) -> None:
        if sys.platform == "linux":
            # EPERM above the user's limit for all pipes.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _CAPACITY)

    class PipeTransport:
        """Messages over the non-blocking descriptors `reader` and `writer`. Lost when the process `pid` ends."""

        def __init__(self, reader: int, writer: int, pid: int) -> None:
            self._loop = asyncio.get_running_loop()
            self._reader = reader
            self._writer = writer
            self._process = self._watch(pid)
            self._decoder = FrameDecoder(MAX_MESSAGE)
            self._received: deque[bytearray] = deque()
            self._arrived = asyncio.Event()
            self._closed: str | None = None
            # One message at a time. If its sender is cancelled, the rest of it stays queued.
            self._sending = asyncio.Lock()
            self._unsent = memoryview(b"")
            self._sent = asyncio.Event()
            self._sent.set()
            self._loop.add_reader(reader, self._read)

        async def send(self, text: str) -> None:
            """Send one message; wait while the browser reads slowly. Raises `TransportClosed`, or `CDPError` if too large."""
            data = text.encode() + b"\0"
            check_size(len(data))
            async with self._sending:
                await self._sent.wait()
                if self._closed is not None:
                    raise TransportClosed(self._closed)
                self._unsent = memoryview(data)
                self._sent.clear()
                self._write()
                await self._sent.wait()

        async def receive(self) -> str:
            """Return the next message."""
            while not self._received:
                if self._closed is not None:
                    raise TransportClosed(self._closed)
                self._arrived.clear()
                await self._arrived.wait()
            return self._received.popleft().decode()

        async def close(self) -> None:
            """Close this side's ends."""
            self._close("it was closed")

        def _read(self) -> bool:
            """Read available data. Return whether there may be more."""
            try:
                data = os.read(self._reader, _CHUNK)
                if data:
                    self._received += self._decoder.feed(data)
                    self._arrived.set()
                    return True
                self._close("it closed its end of the pipe")
            except BlockingIOError:
                pass
            except OSError as error:
                self._close(f"its pipe can't be read: {error.strerror}")
            except ValueError as error:
                self._close(f"it sent {error}")
            return False

        def _write(self) -> None:
            # One write per iteration of the loop: a large message must not block it.
            try:
                self._unsent = self._unsent[os.write(self._writer, self._unsent) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(f"its pipe can't be written: {error.strerror}")
                return
            if self._unsent:
                self._loop.add_writer(self._writer, self._write)
            else:
                self._loop.remove_writer(self._writer)
                self._sent.set()

        def _watch(self, pid: int) -> int | None:
            """Watch for the end of the process: its children may keep the pipe open."""
            if sys.platform == "linux":
                # pidfd_open may be missing (before Linux 5.3, or in Python built for it), or forbidden by a sandbox.
                with contextlib.suppress(OSError, AttributeError):
                    process = os.pidfd_open(pid)
                    self._loop.add_reader(process, self._lose, "its process ended")
                    return process
            return None

        def _lose(self, reason: str) -> None:
            """Process the data that the browser wrote before its end, then close."""
            while self._closed is None and self._read():
                pass
            self._close(reason)

        def _close(self, reason: str) -> None:
            if self._closed is not None:
                return
            self._closed = reason
            self._unsent = memoryview(b"")
            self._loop.remove_writer(self._writer)
            for descriptor in (self._reader, self._process):
                if descriptor is not None:
                    self._loop.remove_reader(descriptor)
            for descriptor in (self._reader, self._writer, self._process):
                if descriptor is not None:
                    os.close(descriptor)
            self._sent.set()
            self._arrived.set()
