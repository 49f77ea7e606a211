"""What a starting daemon says to its starter: both ends of the pipe between them. It knows neither names nor records.

The starter passes the pipe's writing end in an environment variable, with what the daemon must know of its start; `run_daemon`
takes it and says "ready", or why not. Nothing here depends on that: programs close what they inherit, so the starter looks for
the daemon's record too.
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
# Seconds for a starter to read what came before.
_SEND_PERIOD = 1.0
# Seconds for our launcher to end after it was told to. It has nothing left to do.
_RELEASE_PERIOD = 2.0


def spawn_kwargs() -> dict[str, Any]:
    """Return the arguments of `subprocess.Popen` that detach a child from our session or console, so that it outlives us."""
    if sys.platform == "win32":
        # Not DETACHED_PROCESS: it overrides CREATE_NO_WINDOW, and each console program that the child runs pops a window up
        # ("Process Creation Flags" in the Win32 documentation).
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


if sys.platform == "win32":
    import msvcrt

    def _popen(
        argv: Sequence[str], writer: int, leash: int, start: dict[str, Any], env: Mapping[str, str], options: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        os.set_inheritable(writer, True)
        handle = msvcrt.get_osfhandle(writer)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        # A terminal's or an agent's job may end all its processes with itself, and may or may not let one go.
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
        """Return what is there within `timeout` seconds, b"" at the end, or None."""
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

    def _is_ours(descriptor: int, start: dict[str, Any]) -> bool:
        """Return whether `descriptor` is of a pipe that the starter made."""
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
        argv: Sequence[str], writer: int, leash: int, start: dict[str, Any], env: Mapping[str, str], options: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        # A frozen application's executable is itself: no interpreter that runs our launcher.
        if sys.executable and not getattr(sys, "frozen", False):
            launcher = os.path.join(os.path.dirname(__file__), "_launcher.py")
            argv = [sys.executable, "-I", "-S", launcher, str(writer), *argv]
            options["stdin"] = leash
        text = json.dumps({"fd": writer, "inode": os.fstat(writer).st_ino, "detached": "session", **start})
        return subprocess.Popen(argv, env={**env, VARIABLE: text}, pass_fds=(writer,), **spawn_kwargs(), **options)

    def _read(reader: int, timeout: float) -> bytes | None:
        """Return what is there within `timeout` seconds, b"" at the end, or None."""
        import selectors

        # Not select.poll: eventlet removes it.
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            return os.read(reader, 65536) if selector.select(timeout) else None

    def _open_inherited(start: dict[str, Any]) -> int:
        return int(start["fd"])

    def _is_ours(descriptor: int, start: dict[str, Any]) -> bool:
        """Return whether `descriptor` is of the FIFO with the inode that the starter names."""
        try:
            found = os.fstat(descriptor)
        except (OSError, OverflowError):
            return False
        return stat.S_ISFIFO(found.st_mode) and found.st_ino == start["inode"]


class Child:
    """A detached child, and its messages. On POSIX `process` is our launcher, which ends as the child does."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        start: dict[str, Any],
        environment: Mapping[str, str],
        cwd: str | None,
        log: int,
    ) -> None:
        """Start it, and tell it `start`: what `ReadyPipe.start` says. Raises `OSError`."""
        self._id = os.urandom(8).hex()
        self._data = b""
        self._reader, writer = os.pipe()
        leash, self._leash = os.pipe()
        try:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": cwd}
            self.process = _popen(argv, writer, leash, {**start, "id": self._id}, environment, options)
        except BaseException:
            os.close(self._reader)
            os.close(self._leash)
            raise
        finally:
            os.close(writer)
            os.close(leash)

    def next_message(self, timeout: float) -> StartMessage | None:
        """Return the next message if there is one within `timeout` seconds; after the last, None at once."""
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
        """Return whether a process that the child started runs, seen by its environment."""
        import psutil

        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self._id in process.environ().get(VARIABLE, ""):
                    return True
        return False

    def close(self) -> None:
        """Let the child go. Waits for our launcher, which leaves no zombie, and not for the child."""
        os.close(self._reader)
        os.close(self._leash)
        deadline = time.monotonic() + (_RELEASE_PERIOD if os.name == "posix" else 0.0)
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        # It goes on by itself: no ResourceWarning.
        self.process.returncode = self.process.returncode or 0


class ReadyPipe:
    """The child's end. Writes nothing where nobody listens. `start` is what the starter said, or empty.

    It has "runtime_dir" and "log_dir"; "argv" and "cwd", which start this daemon, and "leaves_cwd"; "environment", the names
    of the variables that the starter added; and "detached".
    """

    def __init__(self, text: str) -> None:
        self.start: dict[str, Any] = {}
        self._descriptor: int | None = None
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
            self.start = dict(json.loads(text))
            descriptor = _open_inherited(self.start)
            if _is_ours(descriptor, self.start):
                os.set_inheritable(descriptor, False)
                self._descriptor = descriptor
                if sys.platform != "win32":
                    os.set_blocking(descriptor, False)
        close_in_child(self)

    def leave_directory(self) -> None:
        """Leave the directory of the start unless it was asked for: it may be removed. Modules are still found there."""
        if self.start:
            with contextlib.suppress(OSError):
                sys.path[:] = [os.path.abspath(entry) for entry in sys.path]
        if self.start.get("leaves_cwd"):
            os.chdir(os.environ.get("SYSTEMROOT", "C:\\") if sys.platform == "win32" else "/")

    def send(self, **message: Any) -> None:
        """Send one message. A starter that has gone, or does not read, does not matter: it also looks for the record."""
        self._write(message, _SEND_PERIOD)

    def send_progress(self, value: Any) -> None:
        """Send what the app reports, if there is room for it; on Windows, where a write blocks, leave it to the record."""
        if sys.platform != "win32":
            self._write({"state": "progress", "value": value}, 0.0)

    def _write(self, message: StartMessage, period: float) -> None:
        """Write a message; wait at most `period` seconds for room each time that there is none."""
        if self._descriptor is None or not _is_ours(self._descriptor, self.start):
            return
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        deadline = time.monotonic() + period
        with contextlib.suppress(OSError):
            while data:
                try:
                    written = os.write(self._descriptor, data)
                except BlockingIOError:
                    written = 0
                if written:
                    data = data[written:]
                    deadline = time.monotonic() + period
                elif time.monotonic() < deadline:
                    time.sleep(0.005)
                else:
                    return

    def close(self) -> None:
        """Send nothing more."""
        descriptor, self._descriptor = self._descriptor, None
        # The program may have closed what it did not open, and have opened another file meanwhile.
        if descriptor is not None and _is_ours(descriptor, self.start):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    close_inherited = close


@contextlib.contextmanager
def reporting() -> Iterator[ReadyPipe]:
    """Give the pipe to this process' starter, and tell it the error that ends the block, if one does."""
    # Removed: the children of this process were not started by our starter.
    pipe = ReadyPipe(os.environ.pop(VARIABLE, ""))
    try:
        yield pipe
    except Exception as error:
        # A StartFailed knows the error that it stands for.
        kind = getattr(error, "type", "") or type(error).__name__
        reason = getattr(error, "reason", "") or getattr(error, "message", "") or str(error)
        pipe.send(state="failed", message=str(error), type=kind, reason=reason)
        raise
    finally:
        pipe.close()
