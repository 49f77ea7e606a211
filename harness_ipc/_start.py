"""Starts a daemon's process and waits for its result, with the log as a source of errors."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from typing import TYPE_CHECKING

from . import startup
from ._descriptors import open_standard_streams
from ._registry import files, records
from ._registry.namespace import log_path
from ._status import STATUS_TIMEOUT, probe, sleep_until_retry
from ._transport import deadline_after
from .errors import AlreadyRunning, HarnessIPCError, StartFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._command import Command
    from ._registry.namespace import Namespace

# Seconds for a child that has reported its failure to print its traceback and exit.
_EXIT_PERIOD = 2.0
# The `StartFailed.type` of a daemon that was stopped while starting.
TERMINATED = "SIGTERM"
_LOG_TAIL = 4096  # bytes
# Seconds between checks of the record of a child that sends no messages.
_CHECK_INTERVAL = 0.05
# Log lines that do not explain a failure: the banner of a start, and entries of level DEBUG or INFO.
_OWN_LINE = re.compile(r"--- |\d{4}-\d\d-\d\d \S+ (DEBUG|INFO) ")


class StartTimeout(Exception):
    """The timeout of a start has expired."""


class StartWait:
    """A wait of `timeout` seconds for the daemon `name` to start. Its progress is passed to `on_progress`."""

    def __init__(
        self, name: str, timeout: float, namespace: Namespace, on_progress: Callable[[Any], object] | None = None
    ) -> None:
        """Start the wait. Raises `ValueError` for an invalid timeout."""
        self.name = name
        self.namespace = namespace
        self.timeout = timeout
        self._deadline = deadline_after(timeout)
        self._on_progress = on_progress
        # The last progress passed on.
        self._last: Any = None
        # Whether the pipe carries progress: the record is not read then, since it may be older.
        self._pipe_has_progress = False

    def remaining(self) -> float:
        """Return the seconds left. Raises `StartTimeout` if there are none."""
        if (seconds := self._deadline - time.monotonic()) <= 0:
            raise StartTimeout
        return seconds

    def pause(self) -> None:
        """Wait until the next poll, and check the record for progress. Raises `StartTimeout`."""
        if not sleep_until_retry(self._deadline):
            raise StartTimeout
        progress = None
        if self._on_progress is not None and not self._pipe_has_progress:
            with contextlib.suppress(HarnessIPCError):
                progress = records.read(self.name, namespace=self.namespace).public().get("progress")
        self._pass_on(progress)

    def receive_progress(self, progress: Any) -> None:
        """Pass on progress that the child has sent."""
        self._pipe_has_progress = True
        self._pass_on(progress)

    def _pass_on(self, progress: Any) -> None:
        if self._on_progress is not None and progress not in (None, self._last):
            self._last = progress
            self._on_progress(progress)


def start(command: Command, wait: StartWait) -> bool:
    """Start the daemon and wait until it is ready. Return False if another process already has the name.

    Raises `StartFailed` and `StartTimeout`.
    """
    name, namespace = wait.name, wait.namespace
    log = str(log_path(name, namespace=namespace))
    child, offset = _spawn(command, log, namespace)
    try:
        message = _next_message(child, wait)
        state = message.get("state")
        if state == "published" or message.get("type") == AlreadyRunning.__name__:
            return state == "published"
        if state == "refused":
            raise _not_executable(command, OSError(message["errno"], os.strerror(message["errno"])))
        if state == "ended":
            ending, signal_name = _ending(message["status"])
            raise _start_failed(name, f"it {ending} before it was ready", log, offset, quote=True, type=signal_name)
        if state == "failed":
            # It may still be printing its traceback.
            _wait_for_exit(child)
            why, type_name, reason = (str(message.get(key, "")) for key in ("message", "type", "reason"))
            raise _start_failed(name, why, log, offset, type=type_name, reason=reason)
        if (place := (message.get("name"), message.get("directory"))) != (name, namespace.runtime_dir):
            child.process.terminate()
            _wait_for_exit(child)
            why = f"its command line starts the daemon {place[0]!r} in {place[1]}, not {name!r} in {namespace.runtime_dir}"
            raise _start_failed(name, f"{why}: give run_daemon this name, and no `namespace` or the same one", log, offset)
        return True
    finally:
        child.close()


def _spawn(command: Command, log: str, namespace: Namespace) -> tuple[startup.Child, int]:
    """Start the process. Return it and the offset of its output in the log. Raises `StartFailed`."""
    # The pipe to the child must not get the descriptor of a standard stream.
    open_standard_streams()
    descriptor = files.open_private_log(log)
    try:
        offset = os.fstat(descriptor).st_size
        try:
            banner = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {ascii(shlex.join(command.argv))[1:-1]}\n"
            os.write(descriptor, banner.encode())
        except OSError as error:
            raise files.log_failure(log, "written", error) from error
        start = {"runtime_dir": namespace.runtime_dir, "log_dir": namespace.log_dir, **command._asdict()}
        start["environment"] = sorted(command.environment)
        try:
            environment = {**os.environ, **command.environment}
            return startup.Child(command.argv, start=start, environment=environment, cwd=command.cwd, log=descriptor), offset
        except (OSError, ValueError) as error:
            raise _not_executable(command, error) from error
    finally:
        os.close(descriptor)


def _next_message(child: startup.Child, wait: StartWait) -> startup.StartMessage:
    """Return the child's next message other than progress, which is passed on.

    For a child that sends none, return the state "published" once its record is ready, or "ended" with its "status". Raises
    `StartTimeout`.
    """
    while True:
        ended = child.process.poll() is not None
        message = child.next_message(min(_CHECK_INTERVAL, wait.remaining()))
        if message is not None and message.get("state") == "progress":
            wait.receive_progress(message.get("value"))
            continue
        if message is not None:
            return message
        # The program, or a wrapper, may have closed the pipe.
        if probe(wait.name, STATUS_TIMEOUT, wait.namespace, health=False)[0].alive:
            return {"state": "published"}
        # A program that has daemonized itself has exited with 0 and left a descendant.
        if ended and not (child.process.returncode == 0 and child.has_descendants()):
            return {"state": "ended", "status": child.process.returncode}
        wait.pause()


def _wait_for_exit(child: startup.Child) -> None:
    deadline = deadline_after(_EXIT_PERIOD)
    while child.process.poll() is None and sleep_until_retry(deadline):
        pass


def _ending(status: int) -> tuple[str, str]:
    """Return how a process with the `returncode` `status` ended, and the name of the signal that ended it, or ""."""
    if sys.platform == "win32" and status == signal.SIGTERM:
        return f"ended with status {status}", TERMINATED  # by `stop_daemon`
    if status >= 0:
        return f"ended with status {status}", ""
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}", name


def _not_executable(command: Command, error: Exception) -> StartFailed:
    text = error.strerror if isinstance(error, OSError) else error
    return StartFailed(f"{command.argv[0]!a} can't be started: {text}; check the command and the directory {command.cwd}")


def _start_failed(
    name: str, why: str, log: str, offset: int, *, quote: bool = False, type: str = "", reason: str = ""
) -> StartFailed:
    """Return the error. With `quote`, it includes the last line that the program has printed."""
    tail = ""
    with contextlib.suppress(OSError), files.open_log_for_reading(log) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LOG_TAIL, offset if offset < size else 0))
        tail = file.read().decode("utf-8", "backslashreplace")
    # Only lines that the program printed.
    lines = [line for line in tail.splitlines() if line.strip() and not _OWN_LINE.match(line)]
    if quote and lines:
        reason = lines[-1].strip()
        why = f"{why} ({ascii(reason)[1:-1]})"
    text = f"the daemon {name!r} did not start: {' '.join(why.split())}; see its log {log}"
    return StartFailed(text, log_tail=tail, type=type, reason=reason)
