"""The command `harness-browser`: run a program with the helpers at hand, look what is wrong, end the daemon.

Exit status: 0 well; 1 the program raised, or doctor found a failure; 2 usage; 4 timed out; 5 refused; 6 the daemon or its
browser could not be had; else what the program exits with. What only some uses need, they import themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import threading
from types import ModuleType, TracebackType

from harness_ipc import Busy, HarnessIPCError, InvalidName, __version__, escape_control

from . import NAME, TAB_NAME, check_extra, daemon_name, errors, helpers, is_ours, not_ours, own_imports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_EXIT_STATUS: list[tuple[type[Exception], int]] = [
    (InvalidName, 2),
    (TimeoutError, 4),
    (PermissionError, 5),
    (Busy, 5),
    (BlockingIOError, 5),
    (HarnessIPCError, 6),
]
# Seconds of silence that a person takes for work, not for a hang.
_SILENCE = 2.0
# The directory of harness_ipc, whose frames are no news to the user.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    own, words = _split(sys.argv[1:] if arguments is None else list(arguments))
    options = parser.parse_args(own)
    options.arguments += words
    if (options.doctor or options.reload) and options.file is not None:
        parser.error(f"argument FILE: there is nothing to run with {'--doctor' if options.doctor else '--reload'}")
    if options.json and not options.doctor:
        parser.error("argument --json: only with --doctor")
    for stream in (sys.stdout, sys.stderr):
        # Whatever the console's own encoding: pages have all characters, and lone surrogates too.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    if options.name is not None:
        os.environ[NAME] = options.name
    try:
        if options.file in ("status", "logs"):
            import subprocess

            command = [sys.executable, "-P", "-m", "harness_ipc", options.file, "--name", daemon_name(), *options.arguments]
            status = subprocess.call(command)
        elif options.doctor:
            from . import doctor

            status = doctor.run(as_json=options.json)
        else:
            status = _reload() if options.reload else _run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except HarnessIPCError as error:
        _print_error(" ".join(str(error).split()))
        # An error of ours says all.
        told = errors.is_ours(getattr(error, "type", ""))
        for line in [] if told else getattr(error, "log_tail", "").splitlines():
            print("    " + escape_control(line, allow="\t"), file=sys.stderr)
        return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
    except BrokenPipeError:
        # Whoever read our output has seen enough, and nothing may be flushed at exit (Python's docs on SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit as the base class does. The message quotes arguments, which may be text of others."""
        super().error(escape_control(message))


def _parser() -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        prog="harness-browser",
        usage="%(prog)s [--name NAME] [--new-tab | --tab WHICH | --tab-name TAB] [--keep-tab]\n"
        "           (-c CODE | FILE | -) [ARGUMENT ...]\n"
        "       %(prog)s [--name NAME] doctor [--json] | reload | status [--json] | logs [-f]",
        description="Run Python with the browser's helpers at hand: page_info(), goto_url(url), js(code), "
        "capture_screenshot(path) and so on. The daemon that holds the browser is started by the first run, and stays. "
        "doctor, reload, status and logs are commands, not files: ./doctor is a file.",
        epilog="exit status: 0 well; 1 the program raised, or doctor found a failure; 2 usage; 4 timed out; 5 refused; 6 the "
        "daemon or its browser could not be had; else what the program exits with",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", dest="code", metavar="CODE", help="run this program; what follows is its own")
    what.add_argument("--doctor", action="store_true", help="say how the browser and its daemon are, and what to do")
    what.add_argument("--reload", action="store_true", help="end the daemon and its own browser: the next run starts anew")
    parser.add_argument("--json", action="store_true", help="print doctor's findings as JSON")
    parser.add_argument("--name", metavar="NAME", help=f"the daemon's name (default: ${NAME}, then 'browser')")
    tab = parser.add_mutually_exclusive_group()
    tab.add_argument("--new-tab", action="store_true", help="begin in a new tab, and close it at the end")
    tab.add_argument("--tab", metavar="WHICH", help="begin in this tab: current, an id, or a part of its URL")
    tab.add_argument("--tab-name", metavar="TAB", help=f"begin in the tab of this name (default: ${TAB_NAME}); it stays")
    parser.add_argument("--keep-tab", action="store_true", help="keep a tab that is opened for this run: the next begins there")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("file", nargs="?", metavar="FILE", help="run the program in this file; - is standard input, as is none")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="what the program finds in sys.argv")
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return what is for this command, and the words behind -c CODE, which are the program's own whatever they look like.

    The words doctor and reload become the options of that name.
    """
    for place, word in enumerate(arguments):
        if place and arguments[place - 1] in ("--name", "--tab", "--tab-name"):
            continue
        if word.startswith("-c"):
            end = place + (2 if word == "-c" else 1)
            return arguments[:end], arguments[end:]
        if word in ("doctor", "reload"):
            return [*arguments[:place], f"--{word}", *arguments[place + 1 :]], []
        if not word.startswith("-") or word in ("-", "--"):
            break
    return arguments, []


def _run(options: argparse.Namespace) -> int:
    """Run the user's program in the place of `__main__`, as Python itself would."""
    place = ""
    if options.code is not None:
        name, source, argv = "<string>", options.code.encode("utf-8", "surrogateescape"), ["-c", *options.arguments]
    elif options.file in (None, "-"):
        if sys.stdin is None or (options.file is None and sys.stdin.isatty()):
            _print_error("nothing to run: give -c CODE, a file, or a program on standard input; --help says more")
            return 2
        name, source, argv = "<stdin>", sys.stdin.buffer.read(), ["-", *options.arguments]
    else:
        name, argv = os.path.abspath(options.file), [options.file, *options.arguments]
        place = os.path.dirname(name)
        try:
            with open(name, "rb") as file:
                source = file.read()
        except OSError as error:
            _print_error(f"{options.file} can't be read: {error.strerror}")
            return 2
    _connect(options)
    _escape_other_tracebacks()
    program = ModuleType("__main__")
    program.__dict__.update({helper: getattr(helpers, helper) for helper in helpers.__all__})
    if place:
        program.__file__ = name
    else:
        _remember_lines(name, source)
    sys.modules["__main__"] = program
    sys.argv = argv
    if not sys.flags.safe_path:
        # What a request may import later, to say what is wrong with a file. All else is imported by `own_imports`.
        import shlex  # noqa: F401

        own_imports.put_program_directory(place)
    try:
        exec(compile(source, name, "exec", dont_inherit=True), program.__dict__)  # noqa: S102 - it is what the user asks for
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        _leave_out_our_frames(error)
        if sys.stdout is not None:
            # As the interpreter's own hook does. A reader that has gone is not the program's error.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
        if sys.excepthook is sys.__excepthook__:
            _print_traceback(error, in_file=bool(place))
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _print_traceback(error: BaseException, *, in_file: bool, title: str = "") -> None:
    """Print what the interpreter would, without control characters: errors quote pages."""
    text = io.StringIO(title)
    text.seek(0, os.SEEK_END)
    with own_imports.without_program_directory():
        if in_file and sys.version_info < (3, 13):
            # Before 3.12, only this hook suggests names, and from 3.13 it may use colors; it quotes files only.
            with contextlib.redirect_stderr(text):
                sys.__excepthook__(type(error), error, error.__traceback__)
        else:
            import traceback

            traceback.print_exception(error, file=text)
    if sys.stderr is not None:
        sys.stderr.write(escape_control(text.getvalue(), allow="\n\t"))
        sys.stderr.flush()


