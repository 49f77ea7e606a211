"""The command `harness-ipc`. Reports go to stdout; what a person has to know goes to stderr, in one line.

Exit status: 0 well; 1 the reply was an error, or a fault was found; 2 usage; 3 not running; 4 timed out; 5 refused; 6 could not
start. What only some commands need, they import themselves: `call` and `ping` are run often, and are to be quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

from . import __version__, client
from ._cli.output import escape, print_error, print_json
from ._descriptors import open_standard_streams
from ._protocol import messages
from ._registry.namespace import DEFAULT_APP, Namespace
from ._text import escape_control
from .errors import (
    AlreadyRunning,
    AuthenticationFailed,
    Busy,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    InvalidName,
    MessageTooLarge,
    ResourceExhausted,
    StartFailed,
    UnsafeDirectory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from ._status import DaemonStatus

_EXIT_STATUS: list[tuple[type[HarnessIPCError], int]] = [
    (InvalidName, 2),
    (MessageTooLarge, 2),
    (DaemonNotRunning, 3),
    (ConnectionLost, 3),
    (DaemonTimeout, 4),
    (AuthenticationFailed, 5),
    (UnsafeDirectory, 5),
    (Busy, 5),
    (ResourceExhausted, 5),
    (AlreadyRunning, 6),
    (StartFailed, 6),
    (HarnessIPCError, 1),
]
_STATE_STATUS = {
    "running": 0,
    "incompatible": 1,
    "absent": 3,
    "starting": 3,
    "stale": 3,
    "unresponsive": 4,
    "forbidden": 5,
}

# Seconds: the manager's own, which can't be imported for the help text alone. A test compares them.
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 10.0
_STATUS_TIMEOUT = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    open_standard_streams()
    options = _parser().parse_args(arguments)
    with contextlib.suppress(AttributeError):
        # As stderr is from the start: a character that the console does not have must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        options.namespace = Namespace(DEFAULT_APP if options.application is None else options.application)
        status = options.run(options)
        sys.stdout.flush()
    except HarnessIPCError as error:
        if not getattr(options, "logs_errors", False):
            print_error(" ".join(str(error).split()))
        for line in getattr(error, "log_tail", "").splitlines():
            print(f"    {escape(line)}", file=sys.stderr)
        return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
    except OSError as error:
        # A reader that has seen enough is no error.
        if not isinstance(error, BrokenPipeError):
            place = error.filename or "standard output"
            print_error(f"{place} can't be used: {error.strerror}; free space there, or use another file")
        # Nothing may be flushed at exit (Python's docs on SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return int(status)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit as the base class does. The message quotes arguments, which may be text of others."""
        super().error(escape_control(message))


