"""The ready pipe: how a starting daemon reports to its starter.

An environment variable names the writing end of the pipe and describes the start. `run_daemon` sends progress, "ready" or the
error. The pipe may be missing, since programs may close inherited descriptors: the starter also watches for the record.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

from ._descriptors import close_in_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    StartMessage = dict[str, Any]

VARIABLE = "HARNESS_IPC_START"
# Seconds for the launcher to end after it was released.
_RELEASE_PERIOD = 2.0


def spawn_kwargs() -> dict[str, Any]:
    """Return arguments of `subprocess.Popen` that detach a child from this process's session or console: it outlives them."""
    if sys.platform == "win32":
        # Not DETACHED_PROCESS: it overrides CREATE_NO_WINDOW, and each console program that the child runs would open a window
        # ("Process Creation Flags" in the Win32 documentation).
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


if sys.platform == "win32":
    import msvcrt

    def _popen(
        argv: Sequence[str], writer: int, stdin: int, start: dict[str, Any], env: Mapping[str, str], options: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        os.set_inheritable(writer, True)
        handle = msvcrt.get_osfhandle(writer)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        # A job object of a terminal or an agent may kill its processes when it is closed, and may forbid a breakaway.
        for how, flag in (("breakaway", subprocess.CREATE_BREAKAWAY_FROM_JOB), ("job", 0)):
            detached = spawn_kwargs()
            detached["creationflags"] |= flag
            text = json.dumps({"handle": handle, "starter": os.getpid(), "detached": how, **start})
            options |= {"env": {**env, VARIABLE: text}, "stdin": subprocess.DEVNULL}
            try:
                return subprocess.Popen(argv, startupinfo=startup, close_fds=True, **detached, **options)
            except PermissionError:
                if not flag:
                    raise
        raise AssertionError("the second try returns or raises")

    def _read(reader: int, timeout: float) -> bytes | None:
        """Return data that arrives within `timeout` seconds, b"" at EOF, or None."""
        import _winapi

        deadline = time.monotonic() + timeout
        while True:
            try:
                if _winapi.PeekNamedPipe(msvcrt.get_osfhandle(reader), 0)[0]:
                    return os.read(reader, 65536)
            except BrokenPipeError:
                return b""
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.005)

    def _open_inherited(start: dict[str, Any]) -> int:
        return msvcrt.open_osfhandle(start["handle"], os.O_WRONLY)

    def _is_ready_pipe(descriptor: int, start: dict[str, Any]) -> bool:
        """Return whether `descriptor` is the pipe of the starter."""
        import ctypes

        pid = ctypes.c_ulong()
        try:
            handle = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor))
        except OSError:
            return False
        get_pid = ctypes.WinDLL("kernel32").GetNamedPipeServerProcessId
        return bool(get_pid(handle, ctypes.byref(pid))) and pid.value == start["starter"]

