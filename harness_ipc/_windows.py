"""AF_PIPE: named pipes that only their owner can open, overlapped reads and writes under one deadline."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from math import ceil, inf

from ._base import EXHAUSTED, PeerCredentials, check_size, remaining
from ._stock import connection
from .errors import AuthenticationFailed, ConnectionLost, DaemonNotRunning, ResourceExhausted, StartFailed

FAMILY = "AF_PIPE"
# The first read takes a short frame in whole; the rest of a longer one is read once its length is known.
_FIRST_READ = 4096
# What a pipe holds for a peer that does not read yet; it takes a frame up to this length without waiting.
_BUFFER = 64 * 1024
# One wait is at most this long: nothing interrupts WaitNamedPipe, and milliseconds have 32 bits.
_MOST_WAIT = 1.0
# winerror.h and winbase.h; _winapi lacks them.
_ERROR_IO_INCOMPLETE = 996
_ERROR_NO_SYSTEM_RESOURCES = 1450
_PIPE_REJECT_REMOTE_CLIENTS = 8
_SECURITY_SQOS_PRESENT = 0x100000
_SECURITY_IDENTIFICATION = 0x10000

if sys.platform == "win32":
    import _winapi

    class Connection(connection.PipeConnection):
        """A `multiprocessing.connection.PipeConnection` that keeps a deadline.

        `deadline` is the monotonic time at which a blocked send or receive raises `DaemonTimeout`; infinity by default.
        `peer` is who the kernel says is at the other end. One thread may send while another receives, never two of a kind.
        """

        _handle: int

        def __init__(self, handle: int, peer: PeerCredentials) -> None:
            super().__init__(handle)
            self.deadline = inf
            self.peer = peer
            self._finishing = False
            self._aborted = False
            self._receiving: _winapi.Overlapped | None = None
            self._sending: _winapi.Overlapped | None = None

        # The proactor loop can't wait for a pipe that it did not open.
        LOOP_CAN_WATCH = False
        # A write that is given up may have been completed at the same moment.
        FAILED_SEND_MAY_ARRIVE = True

        @property
        def has_unsent(self) -> bool:
            """Whether something is left to flush."""
            return self._sending is not None

        @property
        def has_unread(self) -> bool:
            """Whether something was read and not yet received: never."""
            return False

        def receive_now(self, limit: int) -> bytes | None:
            """Return None: `recv_bytes` has to wait."""
            return None

        def read_ahead(self, limit: int) -> bool | None:
            """Return None: nothing is read before it is received."""
            return None

        def readable_now(self) -> bool:
            """Whether a receive would not block: there is a frame, or the end."""
            try:
                return self._finishing or bool(_winapi.PeekNamedPipe(self._handle)[0])
            except OSError:
                return True

        def hold(self, frame: bytes) -> None:
            """Send a short frame. It is not held here: each is a message of its own to a pipe."""
            self.send_bytes(frame)

        def try_send(self, frame: bytes) -> bool:
            """Begin to send a frame; `flush` waits until the pipe has taken it. False: too long, nothing was done."""
            if len(frame) > _BUFFER:
                return False
            # A peer that has gone shows in the next receive.
            with contextlib.suppress(OSError):
                self._begin_send(frame)
            return True

        def try_flush(self) -> None:
            """Do nothing: what `hold` was given has gone."""

        def flush(self) -> None:
            """Wait until the pipe has taken the frame that is being sent."""
            if self._sending is None:
                return
            try:
                # After self._sending was set: an abort() before that has cancelled nothing.
                if self._aborted:
                    self._sending.cancel()
                _, error = self._finish(self._sending)
            finally:
                self._sending = None
            if error:
                raise ConnectionLost("the connection was ended in the middle of a message")

        def finish_receiving(self) -> None:
            """Let receives return what has already arrived and then report the end; from any thread."""
            self._finishing = True
            _cancel(self._receiving)

        def abort(self) -> None:
            """Make every blocked send and receive end at once; from any thread."""
            self._aborted = True
            self.finish_receiving()
            _cancel(self._sending)

        # The seams of multiprocessing.connection.PipeConnection (unchanged from 3.11 to 3.14).

        def _send_bytes(self, buf: bytes | memoryview) -> None:
            self._begin_send(buf)
            self.flush()

        def _begin_send(self, buf: bytes | memoryview) -> None:
            self._sending, _ = _winapi.WriteFile(self._handle, buf, overlapped=True)

        def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO:
            data, more = self._read(_FIRST_READ if maxsize is None else min(maxsize, _FIRST_READ))
            if more:
                # The rest is there in whole, unless the peer has cancelled its write: a read would wait for the next message.
                left = _winapi.PeekNamedPipe(self._handle)[1]
                if not left:
                    raise OSError("the peer gave a message up in the middle")
                size = len(data) + left
                check_size(size, maxsize)
                data += self._read(left)[0]
            return io.BytesIO(data)

        def _read(self, size: int) -> tuple[bytes, bool]:
            """Return up to `size` bytes of a message and whether there is more of it."""
            try:
                if self._finishing and not _winapi.PeekNamedPipe(self._handle)[0]:
                    raise EOFError
                self._receiving, _ = _winapi.ReadFile(self._handle, size, overlapped=True)
                # After self._receiving was set: a finish_receiving() before that has cancelled nothing.
                if self._finishing:
                    self._receiving.cancel()
                _, error = self._finish(self._receiving)
                if error == _winapi.ERROR_OPERATION_ABORTED:
                    raise EOFError
                return self._receiving.getbuffer() or b"", error == _winapi.ERROR_MORE_DATA
            except BrokenPipeError:
                raise EOFError from None
            finally:
                self._receiving = None

        def _finish(self, overlapped: _winapi.Overlapped) -> tuple[int, int]:
            """Wait for `overlapped` until the deadline; return the number of bytes that it moved and an error."""
            try:
                while (result := overlapped.GetOverlappedResult(False))[1] == _ERROR_IO_INCOMPLETE:
                    milliseconds = (
                        _winapi.INFINITE if self.deadline == inf else ceil(min(remaining(self.deadline), _MOST_WAIT) * 1000)
                    )
                    # EINTR: a signal's handler has returned.
                    with contextlib.suppress(InterruptedError):
                        _winapi.WaitForMultipleObjects([overlapped.event], False, milliseconds)
                return result
            except BaseException:
                # The system writes to the buffer until it has given up the operation.
                with contextlib.suppress(OSError):
                    overlapped.cancel()
                    overlapped.GetOverlappedResult(True)
                raise

    def _cancel(overlapped: _winapi.Overlapped | None) -> None:
        if overlapped is not None:
            with contextlib.suppress(OSError):
                overlapped.cancel()

    class _PipeListener(connection.PipeListener):  # type: ignore[name-defined,misc]
        """The same, closed to other users, who could read from a pipe by default, and to other machines."""

        def __init__(self, address: str) -> None:
            import ctypes
            import struct

            from ._windows_security import pipe_security_descriptor

            descriptor = ctypes.create_string_buffer(pipe_security_descriptor())
            # SECURITY_ATTRIBUTES: length, descriptor, not inherited.
            layout = struct.Struct("IPi0P")
            self._attributes = ctypes.create_string_buffer(layout.pack(layout.size, ctypes.addressof(descriptor), 0))
            self._security = ctypes.addressof(self._attributes)
            # The attributes point to it.
            self._descriptor = descriptor
            self._in_turn = threading.Lock()
            super().__init__(address)

        def accept(self) -> int:
            """Return the handle of the next connection; several threads may call this at once."""
            # Instances wait in a queue until a thread waits on them, and a client gets the oldest free one: it must be one that
            # a thread waits on. So they have to stand in the queue in the order in which they were made.
            with self._in_turn:
                self._handle_queue.append(self._new_handle())
                handle: int = self._handle_queue.pop(0)
            try:
                overlapped = _winapi.ConnectNamedPipe(handle, overlapped=True)
                _winapi.WaitForMultipleObjects([overlapped.event], False, _winapi.INFINITE)
                overlapped.GetOverlappedResult(True)
            except OSError as error:
                # A client has connected, written and gone already: what it wrote can be read.
                if error.winerror != _winapi.ERROR_NO_DATA:
                    _winapi.CloseHandle(handle)
                    raise
            return handle

        def _new_handle(self, first: bool = False) -> int:
            handle: int = _winapi.CreateNamedPipe(
                self._address,
                _winapi.PIPE_ACCESS_DUPLEX
                | _winapi.FILE_FLAG_OVERLAPPED
                | (_winapi.FILE_FLAG_FIRST_PIPE_INSTANCE if first else 0),
                _winapi.PIPE_TYPE_MESSAGE | _winapi.PIPE_READMODE_MESSAGE | _winapi.PIPE_WAIT | _PIPE_REJECT_REMOTE_CLIENTS,
                _winapi.PIPE_UNLIMITED_INSTANCES,
                _BUFFER,
                _BUFFER,
                _winapi.NMPWAIT_WAIT_FOREVER,
                self._security,
            )
            if first:
                # All instances have the descriptor of the first. A client has no use for this module, nor for ctypes.
                from ._windows_security import check_pipe_security

                try:
                    check_pipe_security(handle)
                except BaseException:
                    _winapi.CloseHandle(handle)
                    raise
            return handle

    class Listener:
        """A named pipe that only this user can open; several threads may accept at once, each with an instance of its own."""

        def __init__(self, address: str) -> None:
            """Make the pipe `address`. Raises `StartFailed`, also if the system lets others open it."""
            import ctypes

            self.address = address
            self._kernel32 = ctypes.WinDLL("kernel32")
            try:
                self._listener = _PipeListener(address)
            except OSError as error:
                raise StartFailed(f"the pipe {address} can't be made: {error.strerror}") from error

        def accept(self) -> Connection:
            """Return the next connection. Raises `OSError`."""
            handle = self._listener.accept()
            return Connection(handle, PeerCredentials(self._client_pid(handle), None))

        def wait(self) -> None:
            """Return at once: `accept` waits."""

        def accept_now(self) -> Connection:
            """Raise `BlockingIOError`: `accept` has to wait."""
            raise BlockingIOError("a pipe can't be accepted without waiting")

        def keep_spare(self) -> None:
            """Do nothing: handles have no limit that could be reached."""

        def accept_spare(self) -> Connection:
            """Raise `BlockingIOError` as `accept_now` does."""
            return self.accept_now()

        def fileno(self) -> int:
            """Return -1: no event loop can watch it."""
            return -1

        def wake(self) -> None:
            """Make one blocked accept return."""
            with contextlib.suppress(OSError):
                _winapi.CloseHandle(_open(self.address))

        def close(self) -> None:
            """Close the pipe. No accept may be blocked: see `wake`."""
            with contextlib.suppress(OSError):
                self._listener.close()

        def _client_pid(self, handle: int) -> int | None:
            import ctypes

            # The user is not told; the pipe's access list is what keeps users apart.
            pid = ctypes.c_ulong()
            known = self._kernel32.GetNamedPipeClientProcessId(ctypes.c_void_p(handle), ctypes.byref(pid))
            return pid.value if known else None

    def lacking_descriptors() -> str | None:
        """Return None: handles have no limit that could be reached."""
        return None

    def new_address(directory: str, generation: str) -> str:
        """Return the address of a new generation. Pipes have a namespace of their own: `directory` plays no part."""
        return rf"\\.\pipe\harness-ipc-{generation}"

    def dial(address: str, deadline: float) -> Connection:
        """Connect to `address` before `deadline`, a monotonic time.

        Raises `DaemonNotRunning` if nobody listens there, `DaemonTimeout` if nobody accepts, `AuthenticationFailed` if it
        is another user's, and `ResourceExhausted` if this process has no free handle or memory.
        """
        while True:
            left = remaining(deadline)
            try:
                dialled = Connection(_open(address), PeerCredentials(None, None))
                _winapi.SetNamedPipeHandleState(dialled._handle, _winapi.PIPE_READMODE_MESSAGE, None, None)
                return dialled
            except FileNotFoundError as error:
                raise DaemonNotRunning("the daemon ended without removing its record: start it again") from error
            except PermissionError as error:
                raise AuthenticationFailed(f"the pipe {address} belongs to another user") from error
            except OSError as error:
                if error.errno in EXHAUSTED or error.winerror == _ERROR_NO_SYSTEM_RESOURCES:
                    raise ResourceExhausted(f"the pipe {address} can't be opened: {error.strerror}") from error
                if error.winerror != _winapi.ERROR_PIPE_BUSY:
                    raise ConnectionLost(f"the pipe {address} can't be connected: {error.strerror}") from error
            # All instances are taken. Whatever goes wrong here shows in the next try.
            with contextlib.suppress(OSError):
                _winapi.WaitNamedPipe(address, ceil(min(left, _MOST_WAIT) * 1000))

    def _open(address: str) -> int:
        return _winapi.CreateFile(
            address,
            _winapi.GENERIC_READ | _winapi.GENERIC_WRITE,
            0,
            _winapi.NULL,
            _winapi.OPEN_EXISTING,
            # Whoever made a pipe of this name may learn who we are, but not act as us.
            _winapi.FILE_FLAG_OVERLAPPED | _SECURITY_SQOS_PRESENT | _SECURITY_IDENTIFICATION,
            _winapi.NULL,
        )