def _parser() -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        prog="harness-ipc",
        description="One authenticated channel between a long-lived local daemon and short-lived processes.",
        epilog="exit status: 0 well; 1 the reply was an error, or doctor found a fault; 2 usage; 3 not running; 4 timed out; "
        "5 refused; 6 could not start",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--app", dest="application", metavar="NAME", help=f"the application whose daemons are meant (default: {DEFAULT_APP})"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the tour: a real daemon, real client processes, an intruder refused")
    demo.add_argument("--json", action="store_true", help="print the numbers as JSON")
    demo.set_defaults(run=_demo)

    named = _ArgumentParser(add_help=False)
    named.add_argument(
        "--name",
        default=os.environ.get("HARNESS_IPC_NAME") or "default",
        help="the daemon's name (default: $HARNESS_IPC_NAME, then 'default')",
    )

    app = _ArgumentParser(add_help=False)
    app.add_argument("app", metavar="MODULE:APP", help="a service or its class, an app or its class, or an async function")
    app.add_argument("--idle-timeout", type=_seconds, metavar="S", help="end after S seconds without a request")

    serve = commands.add_parser("serve", parents=[app, named], help="run a daemon in the foreground")
    serve.add_argument("--json", action="store_true", help="print the endpoint as JSON when ready")
    serve.set_defaults(run=_serve)

    start = commands.add_parser("start", parents=[app, named], help="start a daemon in the background, if it does not run")
    _add_timeout(start, _START_TIMEOUT)
    start.add_argument("--json", action="store_true", help="print the daemon's status as JSON")
    start.set_defaults(run=_start)

    call = commands.add_parser("call", parents=[named], help="call a method and print its result as JSON")
    call.add_argument(
        "what", metavar="METHOD|JSON|-", help="a method, or a message (- is read from standard input) to be sent as it is"
    )
    call.add_argument("params", nargs="*", metavar="KEY=TEXT|KEY:=JSON", help="the parameters of the method")
    _add_timeout(call, client.REQUEST_TIMEOUT, "seconds for the reply, or for each item")
    call.set_defaults(run=_call)

    describe = commands.add_parser("describe", parents=[named], help="show the daemon's methods")
    _add_timeout(describe, client.REQUEST_TIMEOUT)
    describe.add_argument("--json", action="store_true", help="print the description as JSON")
    describe.set_defaults(run=_describe)

    ping = commands.add_parser("ping", parents=[named], help="ask whether the daemon answers")
    _add_timeout(ping, client.CONNECT_TIMEOUT)
    ping.add_argument("--json", action="store_true", help="print the answer as JSON")
    ping.set_defaults(run=_ping)

    status = commands.add_parser("status", parents=[named], help="show the daemon's state, and what is wrong with it")
    _add_timeout(status, _STATUS_TIMEOUT)
    status.add_argument("--json", action="store_true", help="print the status as JSON")
    status.set_defaults(run=_status)

    everyone = commands.add_parser("list", help="show the application's daemons")
    everyone.add_argument("--all", action="store_true", help="show the daemons of all applications")
    everyone.add_argument("--json", action="store_true", help="print a list of statuses as JSON")
    everyone.set_defaults(run=_list)

    stop = commands.add_parser("stop", parents=[named], help="end the daemon, if it runs, and wait for its end")
    _add_timeout(stop, _STOP_TIMEOUT, "seconds to finish what is in flight before it is terminated")
    stop.add_argument("--json", action="store_true", help="print what was done as JSON")
    stop.set_defaults(run=_stop)

    restart = commands.add_parser("restart", parents=[named], help="stop the daemon and start it as it was started")
    _add_timeout(restart, _START_TIMEOUT)
    restart.add_argument("--json", action="store_true", help="print the daemon's status as JSON")
    restart.set_defaults(run=_restart)

    logs = commands.add_parser("logs", parents=[named], help="show the end of the daemon's log")
    logs.add_argument("-n", dest="lines", type=_count, default=50, metavar="LINES", help="how many (default: %(default)d)")
    logs.add_argument("-f", dest="follow", action="store_true", help="go on with what is appended, until Ctrl-C")
    logs.set_defaults(run=_logs)

    doctor = commands.add_parser("doctor", help="look for what could keep daemons from working, and say how to mend it")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_timeout(parser: argparse.ArgumentParser, default: float, what: str = "seconds for it") -> None:
    parser.add_argument("--timeout", type=_seconds, default=default, metavar="S", help=f"{what} (default: %(default)g)")


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return min(value, sys.maxsize)


# argparse: "invalid number of seconds value: 'x'"
_seconds.__name__ = "number of seconds"
_count.__name__ = "number of lines"


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return demo.run(as_json=options.json)


def _serve(options: argparse.Namespace) -> int:
    from . import startup
    from ._logging import logging_to_stderr
    from .daemon import acquire_daemon, run_daemon

    _split_app(options.app)
    # In the background stderr goes into the log.
    in_foreground = startup.VARIABLE not in os.environ

    def report(server: Any) -> None:
        record = server.record
        if options.json:
            print_json({key: record.public()[key] for key in ("name", "pid", "generation", "family", "address")})
        else:
            print(f"{record.name}: pid {record.pid} serves at {record.address}", flush=True)

    # First of all: what is loaded may take long, and is not needed if another daemon has the name.
    # Without --app it is its starter's, if it has one.
    namespace = options.namespace if options.application else None
    with acquire_daemon(options.name, namespace=namespace) as acquired:
        # stderr goes into the log, where the error then is.
        options.logs_errors = not in_foreground
        app = _load_app(options.app)
        with logging_to_stderr() if in_foreground else contextlib.nullcontext():
            run_daemon(app, options.name, idle_timeout=options.idle_timeout, on_ready=report, acquired=acquired)
    return 0


