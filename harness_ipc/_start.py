"""A daemon's start command, and one start by it: its process, and what it or its log says of how that went."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from . import startup
from ._descriptors import open_standard_streams
from ._registry import files
from ._registry.namespace import log_path
from ._status import STATUS_TIMEOUT, probe, sleep_until_retry
from ._transport import deadline_after
from .errors import AlreadyRunning, StartFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ._registry.namespace import Namespace
    from ._registry.records import Record

# "package.module:app", as `harness-ipc serve` takes it. What is imported, perhaps from the current directory.
_APP = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_MODULE = re.compile(rf"-m|{_APP.pattern}")
# Options of CPython whose value is the next word (`python --help`).
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
# Exits with 3 if there is no such module. `-m` looks in the current directory first, `serve` last.
_FIND_MODULE = """
import importlib.util, sys
sys.path.insert(0 if sys.argv[2] == "module" else len(sys.path), "")
try:
    found = importlib.util.find_spec(sys.argv[1])
except ModuleNotFoundError:
    found = None
sys.exit(3 if found is None else 0)
"""
# Seconds for an interpreter to find a module, whose packages it has to import; and for a child that has said why it fails to
# print its traceback and end.
_FIND_PERIOD = 10.0
_EXIT_PERIOD = 2.0
# Bytes.
_LOG_TAIL = 4096
# Seconds between two looks for the record of a child that says nothing.
_LOOK_INTERVAL = 0.05
# The line before each start, and entries of the log that tell of no fault.
_OWN_LINE = re.compile(r"--- |\d{4}-\d\d-\d\d \S+ (DEBUG|INFO) ")


def app_argv(name: str, app: str) -> list[str]:
    """Return the command line of a process that serves `app`, "package.module:app", as the daemon `name`."""
    # -P: `python -m` would import our own modules from the current directory first.
    return [sys.executable, "-P", "-m", __package__, "serve", app, f"--name={name}"]


class Command(NamedTuple):
    """How a daemon is started. `cwd` is None where that was removed; with `leaves_cwd` the daemon does not stay there."""

    argv: list[str]
    cwd: str | None
    environment: Mapping[str, str]
    leaves_cwd: bool

    @classmethod
    def make(
        cls,
        name: str,
        argv: str | Sequence[str | os.PathLike[str]],
        cwd: str | os.PathLike[str] | None,
        environment: Mapping[str, str] | None,
    ) -> Command:
        """Return the command of `ensure_daemon`'s arguments. Raises `TypeError` and `ValueError`, which say what to write."""
        if isinstance(argv, str) and _APP.fullmatch(argv):
            argv = app_argv(name, argv)
        if isinstance(argv, (str, bytes, os.PathLike)):
            raise TypeError(
                f"argv must be a list of words or 'package.module:app', not {argv!r}: write [sys.executable, '-m', 'package'], "
                "or use shlex.split"
            )
        words = [os.fsdecode(word) for word in argv]
        if not words:
            raise ValueError("argv is empty: write a program and its arguments, as [sys.executable, '-m', 'package']")
        added = {os.fsdecode(name): os.fsdecode(value) for name, value in (environment or {}).items()}
        directory = None
        with contextlib.suppress(OSError):
            directory = os.path.abspath(os.getcwd() if cwd is None else cwd)
        return cls(words, directory, added, cwd is None)

    @classmethod
    def of(cls, record: Record) -> Command:
        """Return the command that started the daemon of `record`."""
        fields = record.public()
        return cls(fields["argv"], fields.get("cwd"), record.environment, bool(fields.get("leaves_cwd")))

    def find_program(self, word: str) -> str | None:
        """Return the path of the program `word`, or None if there is none that can be executed."""
        if os.path.dirname(word):
            word = os.path.join(self.cwd or "", word)
        return shutil.which(word, path=self.environment.get("PATH", os.environ.get("PATH")))

    def find_obstacle(self) -> str | None:
        """Return why a daemon can't be started, as far as that can be told without running its program, or None."""
        if self.cwd is not None and not (os.path.isdir(self.cwd) and os.access(self.cwd, os.X_OK)):
            return f"its directory {self.cwd} is gone"
        program = self.find_program(self.argv[0])
        if program is None:
            return f"its program {self.argv[0]!a} is gone or can't be executed"
        interpreter = _interpreter(program)
        if interpreter is not None and self.find_program(interpreter) is None:
            return f"the interpreter {interpreter!a} of its program {program!a} is gone"
        kind, target = _python_target(self.argv)
        if kind == "script" and not os.path.exists(os.path.join(self.cwd or "", target)):
            return f"its script {target!a} is gone"
        if kind in ("module", "app") and not self._has_module(program, target, kind):
            return f"its module {target!a} is gone"
        return None

    def _has_module(self, python: str, module: str, kind: str) -> bool:
        argv = [python, "-P", "-c", _FIND_MODULE, module, kind]
        environment = {**os.environ, **self.environment}
        try:
            done = subprocess.run(argv, cwd=self.cwd, env=environment, capture_output=True, timeout=_FIND_PERIOD)
        except (OSError, subprocess.SubprocessError):
            return True  # unknown: the start will tell
        return done.returncode != 3

    def find_differences(self, wanted: Command) -> Iterator[str]:
        """Yield how interpreter, command line, directory and added environment differ from those that are wanted."""
        program, *words = self._absolute_words()
        wanted_program, *wanted_words = wanted._absolute_words()
        if program != wanted_program:
            yield f"it was started by {program}, not by {wanted_program}"
        if words != wanted_words:
            yield f"its command line is {shlex.join(self.argv)}"
        elif self.cwd != wanted.cwd and any(map(_MODULE.fullmatch, words)):
            yield f"its directory is {self.cwd}, not {wanted.cwd}"
        if names := {name for name, _ in self.environment.items() ^ wanted.environment.items()}:
            yield f"it was started with other values of {', '.join(sorted(names))}"

    def _absolute_words(self) -> list[str]:
        """Return the words, of which those that name a file are absolute."""
        program, *words = self.argv
        if not os.path.dirname(program):
            program = self.find_program(program) or program
        paths = [os.path.normpath(os.path.join(self.cwd or "", word)) for word in (program, *words)]
        return [path if os.path.isfile(path) else word for path, word in zip(paths, self.argv, strict=True)]


