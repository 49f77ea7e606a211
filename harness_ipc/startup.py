"""What a daemon that starts says to whoever started it: both ends of the pipe between them. It knows neither names nor records.

The starter passes the pipe's writing end and how it has detached the child on in an environment variable; `run_daemon` takes it
and says "ready", or why not. If the child dies first, the pipe's end says so: nobody has to guess or to poll.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    Word = dict[str, Any]

VARIABLE = "HARNESS_IPC_START"

if sys.platform == "win32":
    import msvcrt

    def spawn_kwargs() -> dict[str, Any]:
        """Return the arguments of `subprocess.Popen` that detach a child from our console, so that it outlives us.

        Not DETACHED_PROCESS: it overrides CREATE_NO_WINDOW, and each console program that the child runs pops a window up
        ("Process Creation Flags" in the Win32 documentation).
        """
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}

    def _popen(
        argv: Sequence[str], writer: int, start: dict[str, Any], environment: Mapping[str, str], options: dict[str, Any]
    ) -> Any:
        os.set_inheritable(writer, True)
        handle = msvcrt.get_osfhandle(writer)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        # A terminal's or an agent's job may end all its processes with itself, and may or may not let one go.
        for how, flag in (("breakaway", subprocess.CREATE_BREAKAWAY_FROM_JOB), ("job", 0)):
            detached = spawn_kwargs()
            detached["creationflags"] |= flag
            env = {**environment, VARIABLE: json.dumps({"fd": handle, "detached": how, **start})}
            try:
                return subprocess.Popen(argv, env=env, startupinfo=startup, close_fds=True, **detached, **options)
            except PermissionError:
                if not flag:
                    raise
        raise AssertionError("the second try returns or raises")

    def _inherited(handle: int) -> int:
        return msvcrt.open_osfhandle(handle, os.O_WRONLY)

else:

    def spawn_kwargs() -> dict[str, Any]:
        """Return the arguments of `subprocess.Popen` that detach a child from our session, so that it outlives us."""
        return {"start_new_session": True}

    def _popen(
        argv: Sequence[str], writer: int, start: dict[str, Any], environment: Mapping[str, str], options: dict[str, Any]
    ) -> Any:
        env = {**environment, VARIABLE: json.dumps({"fd": writer, "detached": "session", **start})}
        return subprocess.Popen(argv, env=env, pass_fds=(writer,), **spawn_kwargs(), **options)

    def _inherited(descriptor: int) -> int:
        os.set_inheritable(descriptor, False)
        return descriptor


class Child:
    """A detached child, and what it says. Its standard input and output are the null device."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        places: dict[str, str],
        environment: Mapping[str, str],
        cwd: str | None,
        stderr: int,
    ) -> None:
        """Start it, and tell it its "runtime_dir" and "log_dir". Raises `OSError`."""
        reader, writer = os.pipe()
        try:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr, "cwd": cwd}
            self.process: subprocess.Popen[bytes] = _popen(argv, writer, places, environment, options)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._words: queue.SimpleQueue[Word | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(reader,), name="harness-ipc-starter", daemon=True).start()

    def next_word(self, timeout: float) -> Word | None:
        """Return what the child says next, or None when it will say nothing more. Raises `TimeoutError` after seconds."""
        try:
            return self._words.get(timeout=min(timeout, threading.TIMEOUT_MAX))
        except queue.Empty:
            raise TimeoutError from None

    def _listen(self, reader: int) -> None:
        with open(reader, "rb") as pipe:
            for line in pipe:
                with contextlib.suppress(ValueError):
                    self._words.put(json.loads(line))
        self._words.put(None)
        # A child that ends while we live on must not stay behind as a zombie.
        self.process.wait()


class Report:
    """The child's end. It says nothing if nobody listens."""

    def __init__(self, descriptor: int | None, start: dict[str, Any]) -> None:
        self._descriptor = descriptor
        self.detached: str | None = start.get("detached")
        self.places = {key: start[key] for key in ("runtime_dir", "log_dir") if key in start}

    def send(self, **word: Any) -> None:
        """Say one word. A starter that has gone meanwhile does not matter."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, json.dumps(word).encode() + b"\n")

    def close(self) -> None:
        """Say nothing more."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def reporting() -> Iterator[Report]:
    """Give the report to this process' starter, and tell it the error that ends the block, if one does."""
    # Taken out: what this process starts is not what was started.
    text = os.environ.pop(VARIABLE, "")
    report = Report(None, {})
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        start = json.loads(text)
        report = Report(_inherited(start["fd"]), start)
        if isinstance(sys.stderr, io.TextIOWrapper):
            # It goes into the log, which is in UTF-8 whatever the system's code page is.
            sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        yield report
    except Exception as error:
        report.send(state="failed", type=type(error).__name__, message=str(error))
        raise
    finally:
        report.close()