def _start(options: argparse.Namespace) -> int:
    from ._cli.report import progress
    from ._command import app_argv
    from .manager import ensure_daemon

    _split_app(options.app)
    argv = app_argv(options.name, options.app)
    if options.idle_timeout is not None:
        argv += ["--idle-timeout", str(options.idle_timeout)]
    with progress("starting", options) as show:
        status = ensure_daemon(options.name, argv, timeout=options.timeout, on_progress=show, namespace=options.namespace)
    return _print_running(status, as_json=options.json)


def _call(options: argparse.Namespace) -> int:
    from ._cli.call import call

    return call(options)


def _describe(options: argparse.Namespace) -> int:
    from ._cli.call import describe

    return describe(options)


def _ping(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    reply = client.request(options.name, {"meta": messages.PING}, timeout=options.timeout, namespace=options.namespace)
    milliseconds = (time.perf_counter() - start) * 1000
    if options.json:
        print_json({"name": options.name, **reply, "round_trip_ms": round(milliseconds, 3)})
        return 0
    print(escape(f"{options.name}: pid {reply.get('pid')} answered in {milliseconds:.1f} ms"))
    if reply.get("responsive") is False:
        lag = reply.get("loop_lag", 0)
        print_error(f"the event loop of {options.name!r} has been blocked for {lag:.1f} s: requests wait for it")
    return 0


def _status(options: argparse.Namespace) -> int:
    from ._cli.report import print_status
    from ._status import daemon_status

    status = daemon_status(options.name, timeout=options.timeout, namespace=options.namespace)
    if options.json:
        print_json(status.to_json())
    else:
        print_status(status)
    return _STATE_STATUS[status.state]


def _list(options: argparse.Namespace) -> int:
    from ._cli.report import print_table
    from ._registry.namespace import all_namespaces
    from ._status import list_daemons

    namespaces = all_namespaces() if options.all else [options.namespace]
    found = [status for namespace in namespaces for status in list_daemons(namespace=namespace)]
    if options.json:
        print_json([status.to_json() for status in found])
    elif found:
        print_table(found, with_apps=options.all)
    else:
        print_error("no daemon is running")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from ._cli.report import progress
    from .manager import stop_daemon

    with progress("stopping", options):
        stopped = stop_daemon(options.name, timeout=options.timeout, namespace=options.namespace)
    if options.json:
        print_json({"name": options.name, "stopped": stopped})
    else:
        print(f"{options.name}: {'stopped' if stopped else 'was not running'}")
    return 0


def _restart(options: argparse.Namespace) -> int:
    from ._cli.report import progress
    from .manager import restart_daemon

    with progress("restarting", options):
        status = restart_daemon(options.name, timeout=options.timeout, namespace=options.namespace)
    return _print_running(status, as_json=options.json)


def _print_running(status: DaemonStatus, *, as_json: bool) -> int:
    if as_json:
        print_json(status.to_json())
        return 0
    print(f"{status.name}: pid {status.pid} is running", flush=True)
    if status.problem is not None:
        print_error(status.problem)
    return 0


def _logs(options: argparse.Namespace) -> int:
    from ._cli.logs import logs

    return logs(options)


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run(as_json=options.json, namespace=options.namespace)


def _load_app(specification: str) -> Any:
    import importlib

    from .daemon import check_app

    module_name, path = _split_app(specification)
    # What this process imports later: some of it tries modules of other systems, which the current directory might have.
    for late in ("multiprocessing.connection", "pathlib", "platformdirs", "psutil", "shlex", "tempfile"):
        importlib.import_module(late)
    # Last: a file there may be the app, or a module of the app's, but takes the place of no other module.
    with contextlib.suppress(OSError):  # it may have been removed
        sys.path.append(os.getcwd())
    try:
        app: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            app = getattr(app, attribute)
        app = app() if isinstance(app, type) else app
        check_app(app)
        return app
    except Exception as error:
        # An installed module of that name comes before one in the current directory.
        file = getattr(sys.modules.get(module_name), "__file__", None)
        where = f" from {file}" if file else ""
        raise StartFailed(f"{specification} can't be loaded{where}: {type(error).__name__}: {error}") from error


def _split_app(specification: str) -> tuple[str, str]:
    module_name, _, path = specification.partition(":")
    if not module_name or not path:
        raise InvalidName(f"{specification!a} is not MODULE:APP: name a module and what to take from it, as in service:handle")
    return module_name, path