def _interpreter(program: str) -> str | None:
    """Return the interpreter that the first line of a script names. Windows has none."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError), open(program, "rb") as file:
            line = file.readline(256)
            if line.startswith(b"#!") and (words := os.fsdecode(line[2:]).split()):
                return words[0]
    return None


def _python_target(argv: Sequence[str]) -> tuple[str, str]:
    """Return the "script", "module" or module of an "app" that an interpreter is to run, and its name; else two empty texts."""
    words = iter(argv[1:] if os.path.basename(argv[0]).lower().startswith("python") else ())
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif word == "-m":
            module = next(words, "")
            apps = [word.partition(":")[0] for word in words if module == __package__ and _APP.fullmatch(word)]
            return ("app", apps[0]) if apps else ("module", module)
        elif not word.startswith("-"):
            return "script", word
        elif word == "-" or (not word.startswith("--") and set(word) & {"c", "m"}):
            break
    return "", ""


class StartTimeout(Exception):
    """The deadline of a start has passed."""


def wait_until_retry(deadline: float) -> None:
    """Wait a moment for what nothing announces. Raises `StartTimeout`."""
    if not sleep_until_retry(deadline):
        raise StartTimeout


def start(name: str, command: Command, deadline: float, namespace: Namespace) -> bool:
    """Start the daemon and wait until it is ready. Return False if another process already has the name.

    Raises `StartFailed` and `StartTimeout`.
    """
    log = str(log_path(name, namespace=namespace))
    child, offset = _spawn(command, log, namespace)
    try:
        message = _next_message(name, child, deadline, namespace)
        state = message.get("state")
        if state == "published" or message.get("type") == AlreadyRunning.__name__:
            return state == "published"
        if state == "refused":
            raise _not_executable(command, OSError(message["errno"], os.strerror(message["errno"])))
        if state == "ended":
            raise _start_failed(name, f"it {_ending(message['status'])} before it was ready", log, offset, quote=True)
        if state == "failed":
            # It has yet to print its traceback.
            _wait_for_exit(child)
            why, type_name, reason = (str(message.get(key, "")) for key in ("message", "type", "reason"))
            raise _start_failed(name, why, log, offset, type=type_name, reason=reason)
        if (place := (message.get("name"), message.get("directory"))) != (name, namespace.runtime_dir):
            child.process.terminate()
            _wait_for_exit(child)
            raise _start_failed(name, f"its command line starts the daemon {place[0]!r} in {place[1]}", log, offset)
        return True
    finally:
        child.close()


def _spawn(command: Command, log: str, namespace: Namespace) -> tuple[startup.Child, int]:
    """Start the process, and return it and where in the log its words begin. Raises `StartFailed`."""
    # A pipe to the child must not get the number of a stream.
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


def _next_message(name: str, child: startup.Child, deadline: float, namespace: Namespace) -> startup.StartMessage:
    """Return the child's first message, or what is seen of one that sends none: "published", or "ended" with its "status".

    Raises `StartTimeout`.
    """
    while True:
        ended = child.process.poll() is not None
        if (message := child.next_message(min(_LOOK_INTERVAL, deadline - time.monotonic()))) is not None:
            return message
        # A program that closed what it inherited, or whose wrapper did.
        if probe(name, STATUS_TIMEOUT, namespace, health=False)[0].alive:
            return {"state": "published"}
        # One that made itself a daemon has ended well, and has left the process that will be it.
        if ended and not (child.process.returncode == 0 and child.has_descendants()):
            return {"state": "ended", "status": child.process.returncode}
        wait_until_retry(deadline)


def _wait_for_exit(child: startup.Child) -> None:
    deadline = deadline_after(_EXIT_PERIOD)
    while child.process.poll() is None and sleep_until_retry(deadline):
        pass


def _ending(status: int) -> str:
    """Return how a process ended that has this `returncode`."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _not_executable(command: Command, error: Exception) -> StartFailed:
    text = error.strerror if isinstance(error, OSError) else error
    return StartFailed(f"{command.argv[0]!a} can't be started: {text}; check the command and the directory {command.cwd}")


def _start_failed(
    name: str, why: str, log: str, offset: int, *, quote: bool = False, type: str = "", reason: str = ""
) -> StartFailed:
    """Return the error. `quote` the last line of the log too: there a program that just dies says why."""
    tail = ""
    with contextlib.suppress(OSError), files.open_log_for_reading(log) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LOG_TAIL, offset if offset < size else 0))
        tail = file.read().decode("utf-8", "backslashreplace")
    # What it printed last, not what we logged.
    lines = [line for line in tail.splitlines() if line.strip() and not _OWN_LINE.match(line)]
    if quote and lines:
        reason = lines[-1].strip()
        why = f"{why} ({ascii(reason)[1:-1]})"
    text = f"the daemon {name!r} did not start: {' '.join(why.split())}; see its log {log}"
    return StartFailed(text, log_tail=tail, type=type, reason=reason)
