"""AF_PIPE: a client's connection to a named pipe, overlapped reads and writes under one deadline."""

from __future__ import annotations

import contextlib
import sys
from math import ceil, inf

from .._protocol.framing import check_size
from ..errors import EXHAUSTED, AuthenticationFailed, ConnectionLost, DaemonNotRunning, HarnessIPCError, ResourceExhausted
from .base import PeerCredentials, connection_lost, remaining

# Bytes of the first read, enough for a short message. The rest of a longer one is read when its length is known.
FIRST_READ = 4096
# Seconds of one wait: WaitNamedPipe can't be interrupted, and takes milliseconds in 32 bits.
_MAX_WAIT = 1.0
# winerror.h and winbase.h; _winapi lacks them.
ERROR_IO_INCOMPLETE = 996
_ERROR_NO_SYSTEM_RESOURCES = 1450
_SECURITY_SQOS_PRESENT = 0x100000
_SECURITY_IDENTIFICATION = 0x10000

if sys.platform == "win32":
    import _winapi

    class Connection:
        """An open pipe, used like `dial.Connection`; each chunk is a message. Not thread-safe, except `abort`.

        `all_sent` is true as soon as the last write has started: a cancelled write may have arrived.
        """

        __slots__ = ("_aborted", "_handle", "_pending", "all_sent", "deadline", "peer")

        def __init__(self, handle: int) -> None:
            self._handle: int | None = handle
            self.peer = PeerCredentials(None, None)
            self.deadline = inf
            self.all_sent = False
            self._aborted = False
            self._pending: _winapi.Overlapped | None = None

        def __del__(self) -> None:
            self.close()

        def close(self) -> None:
            """Close the pipe. Idempotent."""
            handle, self._handle = self._handle, None
            if handle is not None:
                _winapi.CloseHandle(handle)

        def fileno(self) -> int:
            """Return the pipe's handle. Raises `ConnectionLost` if it is closed."""
            if self._handle is None:
                raise ConnectionLost("the connection is closed")
            return self._handle

        def abort(self) -> None:
            """Interrupt a blocked send or receive, from any thread."""
            self._aborted = True
            if (pending := self._pending) is not None:
                with contextlib.suppress(OSError):
                    pending.cancel()

        def is_readable(self) -> bool:
            """Whether a receive would not block: there is a message, or the peer has closed."""
            if self._aborted:
                return True
            try:
                return bool(_winapi.PeekNamedPipe(self.fileno())[0])
            except OSError:
                return True

        def send(self, chunks: list[bytes]) -> None:
            """Send `chunks`. Raises `ConnectionLost` or `DaemonTimeout`."""
            self.all_sent = False
            try:
                for number, chunk in enumerate(chunks, 1):
                    overlapped, _ = _winapi.WriteFile(self.fileno(), chunk, overlapped=True)
                    self.all_sent = number == len(chunks)
                    self._finish(overlapped)
            except HarnessIPCError:
                raise
            except OSError as error:
                raise connection_lost(error) from error

        def send_now(self, chunks: list[bytes]) -> bool:
            """Send `chunks` and return True. A pipe can't send without waiting."""
            self.send(chunks)
            return True

        def receive(self, limit: int) -> bytes:
            """Return the next message, of up to `limit` bytes.

            Raises `ConnectionLost`, `DaemonTimeout` or `MessageTooLarge`: close the connection then.
            """
            try:
                data, has_more = self._read(min(limit, FIRST_READ))
                if not has_more:
                    return data
                return data + self._read(size_of_rest(self.fileno(), len(data), limit))[0]
            except HarnessIPCError:
                raise
            except BrokenPipeError as error:
                raise ConnectionLost("the peer closed the connection") from error
            except OSError as error:
                raise connection_lost(error) from error

        def _read(self, size: int) -> tuple[bytes, bool]:
            """Return up to `size` bytes of a message and whether there is more of it."""
            overlapped, _ = _winapi.ReadFile(self.fileno(), size, overlapped=True)
            error = self._finish(overlapped)
            return overlapped.getbuffer() or b"", error == _winapi.ERROR_MORE_DATA

        def _finish(self, overlapped: _winapi.Overlapped) -> int:
            """Wait for `overlapped` until the deadline, and return its error code if it does not raise."""
            self._pending = overlapped
            try:
                # After self._pending is set: an earlier abort() could not cancel it.
                if self._aborted:
                    overlapped.cancel()
                while (error := overlapped.GetOverlappedResult(False)[1]) == ERROR_IO_INCOMPLETE:
                    milliseconds = (
                        _winapi.INFINITE if self.deadline == inf else ceil(min(remaining(self.deadline), _MAX_WAIT) * 1000)
                    )
                    # EINTR: a signal handler has run.
                    with contextlib.suppress(InterruptedError):
                        _winapi.WaitForMultipleObjects([overlapped.event], False, milliseconds)
            except BaseException:
                # The system may write to the buffer until the operation is cancelled.
                with contextlib.suppress(OSError):
                    overlapped.cancel()
                    overlapped.GetOverlappedResult(True)
                raise
            finally:
                self._pending = None
            if error == _winapi.ERROR_OPERATION_ABORTED:
                raise ConnectionLost("the connection was closed in the middle of a message")
            return int(error)

    def connect(address: str, deadline: float) -> Connection:
        """Connect to `address` before `deadline`, a monotonic time.

        Raises `DaemonNotRunning` without a listener, `DaemonTimeout` if it does not accept, `AuthenticationFailed` if the pipe
        is another user's, and `ResourceExhausted` if this process has no free handle or memory.
        """
        while True:
            left = remaining(deadline)
            try:
                connection = Connection(open_pipe(address))
                _winapi.SetNamedPipeHandleState(connection.fileno(), _winapi.PIPE_READMODE_MESSAGE, None, None)
                return connection
            except FileNotFoundError as error:
                raise DaemonNotRunning(f"nobody listens at {address}") from error
            except PermissionError as error:
                raise AuthenticationFailed(f"the pipe {address} belongs to another user") from error
            except OSError as error:
                if error.errno in EXHAUSTED or error.winerror == _ERROR_NO_SYSTEM_RESOURCES:
                    raise ResourceExhausted(f"the pipe {address} can't be opened: {error.strerror}") from error
                if error.winerror != _winapi.ERROR_PIPE_BUSY:
                    raise ConnectionLost(f"the pipe {address} can't be connected: {error.strerror}") from error
            # All instances are in use. An error of this wait recurs in the next attempt.
            with contextlib.suppress(OSError):
                _winapi.WaitNamedPipe(address, ceil(min(left, _MAX_WAIT) * 1000))

    def size_of_rest(handle: int, size: int, limit: int) -> int:
        """Return the unread bytes of a message of which `size` were read. Raises `MessageTooLarge` and `OSError`."""
        # All of it has arrived, unless the peer has cancelled its write: a read would wait for the next message then.
        left: int = _winapi.PeekNamedPipe(handle)[1]
        if not left:
            raise BrokenPipeError("the peer cancelled a message in the middle")
        check_size(size + left, limit)
        return left

    def open_pipe(address: str) -> int:
        """Return the handle of a new connection to the pipe `address`. Raises `OSError`."""
        return _winapi.CreateFile(
            address,
            _winapi.GENERIC_READ | _winapi.GENERIC_WRITE,
            0,
            _winapi.NULL,
            _winapi.OPEN_EXISTING,
            # The server of the pipe may identify this process, but not impersonate it.
            _winapi.FILE_FLAG_OVERLAPPED | _SECURITY_SQOS_PRESENT | _SECURITY_IDENTIFICATION,
            _winapi.NULL,
        )
