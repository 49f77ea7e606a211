"""The command `harness-browser`: runs programs with the helpers, diagnoses problems, stops the daemon.

Exit status: 0 success; 1 the program raised, or doctor found a failure; 2 usage; 4 timed out; 5 refused; 6 the daemon or its
browser could not be started or found; else the exit status of the program. Heavy imports are local.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import threading
from types import ModuleType, TracebackType

from harness_ipc import Busy, HarnessIPCError, InvalidName, escape_control

from . import NAME, check_extra, command_line, daemon_name, errors, helpers, is_browser_daemon, own_imports, wrong_daemon

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .command_line import Options

_EXIT_STATUS: list[tuple[type[Exception], int]] = [
    (InvalidName, 2),
    (TimeoutError, 4),
    (PermissionError, 5),
    (Busy, 5),
    (BlockingIOError, 5),
    (HarnessIPCError, 6),
]
# Seconds before a start is reported.
_REPORT_DELAY = 2.0
# The directory of harness_ipc, whose frames are removed from tracebacks.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = command_line.parse(sys.argv[1:] if arguments is None else list(arguments))
    for stream in (sys.stdout, sys.stderr):
        # For any encoding of the console: pages may contain any character, and lone surrogates.
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
        # For the browser's errors, the message suffices: the end of the log is not shown.
        is_own_error = errors.is_browser_error(getattr(error, "type", ""))
        for line in [] if is_own_error else getattr(error, "log_tail", "").splitlines():
            print("    " + escape_control(line, allow="\t"), file=sys.stderr)
        return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
    except BrokenPipeError:
        # The reader has closed the pipe: the flush at exit must not fail (Python's documentation, "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


class _Program:
    """The user's program; `name` is shown in tracebacks, `directory` is that of its file, or ""."""

    def __init__(self, name: str, source: bytes, directory: str = "") -> None:
        self.name = name
        self.source = source
        self.directory = directory

    def remember_lines(self) -> None:
        """Make the source lines of a program that is not a file available to tracebacks."""
        import linecache
        from importlib.util import decode_source

        # The compiler reports an invalid encoding.
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            lines = io.StringIO(decode_source(self.source)).readlines()
            linecache.cache[self.name] = (len(self.source), None, lines, self.name)

    def print_traceback(self, error: BaseException, *, by_hook: bool = False, title: str = "") -> None:
        """Print a traceback like the interpreter, but escape control characters: errors quote pages."""
        text = io.StringIO(title)
        text.seek(0, os.SEEK_END)
        with own_imports.without_program_directory():
            if by_hook and self.directory and sys.version_info < (3, 13):
                # Before 3.12 only this hook suggests names; since 3.13 it may use colors. It quotes source lines only of files.
                with contextlib.redirect_stderr(text):
                    sys.__excepthook__(type(error), error, error.__traceback__)
            else:
                import traceback

                if not self.directory:
                    self.remember_lines()
                traceback.print_exception(error, file=text)
        if sys.stderr is not None:
            sys.stderr.write(escape_control(text.getvalue(), allow="\n\t"))
            sys.stderr.flush()


def _read(options: Options) -> _Program | None:
    """Return the requested program, or None after printing an error."""
    if options.code is not None:
        return _Program("<string>", options.code.encode("utf-8", "surrogateescape"))
    if options.file in (None, "-"):
        if sys.stdin is None or (options.file is None and sys.stdin.isatty()):
            _print_error("nothing to run: give -c CODE, a file, or a program on standard input; --help says more")
            return None
        return _Program("<stdin>", sys.stdin.buffer.read())
    name = os.path.abspath(options.file)
    try:
        with open(name, "rb") as file:
            return _Program(name, file.read(), os.path.dirname(name))
    except OSError as error:
        _print_error(f"{options.file} can't be read: {error.strerror}")
        return None


def _run(options: Options) -> int:
    """Run the user's program as `__main__`, as Python would."""
    if (program := _read(options)) is None:
        return 2
    _connect(options)
    _escape_other_tracebacks(program)
    # Exclude existing objects from collections: one at exit would take longer than the requests of a short program.
    gc.freeze()
    module = ModuleType("__main__")
    module.__dict__.update({helper: getattr(helpers, helper) for helper in helpers.__all__})
    if program.directory:
        module.__file__ = program.name
    elif sys.version_info >= (3, 13):
        # Only for a traceback: it takes a millisecond.
        program.remember_lines()
    sys.modules["__main__"] = module
    sys.argv = ["-c" if options.code is not None else options.file or "-", *options.arguments]
    if not sys.flags.safe_path:
        own_imports.put_program_directory(program.directory)
    try:
        code = compile(program.source, program.name, "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102 - it is what the user asks for
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            raise
        _strip_own_frames(error)
        if sys.stdout is not None:
            # As the interpreter does at exit. A closed pipe is not an error of the program.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
        if sys.excepthook is sys.__excepthook__:
            program.print_traceback(error, by_hook=True)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _escape_other_tracebacks(program: _Program) -> None:
    """Escape control characters in tracebacks of other threads, and of errors that can't be raised, too."""

    def print_thread_traceback(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
            name = failure.thread.name if failure.thread else threading.get_ident()
            program.print_traceback(failure.exc_value, title=f"Exception in thread {name}:\n")

    def print_unraisable(failure: sys.UnraisableHookArgs) -> None:
        if failure.exc_value is None or sys.is_finalizing():
            sys.__unraisablehook__(failure)
            return
        title = f"{failure.err_msg or 'Exception ignored in'}: {failure.object!r}\n"
        program.print_traceback(failure.exc_value, title=title)

    threading.excepthook = print_thread_traceback
    sys.unraisablehook = print_unraisable


def _connect(options: Options) -> None:
    """Connect to the daemon, starting it if necessary, with progress on stderr; then enter the requested tab."""
    timer = threading.Timer(_REPORT_DELAY, _print_error, [f"starting {daemon_name()} and its browser"])
    timer.daemon = True
    # Only on a terminal: other readers of stderr need no progress.
    if sys.stderr is not None and sys.stderr.isatty():
        timer.start()
    try:
        helpers.connect(on_progress=lambda text: _print_error(str(text)))
        begin = {"new": options.new_tab, "tab": options.tab, "name": options.tab_name, "keep": options.keep_tab}
        if any(begin.values()):
            helpers.default_tab.begin = {key: value for key, value in begin.items() if value}
            helpers.default_tab.enter()
    finally:
        timer.cancel()


def _is_stdout_closed() -> bool:
    """Return whether the reader of this process's standard output has closed the pipe."""
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


def _strip_own_frames(error: BaseException) -> None:
    """Remove the frames of harness_ipc from the traceback of `error` and of its causes."""
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
    if status.alive and not is_browser_daemon(status.app_version):
        raise wrong_daemon(name)
    stopped = stop_daemon(name)
    # A killed daemon leaves its browser running.
    left = ManagedBrowser(name).end()
    print(f"{name}: {'stopped' if stopped else 'was not running'}{'; ended the browser that it had left' if left else ''}")
    return 0


def _print_error(text: str) -> None:
    print(f"harness-browser: {escape_control(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `python -m` puts the current directory first, and a script its own directory: later imports must not find modules in
        # either.
        sys.path[0] = os.path.dirname(_PACKAGE[:-1])
    sys.exit(main())
