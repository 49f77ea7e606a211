"""The command `harness-ipc`. Reports go to stdout; what a person has to know goes to stderr, in one line.

Exit status: 0 well; 1 the reply was an error; 2 usage; 3 not running; 4 timed out; 5 refused; 6 could not start.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from . import __version__, client, messages
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
    ProtocolError,
    StartFailed,
    UnsafeDirectory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_EXIT_STATUS: list[tuple[type[HarnessIPCError], int]] = [
    (InvalidName, 2),
    (MessageTooLarge, 2),
    (DaemonNotRunning, 3),
    (ConnectionLost, 3),
    (DaemonTimeout, 4),
    (AuthenticationFailed, 5),
    (UnsafeDirectory, 5),
    (Busy, 5),
    (AlreadyRunning, 6),
    (StartFailed, 6),
    (HarnessIPCError, 1),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
    except HarnessIPCError as error:
        print(f"harness-ipc: {' '.join(str(error).split())}", file=sys.stderr)
        return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
    except BrokenPipeError:
        # Whoever read our output has seen enough: not ours to report, and nothing may be flushed at exit (Python's docs on
        # SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="harness-ipc",
        description="One authenticated channel between a long-lived local daemon and short-lived processes.",
        epilog="exit status: 0 well; 1 the reply was an error; 2 usage; 3 not running; 4 timed out; 5 refused; "
        "6 could not start",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the tour: a real daemon, real client processes, an intruder refused")
    demo.add_argument("--json", action="store_true", help="print the numbers as JSON")
    demo.set_defaults(run=_demo)

    named = argparse.ArgumentParser(add_help=False)
    named.add_argument(
        "--name",
        default=os.environ.get("HARNESS_IPC_NAME") or "default",
        help="the daemon's name (default: $HARNESS_IPC_NAME, then 'default')",
    )

    serve = commands.add_parser("serve", parents=[named], help="be a daemon in the foreground")
    serve.add_argument("app", metavar="MODULE:APP", help="an async function, or an object or class with start, handle and stop")
    serve.add_argument("--idle-timeout", type=_seconds, metavar="S", help="end after S seconds without a request")
    serve.add_argument("--json", action="store_true", help="print the endpoint as JSON when ready")
    serve.set_defaults(run=_serve)

    call = commands.add_parser("call", parents=[named], help="send one message and print the reply as JSON")
    call.add_argument("message", metavar="JSON|-", help="a JSON object, or - to read it from standard input")
    call.add_argument("--timeout", type=_seconds, default=client.REQUEST_TIMEOUT, metavar="S", help="default: %(default)g")
    call.set_defaults(run=_call)

    ping = commands.add_parser("ping", parents=[named], help="ask whether the daemon answers")
    ping.add_argument("--timeout", type=_seconds, default=client.CONNECT_TIMEOUT, metavar="S", help="default: %(default)g")
    ping.add_argument("--json", action="store_true", help="print the answer as JSON")
    ping.set_defaults(run=_ping)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds"  # argparse: "invalid number of seconds value: 'x'"


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return demo.run(as_json=options.json)


def _serve(options: argparse.Namespace) -> int:
    import logging

    from .daemon import run_daemon

    app = _load_app(options.app)
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(console)

    def report(server: Any) -> None:
        record = server.record
        if options.json:
            _print_json({key: record.public()[key] for key in ("name", "pid", "generation", "family", "address")})
        else:
            print(f"{record.name}: pid {record.pid} serves at {record.address}", flush=True)

    try:
        run_daemon(app, options.name, idle_timeout=options.idle_timeout, on_ready=report)
    finally:
        logging.getLogger().removeHandler(console)
    return 0


def _call(options: argparse.Namespace) -> int:
    try:
        message = messages.decode(sys.stdin.buffer.read() if options.message == "-" else os.fsencode(options.message))
    except ProtocolError as error:
        print(f"harness-ipc: the message is not usable: {error}", file=sys.stderr)
        return 2
    reply = client.request(options.name, message, timeout=options.timeout)
    _print_json(reply)
    return 1 if "error" in reply else 0


def _ping(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    reply = client.request(options.name, {"meta": messages.PING}, timeout=options.timeout)
    milliseconds = (time.perf_counter() - start) * 1000
    if options.json:
        _print_json({"name": options.name, **reply, "round_trip_ms": round(milliseconds, 3)})
        return 0
    print(f"{options.name}: pid {reply.get('pid')} answered in {milliseconds:.1f} ms")
    if reply.get("responsive") is False:
        print(
            f"harness-ipc: the event loop of {options.name!r} has been blocked for {reply.get('loop_lag', 0):.1f} s: "
            "requests wait for it",
            file=sys.stderr,
        )
    return 0


def _load_app(specification: str) -> Any:
    import importlib

    module_name, _, path = specification.partition(":")
    if not module_name or not path:
        raise InvalidName(f"{specification!a} is not MODULE:APP: name a module and what to take from it, as in service:handle")
    # As `python -m` does: the program is where the user stands.
    sys.path.insert(0, os.getcwd())
    try:
        app: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            app = getattr(app, attribute)
    except (ImportError, AttributeError) as error:
        raise StartFailed(f"{specification} can't be loaded: {error}") from error
    return app() if isinstance(app, type) else app


def _print_json(value: object) -> None:
    # ASCII: it passes any console's encoding, and lone surrogates too.
    print(json.dumps(value), flush=True)
