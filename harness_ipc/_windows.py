"""AF_PIPE: named pipes with unguessable names, overlapped reads and writes under one deadline."""

from __future__ import annotations

import contextlib
import sys
from math import ceil, inf
from multiprocessing import connection

from ._base import PeerCredentials, remaining
from .errors import AuthenticationFailed, ConnectionLost, DaemonNotRunning, MessageTooLarge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

FAMILY = "AF_PIPE"
# The first read of a frame: the size that multiprocessing.connection uses. The rest is read once its length is known.
_FIRST_READ = 128
# One WaitNamedPipe, at most: it is not interrupted by anything else, and 0 would mean the server's own default.
_MAX_WAIT_MS = 1000

if sys.platform == "win32":
    import _winapi

    _ERROR_SEM_TIMEOUT = _winapi.ERROR_SEM_TIMEOUT
    _ERROR_PIPE_BUSY = _winapi.ERROR_PIPE_BUSY

    class Connection(connection.PipeConnection):
        """A `multiprocessing.connection.PipeConnection` that keeps a deadline.

        `deadline` is the monotonic time at which a blocked send or receive raises `DaemonTimeout`; infinity by default.
        `peer` is who the kernel says is at the other end. One thread may send while another receives, never two of a kind.
        """

        def __init__(self, handle: int, peer: PeerCredentials) -> None:
            super().__init__(handle)
            self.deadline = inf
            self.peer = peer
            self._finishing = False
            self._aborted = False
            self._more = False
            self._receiving: _winapi.Overlapped | None = None
            self._sending: _winapi.Overlapped | None = None

        def readable_now(self) -> bool:
            """Whether a receive would not block: there is a frame, or the peer has gone."""
            try:
                return bool(_winapi.PeekNamedPipe(self._handle)[0])
            except OSError:
                return True

        def hold(self, frame: bytes) -> None:
            """Send a short frame. It is not held here: each is a message of its own to a pipe."""
            self.send_bytes(frame)

        def try_send(self, frame: bytes) -> bool:
            """Never sends: a write to a pipe can't be left half done."""
            return False

        def flush(self) -> None:
            """Nothing is held."""

        def finish_receiving(self) -> None:
            """Let receives return what has already arrived and then report the end; from any thread."""
            self._finishing = True
            _cancel(self._receiving)

        def abort(self) -> None:
            """Make every blocked send and receive end at once; from any thread."""
            self._aborted = True
            self.finish_receiving()
            _cancel(self._sending)

        # The seams of multiprocessing.connection.PipeConnection: the same calls, with a bounded wait in between.

        def _bad_message_length(self) -> NoReturn:
            raise MessageTooLarge("the peer sent a message above the limit of this side: raise max_message on both sides")

        def _send_bytes(self, buf: bytes | memoryview) -> None:
            overlapped, error = _winapi.WriteFile(self._handle, buf, overlapped=True)
            self._sending = overlapped
            try:
                # After self._sending is set: an abort() in between has then cancelled nothing.
                if self._aborted:
                    overlapped.cancel()
                written = self._finish(overlapped, error)
            finally:
                self._sending = None
            if written != len(buf):
                raise ConnectionLost("the connection ended in the middle of a message")

        def _recv_bytes(self, maxsize: int | None = None) -> object:
            import io

            limit = _FIRST_READ if maxsize is None else min(maxsize, _FIRST_READ)
            frame = io.BytesIO()
            frame.write(self._read(limit))
            left: int = _winapi.PeekNamedPipe(self._handle)[1] if self._more else 0
            if left:
                if maxsize is not None and frame.tell() + left > maxsize:
                    self._bad_message_length()
                frame.write(self._read(left))
            return frame

        def _read(self, size: int) -> bytes:
            if self._finishing and not self.readable_now():
                raise EOFError
            try:
                overlapped, error = _winapi.ReadFile(self._handle, size, overlapped=True)
                self._receiving = overlapped
                try:
                    if self._finishing and error == _winapi.ERROR_IO_PENDING:
                        overlapped.cancel()
                    self._finish(overlapped, error)
                finally:
                    self._receiving = None
            except BrokenPipeError:
                raise EOFError from None
            return overlapped.getbuffer() or b""

        def _finish(self, overlapped: _winapi.Overlapped, error: int) -> int:
            """Wait for `overlapped` until the deadline and return the number of bytes that it moved."""
            try:
                if error == _winapi.ERROR_IO_PENDING:
                    self._wait(overlapped)
            except BaseException:
                overlapped.cancel()
                overlapped.GetOverlappedResult(True)
                raise
            moved, error = overlapped.GetOverlappedResult(True)
            self._more = error == _winapi.ERROR_MORE_DATA
            if error == _winapi.ERROR_OPERATION_ABORTED:
                raise EOFError
            return int(moved)

        def _wait(self, overlapped: _winapi.Overlapped) -> None:
            milliseconds = _winapi.INFINITE if self.deadline == inf else ceil(remaining(self.deadline) * 1000)
            if _winapi.WaitForMultipleObjects([overlapped.event], False, milliseconds) == _winapi.WAIT_TIMEOUT:
                remaining(self.deadline)

    def _cancel(overlapped: _winapi.Overlapped | None) -> None:
        if overlapped is not None:
            with contextlib.suppress(OSError):
                overlapped.cancel()

    class Listener:
        """A named pipe; several threads may accept at once, each with an instance of its own."""

        def __init__(self, address: str) -> None:
            self._listener = connection.Listener(address, FAMILY)
            self.address = address

        def accept(self) -> Connection:
            """Return the next connection. Raises `OSError`."""
            accepted = self._listener.accept()
            # A PipeConnection can't give its handle away, and closes it when it is collected.
            handle, accepted._handle = accepted._handle, None
            return Connection(handle, PeerCredentials(_client_pid(handle), None))

        def wake(self) -> None:
            """Make one blocked accept return."""
            with contextlib.suppress(OSError):
                connection.Client(self.address, FAMILY).close()

        def close(self) -> None:
            """Close the pipe. No accept may be blocked: see `wake`."""
            with contextlib.suppress(OSError):
                self._listener.close()

    def new_address(directory: str, generation: str) -> str:
        """Return the address of a new generation. Pipes have a namespace of their own: `directory` plays no part."""
        return rf"\\.\pipe\harness-ipc-{generation}"

    def dial(address: str, deadline: float) -> Connection:
        """Connect to `address` before `deadline`, a monotonic time.

        Raises `DaemonNotRunning` if nobody listens there, `DaemonTimeout` if nobody accepts.
        """
        while True:
            left = remaining(deadline)
            try:
                _winapi.WaitNamedPipe(address, _MAX_WAIT_MS if left == inf else max(1, min(_MAX_WAIT_MS, int(left * 1000))))
                handle = _winapi.CreateFile(
                    address,
                    _winapi.GENERIC_READ | _winapi.GENERIC_WRITE,
                    0,
                    _winapi.NULL,
                    _winapi.OPEN_EXISTING,
                    _winapi.FILE_FLAG_OVERLAPPED,
                    _winapi.NULL,
                )
                break
            except FileNotFoundError as error:
                raise DaemonNotRunning("the daemon ended without removing its record: start it again") from error
            except PermissionError as error:
                raise AuthenticationFailed(f"the pipe {address} belongs to another user") from error
            except OSError as error:
                if error.winerror not in (_ERROR_SEM_TIMEOUT, _ERROR_PIPE_BUSY):
                    raise ConnectionLost(f"the pipe {address} can't be connected: {error.strerror}") from error
        _winapi.SetNamedPipeHandleState(handle, _winapi.PIPE_READMODE_MESSAGE, None, None)
        return Connection(handle, PeerCredentials(None, None))

    def _client_pid(handle: int) -> int | None:
        import ctypes

        # GetNamedPipeClientProcessId. The user is not told; the pipe's access list is what keeps users apart.
        pid = ctypes.c_ulong()
        known = ctypes.WinDLL("kernel32").GetNamedPipeClientProcessId(ctypes.c_void_p(handle), ctypes.byref(pid))
        return pid.value if known else None