def _escape_other_tracebacks() -> None:
    """Have the tracebacks of other threads, and of errors that can't be raised, printed without control characters, too."""

    def print_thread_traceback(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
            name = failure.thread.name if failure.thread else threading.get_ident()
            _print_traceback(failure.exc_value, in_file=False, title=f"Exception in thread {name}:\n")

    def print_unraisable(failure: sys.UnraisableHookArgs) -> None:
        if failure.exc_value is None or sys.is_finalizing():
            sys.__unraisablehook__(failure)
            return
        title = f"{failure.err_msg or 'Exception ignored in'}: {failure.object!r}\n"
        _print_traceback(failure.exc_value, in_file=False, title=title)

    threading.excepthook = print_thread_traceback
    sys.unraisablehook = print_unraisable


def _connect(options: argparse.Namespace) -> None:
    """Be sure that the daemon runs, and say so if that takes long, or waits for somebody; be in the tab that is asked for."""
    hint = f"starting {daemon_name()} and its browser"
    timer = threading.Timer(_SILENCE, _print_error, [hint])
    timer.daemon = True
    timer.start()
    try:
        helpers.connect(on_progress=lambda text: _print_error(str(text)))
        begin = {"new": options.new_tab, "tab": options.tab, "name": options.tab_name, "keep": options.keep_tab}
        if any(begin.values()):
            helpers.default_tab.begin = {key: value for key, value in begin.items() if value}
            helpers.default_tab.enter()
    finally:
        timer.cancel()


def _remember_lines(name: str, source: bytes) -> None:
    """Have tracebacks quote a program that is no file."""
    import io
    import linecache
    from importlib.util import decode_source

    # What can't be read is told by the compiler.
    with contextlib.suppress(SyntaxError, UnicodeDecodeError):
        linecache.cache[name] = (len(source), None, io.StringIO(decode_source(source)).readlines(), name)


def _reader_has_gone() -> bool:
    """Return whether it is our own standard output that broke."""
    try:
        sys.stdout.flush()
        if sys.platform == "win32":
            return False
        import select

        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True


def _leave_out_our_frames(error: BaseException) -> None:
    """Have a traceback show the user's program alone, and so those of what caused it."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        frames = []
        trace = one.__traceback__
        while trace is not None:
            if not os.path.abspath(trace.tb_frame.f_code.co_filename).startswith(_PACKAGE):
                frames.append(trace)
            trace = trace.tb_next
        kept: TracebackType | None = None
        for frame in reversed(frames):
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
        one.__traceback__ = kept
        pending += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions


def _reload() -> int:
    from harness_ipc import daemon_status, stop_daemon

    check_extra()
    from .launcher import ManagedBrowser

    name = daemon_name()
    status = daemon_status(name)
    if status.alive and not is_ours(status.app_version):
        raise not_ours(name)
    stopped = stop_daemon(name)
    # A daemon that was killed leaves its browser to the next one.
    left = ManagedBrowser(name).end()
    print(f"{name}: {'stopped' if stopped else 'was not running'}{', the browser that it had left is ended' if left else ''}")
    return 0


def _print_error(text: str) -> None:
    print(f"harness-browser: {escape_control(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `python -m` puts the current directory first, and what is imported later must not come from there. Not our own
        # directory either, as for a script: it has modules with the names of others.
        sys.path[0] = os.path.dirname(_PACKAGE[:-1])
    sys.exit(main())
