"""The command line of `harness-ipc`."""

from __future__ import annotations

import argparse
import os
import sys

from .. import __version__, client
from .._registry.namespace import DEFAULT_APP
from .._text import escape_control

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# Seconds, as in the manager, which is too slow to import for the help text. A test compares them.
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 10.0
_STATUS_TIMEOUT = 2.0


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print usage and exit. `message` may quote untrusted arguments."""
        super().error(escape_control(message))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line; `command` is the name of the command. Exits with 2 if it is invalid."""
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        prog="harness-ipc",
        description="One authenticated channel between a long-lived local daemon and short-lived processes.",
        epilog="exit status: 0 success; 1 the reply was an error, or doctor found a fault; 2 usage; 3 not running; "
        "4 timed out; 5 refused; 6 not started",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--app", dest="application", metavar="NAME", help=f"the application of the daemons (default: {DEFAULT_APP})"
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def add(
        command: str,
        help: str,
        *parents: _ArgumentParser,
        timeout: float | None = None,
        timeout_help: str = "timeout in seconds",
        json: str | None = None,
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(command, parents=parents, help=help)
        if timeout is not None:
            text = f"{timeout_help} (default: %(default)g)"
            added.add_argument("--timeout", type=_seconds, default=timeout, metavar="S", help=text)
        if json is not None:
            added.add_argument("--json", action="store_true", help=f"print {json} as JSON")
        return added

    name, app = _name_arguments(), _app_arguments()
    in_flight = "seconds to finish requests in flight before it is terminated"
    add("demo", "take the tour: a daemon, client processes, an intruder refused", json="the numbers")
    add("serve", "run a daemon in the foreground", app, name, json="the endpoint")
    add("start", "start a daemon in the background unless it is running", app, name, timeout=_START_TIMEOUT, json="its status")
    reply = "seconds for the reply, or for each item"
    _add_message(
        add("call", "call a method and print its result as JSON", name, timeout=client.REQUEST_TIMEOUT, timeout_help=reply)
    )
    add("describe", "show the daemon's methods", name, timeout=client.REQUEST_TIMEOUT, json="the description")
    add("ping", "check that the daemon answers", name, timeout=client.CONNECT_TIMEOUT, json="the answer")
    add("status", "show the daemon's state and problems", name, timeout=_STATUS_TIMEOUT, json="the status")
    listing = add("list", "list the application's daemons", json="a list of statuses")
    listing.add_argument("--all", action="store_true", help="list the daemons of all applications")
    stop = "stop the daemon if it is running, and wait until it has ended"
    add("stop", stop, name, timeout=_STOP_TIMEOUT, timeout_help=in_flight, json="the result")
    restart = "stop the daemon and start it again with the same command"
    add("restart", restart, name, timeout=_START_TIMEOUT, json="its status")
    _add_log_lines(add("logs", "show the end of the daemon's log", name))
    add("doctor", "find problems that keep daemons from working, and commands that fix them", json="the findings")
    return parser


def _name_arguments() -> _ArgumentParser:
    parent = _ArgumentParser(add_help=False)
    parent.add_argument(
        "--name",
        default=os.environ.get("HARNESS_IPC_NAME") or "default",
        help="the daemon's name (default: $HARNESS_IPC_NAME, then 'default')",
    )
    return parent


def _app_arguments() -> _ArgumentParser:
    parent = _ArgumentParser(add_help=False)
    parent.add_argument("app", metavar="MODULE:APP", help="a service or its class, an app or its class, or an async function")
    parent.add_argument("--idle-timeout", type=_seconds, metavar="S", help="exit after S seconds without a request")
    return parent


def _add_message(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="METHOD|JSON|-", help="a method, or a message to send unchanged (- reads it from standard input)"
    )
    parser.add_argument("params", nargs="*", metavar="KEY=TEXT|KEY:=JSON", help="the parameters of the method")


def _add_log_lines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", dest="lines", type=_count, default=50, metavar="LINES", help="the number of lines (default: %(default)d)"
    )
    parser.add_argument("-f", dest="follow", action="store_true", help="follow the log until Ctrl-C")


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
