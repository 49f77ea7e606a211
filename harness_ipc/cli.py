"""The command `harness-ipc`. Reports go to stdout, errors to stderr in one line.

Exit status: 0 success; 1 the reply was an error, or doctor found a fault; 2 usage; 3 not running; 4 timed out; 5 refused; 6 not
started. Heavy imports are local, to keep `call` and `ping` fast.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from . import client
from ._cli.arguments import parse_arguments
from ._cli.output import escape, print_error, print_json
from ._descriptors import open_standard_streams
from ._protocol import messages
from ._registry.namespace import DEFAULT_APP, Namespace
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
    from argparse import Namespace as Options
    from collections.abc import Sequence
    from typing import Any

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    open_standard_streams()
    options = parse_arguments(arguments)
    with contextlib.suppress(AttributeError):
        # As on stderr by default: a character that the console can't encode is not an error.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        options.namespace = Namespace(DEFAULT_APP if options.application is None else options.application)
        status = _COMMANDS[options.command](options)
        sys.stdout.flush()
    except HarnessIPCError as error:
        if not getattr(options, "logs_errors", False):
            print_error(" ".join(str(error).split()))
        for line in getattr(error, "log_tail", "").splitlines():
            print(f"    {escape(line)}", file=sys.stderr)
        return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
    except OSError as error:
        # A reader may close the pipe early.
        if not isinstance(error, BrokenPipeError):
            place = error.filename or "standard output"
            print_error(f"{place} can't be used: {error.strerror}; free space there, or use another file")
        # The flush at exit must not fail (Python's documentation, "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return int(status)


def _demo(options: Options) -> int:
    from . import demo

    return demo.run(as_json=options.json)


def _serve(options: Options) -> int:
    from . import startup
    from ._logging import logging_to_stderr
    from .daemon import acquire_daemon, run_daemon

    _split_app(options.app)
    # In the background stderr is redirected to the log.
    in_foreground = startup.VARIABLE not in os.environ

    def report(server: Any) -> None:
        record = server.record
        if options.json:
            print_json({key: record.public()[key] for key in ("name", "pid", "generation", "family", "address")})
        else:
            print(f"{record.name}: pid {record.pid} serves at {record.address}", flush=True)

    # Before the app is imported, which may take long and is unnecessary if another daemon holds the name.
    # Without --app, use the namespace of the starter, if any.
    namespace = options.namespace if options.application else None
    with acquire_daemon(options.name, namespace=namespace) as acquired:
        # In the background, stderr is the log, which then has the error already.
        options.logs_errors = not in_foreground
        app = _load_app(options.app)
        with logging_to_stderr() if in_foreground else contextlib.nullcontext():
            run_daemon(app, options.name, idle_timeout=options.idle_timeout, on_ready=report, acquired=acquired)
    return 0


def _start(options: Options) -> int:
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


def _call(options: Options) -> int:
    from ._cli.call import call

    return call(options)


def _describe(options: Options) -> int:
    from ._cli.call import describe

    return describe(options)


def _ping(options: Options) -> int:
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


def _status(options: Options) -> int:
    from ._cli.report import print_status
    from ._status import daemon_status

    status = daemon_status(options.name, timeout=options.timeout, namespace=options.namespace)
    if options.json:
        print_json(status.to_json())
    else:
        print_status(status)
    return _STATE_STATUS[status.state]


def _list(options: Options) -> int:
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


def _stop(options: Options) -> int:
    from ._cli.report import progress
    from .manager import stop_daemon

    with progress("stopping", options):
        stopped = stop_daemon(options.name, timeout=options.timeout, namespace=options.namespace)
    if options.json:
        print_json({"name": options.name, "stopped": stopped})
    else:
        print(f"{options.name}: {'stopped' if stopped else 'was not running'}")
    return 0


def _restart(options: Options) -> int:
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


def _logs(options: Options) -> int:
    from ._cli.logs import logs

    return logs(options)


def _doctor(options: Options) -> int:
    from . import doctor

    return doctor.run(as_json=options.json, namespace=options.namespace)


def _load_app(specification: str) -> Any:
    import importlib

    from .daemon import check_app

    module_name, path = _split_app(specification)
    # Import these before the current directory is searched: some try to import modules of other systems.
    for late in ("multiprocessing.connection", "pathlib", "platformdirs", "psutil", "shlex", "tempfile"):
        importlib.import_module(late)
    # Last: a file there may be the app or one of its modules, but must not shadow another module.
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
        # An installed module may shadow the one in the current directory.
        file = getattr(sys.modules.get(module_name), "__file__", None)
        where = f" from {file}" if file else ""
        raise StartFailed(f"{specification} can't be loaded{where}: {type(error).__name__}: {error}") from error


def _split_app(specification: str) -> tuple[str, str]:
    module_name, _, path = specification.partition(":")
    if not module_name or not path:
        raise InvalidName(f"{specification!a} is not MODULE:APP: name a module and an object in it, as in service:handle")
    return module_name, path


_COMMANDS = {
    "demo": _demo,
    "serve": _serve,
    "start": _start,
    "call": _call,
    "describe": _describe,
    "ping": _ping,
    "status": _status,
    "list": _list,
    "stop": _stop,
    "restart": _restart,
    "logs": _logs,
    "doctor": _doctor,
}
