"""The command `harness-browser`: run a program with the helpers at hand, look what is wrong, end the daemon.

Exit status: 0 well; 1 the program raised, or doctor found a failure; 2 usage; 4 timed out; 5 refused; 6 the daemon or its
browser could not be had; else what the program exits with. What only some uses need, they import themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from types import ModuleType

from harness_ipc import Busy, HarnessIPCError, InvalidName, __version__

from . import NAME, daemon_name, helpers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from traceback import TracebackException

_EXIT_STATUS: list[tuple[type[Exception], int]] = [
    (InvalidName, 2),
    (TimeoutError, 4),
    (PermissionError, 5),
    (Busy, 5),
    (HarnessIPCError, 6),
]
# Seconds of silence that a person takes for work, not for a hang.
_SILENCE = 2.0
# The directory of harness_ipc, whose frames are no news to the user.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # Whatever the console's own encoding: pages have all characters, and lone surrogates too.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    if options.name is not None:
        os.environ[NAME] = options.name
    try:
        if options.doctor:
            from . import doctor

            status = doctor.run(as_json=options.json)
        else:
            status = _reload() if options.reload else _run(options)
        sys.stdout.flush()
    except HarnessIPCError as error:
        _tell(" ".join(str(error).split()))
        for line in getattr(error, "log_tail", "").splitlines():
            print(f"    {_harmless(line)}", file=sys.stderr)
        return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
    except BrokenPipeError:
        # Whoever read our output has seen enough, and nothing may be flushed at exit (Python's docs on SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="harness-browser",
        usage="%(prog)s [--name NAME] (-c CODE | FILE | -) [ARGUMENT ...]\n"
        "       %(prog)s [--name NAME] --doctor [--json] | --reload",
        description="Run Python with the browser's helpers at hand: page_info(), goto_url(url), js(code), "
        "capture_screenshot(path) and so on. The daemon that holds the browser is started by the first run, and stays.",
        epilog="exit status: 0 well; 1 the program raised, or doctor found a failure; 2 usage; 4 timed out; 5 refused; 6 the "
        "daemon or its browser could not be had; else what the program exits with",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", dest="code", metavar="CODE", help="run this program")
    what.add_argument("--doctor", action="store_true", help="say how the browser and its daemon are, and what to do")
    what.add_argument("--reload", action="store_true", help="end the daemon and its own browser: the next run starts anew")
    parser.add_argument("--json", action="store_true", help="print doctor's findings as JSON")
    parser.add_argument("--name", metavar="NAME", help=f"the daemon's name (default: ${NAME}, then 'browser')")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("file", nargs="?", metavar="FILE", help="run the program in this file; - is standard input, as is none")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="what the program finds in sys.argv")
    return parser


def _run(options: argparse.Namespace) -> int:
    """Run the user's program in the place of `__main__`, as Python itself would."""
    if options.code is not None:
        words = [] if options.file is None else [options.file]
        name, source, argv = "<string>", options.code.encode("utf-8", "surrogateescape"), ["-c", *words, *options.arguments]
    elif options.file in (None, "-"):
        if options.file is None and sys.stdin.isatty():
            _tell("nothing to run: give -c CODE, a file, or a program on standard input; --help says more")
            return 2
        name, source, argv = "<stdin>", sys.stdin.buffer.read(), ["-", *options.arguments]
    else:
        name, argv = options.file, [options.file, *options.arguments]
        try:
            with open(name, "rb") as file:
                source = file.read()
        except OSError as error:
            _tell(f"{name} can't be read: {error.strerror}")
            return 2
    _connect()
    program = ModuleType("__main__")
    program.__dict__.update({helper: getattr(helpers, helper) for helper in helpers.__all__})
    if name == options.file:
        program.__file__ = name
    else:
        _remember_lines(name, source)
    sys.modules["__main__"] = program
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(name)) if name == options.file else ""
    try:
        exec(compile(source, name, "exec"), program.__dict__)  # noqa: S102 - it is what the user asks for
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise
    except Exception as error:
        _print_traceback(error)
        return 1
    return 0


def _connect() -> None:
    """Be sure that the daemon runs, and say so if that takes long."""
    hint = f"starting {daemon_name()} and its browser; if a browser asks whether it may be controlled, click Allow"
    timer = threading.Timer(_SILENCE, _tell, [hint])
    timer.daemon = True
    timer.start()
    try:
        helpers.connect()
    finally:
        timer.cancel()


def _remember_lines(name: str, source: bytes) -> None:
    """Have tracebacks quote a program that is no file."""
    import linecache

    text = source.decode("utf-8", "replace")
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)


def _print_traceback(error: Exception) -> None:
    """Print the traceback of the user's program, without the frames that are ours."""
    import traceback

    report: TracebackException | None = traceback.TracebackException.from_exception(error)
    sys.stdout.flush()
    pending = [report]
    while pending:
        if (one := pending.pop()) is not None:
            one.stack[:] = [frame for frame in one.stack if not os.path.abspath(frame.filename).startswith(_PACKAGE)]
            pending += [one.__cause__, one.__context__, *(one.exceptions or [])]
    assert report is not None
    print("".join(report.format()), end="", file=sys.stderr)


def _reload() -> int:
    from harness_ipc import stop_daemon

    from .chrome import OwnBrowser

    name = daemon_name()
    stopped = stop_daemon(name)
    # A daemon that was killed leaves its browser to the next one.
    left = OwnBrowser(name).end()
    print(f"{name}: {'stopped' if stopped else 'was not running'}{', the browser that it had left is ended' if left else ''}")
    return 0


def _tell(text: str) -> None:
    print(f"harness-browser: {_harmless(text)}", file=sys.stderr, flush=True)


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
