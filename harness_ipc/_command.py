"""A daemon's start command: its words, its directory and the environment that is added. It starts nothing."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ._registry.records import Record

# What is imported, perhaps from the current directory.
_MODULE = re.compile(r"-m|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# Options of CPython whose value is the next word (`python --help`).
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


class Command(NamedTuple):
    """How a daemon is started. `cwd` is None where that was removed; with `leaves_cwd` the daemon does not stay there."""

    argv: list[str]
    cwd: str | None
    environment: dict[str, str]
    leaves_cwd: bool

    @classmethod
    def make(
        cls, argv: Sequence[str | os.PathLike[str]], cwd: str | os.PathLike[str] | None, environment: Mapping[str, str] | None
    ) -> Command:
        """Return the command of `ensure_daemon`'s arguments. Raises `TypeError` and `ValueError`, which say what to write."""
        if isinstance(argv, (str, bytes, os.PathLike)):
            raise TypeError(
                f"argv must be a list of words, not {argv!r}: write [sys.executable, '-m', 'package'], or use shlex.split"
            )
        words = [os.fsdecode(word) for word in argv]
        if not words:
            raise ValueError("argv is empty: write a program and its arguments, as [sys.executable, '-m', 'package']")
        added = {os.fsdecode(name): os.fsdecode(value) for name, value in (environment or {}).items()}
        try:
            directory = os.path.abspath(os.getcwd() if cwd is None else cwd)
        except OSError:
            return cls(words, None, added, cwd is None)
        return cls(words, directory, added, cwd is None)

    @classmethod
    def of(cls, record: Record) -> Command:
        """Return the command that started the daemon of `record`."""
        fields = record.public()
        return cls(fields["argv"], fields.get("cwd"), record.environment, bool(fields.get("leaves_cwd")))


def find_obstacle(command: Command) -> str | None:
    """Return why a command can't be started, as far as that can be told without running it, or None."""
    argv, cwd, environment, _ = command
    if cwd is not None and not (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        return f"its directory {cwd} is gone"
    program = _find_program(argv[0], cwd, environment)
    if program is None:
        return f"its program {argv[0]!a} is gone or can't be executed"
    interpreter = _interpreter(program)
    if interpreter is not None and _find_program(interpreter, cwd, environment) is None:
        return f"the interpreter {interpreter!a} of its program {program!a} is gone"
    script = _script(argv)
    if script is not None and not os.path.exists(os.path.join(cwd or "", script)):
        return f"its script {script!a} is gone"
    return None


def _find_program(word: str, cwd: str | None, environment: Mapping[str, str]) -> str | None:
    import shutil

    if os.path.dirname(word):
        word = os.path.join(cwd or "", word)
    return shutil.which(word, path=environment.get("PATH", os.environ.get("PATH")))


def _interpreter(program: str) -> str | None:
    """Return the interpreter that the first line of a script names. Windows has none."""
    try:
        with open(program, "rb") as file:
            line = file.readline(256)
    except OSError:
        return None
    words = os.fsdecode(line[2:]).split() if line.startswith(b"#!") and sys.platform != "win32" else None
    return words[0] if words else None


def _script(argv: Sequence[str]) -> str | None:
    """Return the script that a Python interpreter is to run."""
    if not os.path.basename(argv[0]).lower().startswith("python"):
        return None
    words = iter(argv[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return word
        elif word == "-" or (not word.startswith("--") and set(word) & {"c", "m"}):
            return None
    return None


def find_differences(found: Command, wanted: Command) -> Iterator[str]:
    """Yield how a daemon's interpreter, command line, directory and added environment differ from those that are wanted."""
    program, *words = _absolute_words(found)
    wanted_program, *wanted_words = _absolute_words(wanted)
    if program != wanted_program:
        yield f"it was started by {program}, not by {wanted_program}"
    if words != wanted_words:
        import shlex

        yield f"its command line is {shlex.join(found.argv)}"
    elif found.cwd != wanted.cwd and any(map(_MODULE.fullmatch, words)):
        yield f"its directory is {found.cwd}, not {wanted.cwd}"
    names = sorted({name for name, _ in found.environment.items() ^ wanted.environment.items()})
    if names:
        yield f"it was started with other values of {', '.join(names)}"


def _absolute_words(command: Command) -> list[str]:
    """Return the words, of which those that name a file are absolute."""
    argv, cwd, environment, _ = command
    program = argv[0]
    if not os.path.dirname(program):
        program = _find_program(program, cwd, environment) or program
    paths = [os.path.join(cwd or "", word) for word in (program, *argv[1:])]
    return [os.path.normpath(path) if os.path.isfile(path) else word for path, word in zip(paths, argv, strict=True)]
