"""The daemon's side of AF_PIPE: a named pipe that only this user can open, and its connections.

Only `Listener.accept_port` and `Port.wait` block.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from math import ceil, inf
from typing import Any

from ..errors import StartFailed
from .base import PeerCredentials

# Bytes that a pipe buffers: a frame of up to this length is written without waiting.
_BUFFER = 64 * 1024
# Seconds of one wait, which takes milliseconds in 32 bits.
_MAX_WAIT = 1000.0
# winbase.h; _winapi lacks it.
_PIPE_REJECT_REMOTE_CLIENTS = 8

if sys.platform == "win32":
    import _winapi
    import ctypes
    from multiprocessing import connection as _stock

    from .windows import ERROR_IO_INCOMPLETE, FIRST_READ, open_pipe, size_of_rest

    FAMILY = "AF_PIPE"
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel32.CreateEventW.restype = ctypes.c_void_p

    # Private to multiprocessing.connection: how its listener creates and queues the instances of the pipe.
    if not {"_new_handle", "_handle_queue"} <= {*_stock.PipeListener.__init__.__code__.co_names}:  # type: ignore[attr-defined]
        raise ImportError("multiprocessing.connection.Listener of this Python keeps its pipes elsewhere")

    class Port:
        """A connection of a pump's thread, which can wait for a read, a write and a wake-up at once."""

        def __init__(self, handle: int) -> None:
            self._handle = handle
            # The uid is unknown: the pipe's access control list keeps other users out.
            pid = ctypes.c_ulong()
            known = _kernel32.GetNamedPipeClientProcessId(ctypes.c_void_p(handle), ctypes.byref(pid))
            self.peer = PeerCredentials(pid.value if known else None, None)
            self._reading: _winapi.Overlapped | None = None
            self._writing: _winapi.Overlapped | None = None
            self._event: int = _kernel32.CreateEventW(None, False, False, None)
            self._closed = False
            # A closed event must not be set: its handle may have been reused.
            self._lock = threading.Lock()
            self._aborted = False

        @property
        def is_writing(self) -> bool:
            """Whether the last chunk is not yet written."""
            return self._writing is not None

        def begin_write(self, chunk: bytes) -> None:
            """Start writing a chunk, which is a message. The previous one must be written. Raises `OSError`."""
            self._writing, _ = _winapi.WriteFile(self._handle, chunk, overlapped=True)
            self._finish_write()

        def _finish_write(self) -> None:
            if self._writing is not None and self._writing.GetOverlappedResult(False)[1] != ERROR_IO_INCOMPLETE:
                self._writing = None

        def wait(self, deadline: float, *, reading: bool, limit: int) -> bytes | None:
            """Wait for data, if `reading`, for the chunk to be written, or for `wake`, until `deadline`.

            Return one message, b"" at EOF, or None. Raises `MessageTooLarge` above `limit` bytes, and `OSError`.
            """
            try:
                if reading and self._reading is None:
                    self._reading, _ = _winapi.ReadFile(self._handle, FIRST_READ, overlapped=True)
                operations = [one.event for one in (self._reading if reading else None, self._writing) if one is not None]
                left = min(deadline - time.monotonic(), _MAX_WAIT)
                milliseconds = _winapi.INFINITE if deadline == inf else max(0, ceil(left * 1000))
                _winapi.WaitForMultipleObjects([*operations, self._event], False, milliseconds)
                if self._aborted:
                    return b""
                self._finish_write()
                return self._finish_read(limit) if reading else None
            except BrokenPipeError:
                return b""

        def _finish_read(self, limit: int) -> bytes | None:
            assert self._reading is not None
            _, error = self._reading.GetOverlappedResult(False)
            if error == ERROR_IO_INCOMPLETE:
                return None
            data = bytes(self._reading.getbuffer() or b"")
            self._reading = None
            if error == _winapi.ERROR_MORE_DATA:
                rest, _ = _winapi.ReadFile(self._handle, size_of_rest(self._handle, len(data), limit), overlapped=True)
                rest.GetOverlappedResult(True)
                data += bytes(rest.getbuffer() or b"")
            # An empty message is not EOF. Return invalid JSON instead, to be answered with an error.
            return data or b" "

        def wake(self) -> None:
            """End the current wait, or else the next one, from any thread."""
            with self._lock:
                if not self._closed:
                    _kernel32.SetEvent(ctypes.c_void_p(self._event))

        def abort(self) -> None:
            """End the connection; the pump notices and closes it."""
            self._aborted = True
            self.wake()

        def close(self) -> None:
            """Close the connection. The client can still read what was written. Idempotent."""
            with self._lock:
                closed, self._closed = self._closed, True
            if closed:
                return
            for operation in (self._reading, self._writing):
                if operation is not None:
                    # The system may write to the buffer until the operation is cancelled.
                    with contextlib.suppress(OSError):
                        operation.cancel()
                        operation.GetOverlappedResult(True)
            _winapi.CloseHandle(self._handle)
            _winapi.CloseHandle(self._event)

    class _PipeListener(_stock.PipeListener):  # type: ignore[name-defined,misc]
        """A pipe listener closed to other users, who may read from a pipe by default, and to other machines."""

        def __init__(self, address: str) -> None:
            import struct

            from .._windows_security import pipe_security_descriptor

            descriptor = ctypes.create_string_buffer(pipe_security_descriptor())
            # SECURITY_ATTRIBUTES: length, descriptor, not inherited.
            layout = struct.Struct("IPi0P")
            self._attributes = ctypes.create_string_buffer(layout.pack(layout.size, ctypes.addressof(descriptor), 0))
            self._security = ctypes.addressof(self._attributes)
            # Keeps the memory alive that the attributes point to.
            self._descriptor = descriptor
            self._order = threading.Lock()
            super().__init__(address)

        def accept(self) -> int:
            """Return the handle of the next connection. Thread-safe."""
            # A client gets the oldest free instance, which must be one that a thread waits on. So threads have to take
            # instances in the order in which they were created.
            with self._order:
                self._handle_queue.append(self._new_handle())
                handle: int = self._handle_queue.pop(0)
            try:
                overlapped = _winapi.ConnectNamedPipe(handle, overlapped=True)
                _winapi.WaitForMultipleObjects([overlapped.event], False, _winapi.INFINITE)
                overlapped.GetOverlappedResult(True)
            except OSError as error:
                # The client has already written and disconnected: its data can still be read.
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
                # Only the first: all instances share its security descriptor.
                from .._windows_security import check_pipe_security

                try:
                    check_pipe_security(handle)
                except BaseException:
                    _winapi.CloseHandle(handle)
                    raise
            return handle

    class Listener:
        """A named pipe that only this user can open. Several threads may accept at once, each on its own instance."""

        def __init__(self, address: str) -> None:
            """Create the pipe `address`. Raises `StartFailed`, also if others could open it."""
            self.address = address
            try:
                self._listener = _PipeListener(address)
            except OSError as error:
                raise StartFailed(f"the pipe {address} can't be created: {error.strerror}") from error

        def accept_port(self) -> Port:
            """Wait for a connection. Raises `OSError`."""
            return Port(self._listener.accept())

        def accept(self) -> Any:
            """Raise `BlockingIOError`: a pipe can't be accepted without waiting."""
            raise BlockingIOError("a pipe can't be accepted without waiting")

        accept_spare = accept

        def fileno(self) -> int:
            """Return -1: an event loop can't watch a pipe."""
            return -1

        def keep_spare(self) -> None:
            """Do nothing: handles are practically unlimited."""

        def wake(self) -> None:
            """Make one blocked accept return."""
            with contextlib.suppress(OSError):
                _winapi.CloseHandle(open_pipe(self.address))

        def close(self) -> None:
            """Close the pipe. No accept may be blocked: see `wake`."""
            with contextlib.suppress(OSError):
                self._listener.close()

    def lacking_descriptors() -> str | None:
        """Return None: handles are practically unlimited."""
        return None

    def new_address(directory: str, generation: str) -> str:
        """Return the address of a new generation. `directory` is ignored: pipes are not in the file system."""
        return rf"\\.\pipe\harness-ipc-{generation}"
