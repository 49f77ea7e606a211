"""A daemon's start command: from arguments or a record, whether it can be run, and how two of them differ."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ._registry.records import Record

# "package.module:app", as `harness-ipc serve` takes it.
_APP = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_MODULE = re.compile(rf"-m|{_APP.pattern}")
# Options of CPython whose value is the next word (`python --help`).
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
# Exits with 3 if there is no such module. `-m` searches the current directory first, `serve` last.
_FIND_MODULE = """
import importlib.util, sys
sys.path.insert(0 if sys.argv[2] == "module" else len(sys.path), "")
try:
    found = importlib.util.find_spec(sys.argv[1])
except ModuleNotFoundError:
    found = None
sys.exit(3 if found is None else 0)
"""
# Seconds for an interpreter to find a module, which imports its parent packages.
_FIND_PERIOD = 10.0


def app_argv(name: str, app: str) -> list[str]:
    """Return the command line of a process that serves `app`, "package.module:app", as the daemon `name`."""
    # -P: otherwise a file in the current directory could shadow this package.
    return [sys.executable, "-P", "-m", __package__, "serve", app, f"--name={name}"]


class Command(NamedTuple):
    """How a daemon is started. `cwd` is None if it was removed; with `leaves_cwd` the daemon changes to another directory."""

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
        """Return the command for the arguments of `ensure_daemon`. Raises `TypeError` and `ValueError`."""
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
        """Return the path of the executable `word`, or None if there is none."""
        if os.path.dirname(word):
            word = os.path.join(self.cwd or "", word)
        return shutil.which(word, path=self.environment.get("PATH", os.environ.get("PATH")))

    def find_obstacle(self) -> str | None:
        """Return why the program can't be run, without running it, or None."""
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
            return True  # unknown: leave it to the start
        return done.returncode != 3

    def find_differences(self, wanted: Command) -> Iterator[str]:
        """Yield how interpreter, command line, directory and added environment differ from those of `wanted`."""
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
        """Return the words, with those that name a file made absolute."""
        program, *words = self.argv
        if not os.path.dirname(program):
            program = self.find_program(program) or program
        paths = [os.path.normpath(os.path.join(self.cwd or "", word)) for word in (program, *words)]
        return [path if os.path.isfile(path) else word for path, word in zip(paths, self.argv, strict=True)]


def _interpreter(program: str) -> str | None:
    """Return the interpreter named in the first line of a script; None on Windows."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError), open(program, "rb") as file:
            line = file.readline(256)
            if line.startswith(b"#!") and (words := os.fsdecode(line[2:]).split()):
                return words[0]
    return None


def _python_target(argv: Sequence[str]) -> tuple[str, str]:
    """Return what an interpreter runs: its kind ("script", "module" or "app") and name; two empty strings if neither."""
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