else:
    import stat

    def _popen(
        argv: Sequence[str], writer: int, stdin: int, start: dict[str, Any], env: Mapping[str, str], options: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        # The executable of a frozen application can't run the launcher.
        if sys.executable and not getattr(sys, "frozen", False):
            launcher = os.path.join(os.path.dirname(__file__), "_launcher.py")
            argv = [sys.executable, "-I", "-S", launcher, str(writer), *argv]
            options["stdin"] = stdin
        text = json.dumps({"fd": writer, "inode": os.fstat(writer).st_ino, "detached": "session", **start})
        return subprocess.Popen(argv, env={**env, VARIABLE: text}, pass_fds=(writer,), **spawn_kwargs(), **options)

    def _read(reader: int, timeout: float) -> bytes | None:
        """Return data that arrives within `timeout` seconds, b"" at EOF, or None."""
        import selectors

        # Not select.poll: eventlet removes it.
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            return os.read(reader, 65536) if selector.select(timeout) else None

    def _open_inherited(start: dict[str, Any]) -> int:
        return int(start["fd"])

    def _is_ready_pipe(descriptor: int, start: dict[str, Any]) -> bool:
        """Return whether `descriptor` is the pipe with the inode given by the starter."""
        try:
            found = os.fstat(descriptor)
        except (OSError, OverflowError):
            return False
        return stat.S_ISFIFO(found.st_mode) and found.st_ino == start["inode"]


class Child:
    """A detached child and its messages. On POSIX, `process` is the launcher, which exits like the child."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        start: dict[str, Any],
        environment: Mapping[str, str],
        cwd: str | None,
        log: int,
    ) -> None:
        """Start the child, which receives `start` as `ReadyPipe.start`. Raises `OSError`."""
        self._id = os.urandom(8).hex()
        self._data = b""
        self._reader, writer = os.pipe()
        # The launcher exits at EOF on its standard input.
        launcher_stdin, self._launcher_stdin = os.pipe()
        try:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": cwd}
            self.process = _popen(argv, writer, launcher_stdin, {**start, "id": self._id}, environment, options)
        except BaseException:
            os.close(self._reader)
            os.close(self._launcher_stdin)
            raise
        finally:
            os.close(writer)
            os.close(launcher_stdin)

    def next_message(self, timeout: float) -> StartMessage | None:
        """Return the next message, or None after `timeout` seconds. At EOF, return None at once."""
        deadline = time.monotonic() + timeout
        while True:
            line, end, rest = self._data.partition(b"\n")
            if end:
                self._data = rest
                with contextlib.suppress(ValueError, TypeError):
                    return dict(json.loads(line))
            elif data := _read(self._reader, max(0.0, deadline - time.monotonic())):
                self._data += data
            else:
                return None

    def has_descendants(self) -> bool:
        """Return whether a descendant of the child runs, identified by its environment."""
        import psutil

        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self._id in process.environ().get(VARIABLE, ""):
                    return True
        return False

    def close(self) -> None:
        """Release the child: wait for the launcher, to leave no zombie, but not for the child."""
        os.close(self._reader)
        os.close(self._launcher_stdin)
        deadline = time.monotonic() + (_RELEASE_PERIOD if os.name == "posix" else 0.0)
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        # Avoid the ResourceWarning of Popen: the child keeps running.
        self.process.returncode = self.process.returncode or 0


class ReadyPipe:
    """The child's end of the pipe. Without a starter, sending does nothing. `start` describes the start, or is empty.

    Its keys: "runtime_dir", "log_dir"; "argv", "cwd" and "leaves_cwd" of the start; "environment", the names of the variables
    that the starter added; and "detached". `send_timeout`: seconds for the starter to make room in a full pipe.
    """

    def __init__(self, text: str, *, send_timeout: float = 1.0) -> None:
        self.start: dict[str, Any] = {}
        self._send_timeout = send_timeout
        self._descriptor: int | None = None
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
            self.start = dict(json.loads(text))
            descriptor = _open_inherited(self.start)
            if _is_ready_pipe(descriptor, self.start):
                os.set_inheritable(descriptor, False)
                self._descriptor = descriptor
                if sys.platform != "win32":
                    os.set_blocking(descriptor, False)
        close_in_child(self)

    def leave_directory(self) -> None:
        """Make `sys.path` absolute; then change to ``/``, unless `cwd` was given: the directory may be removed later."""
        if self.start:
            with contextlib.suppress(OSError):
                sys.path[:] = [os.path.abspath(entry) for entry in sys.path]
        if self.start.get("leaves_cwd"):
            os.chdir(os.environ.get("SYSTEMROOT", "C:\\") if sys.platform == "win32" else "/")

    def send(self, **message: Any) -> None:
        """Send one message. Errors are ignored: the starter also watches for the record."""
        self._write(message, self._send_timeout)

    def send_progress(self, value: Any) -> None:
        """Send progress if the pipe has room. Not on Windows, where a write would block: the record has it too."""
        if sys.platform != "win32":
            self._write({"state": "progress", "value": value}, 0.0)

    def _write(self, message: StartMessage, timeout: float) -> None:
        """Write a message; give up if the pipe is full for `timeout` seconds."""
        if self._descriptor is None or not _is_ready_pipe(self._descriptor, self.start):
            return
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        deadline = time.monotonic() + timeout
        with contextlib.suppress(OSError):
            while data:
                try:
                    written = os.write(self._descriptor, data)
                except BlockingIOError:
                    written = 0
                if written:
                    data = data[written:]
                    deadline = time.monotonic() + timeout
                elif time.monotonic() < deadline:
                    time.sleep(0.005)
                else:
                    return

    def close(self) -> None:
        """Close the pipe."""
        descriptor, self._descriptor = self._descriptor, None
        # The program may have closed the descriptor, and opened another file with the same number.
        if descriptor is not None and _is_ready_pipe(descriptor, self.start):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    close_inherited = close


@contextlib.contextmanager
def reporting() -> Iterator[ReadyPipe]:
    """Yield the pipe to the starter of this process. If the block raises, send the error."""
    # Removed from the environment: it must not be inherited by children.
    pipe = ReadyPipe(os.environ.pop(VARIABLE, ""))
    try:
        yield pipe
    except Exception as error:
        # A StartFailed has the type and reason of the original error.
        kind = getattr(error, "type", "") or type(error).__name__
        reason = getattr(error, "reason", "") or getattr(error, "message", "") or str(error)
        pipe.send(state="failed", message=str(error), type=kind, reason=reason)
        raise
    finally:
        pipe.close()
