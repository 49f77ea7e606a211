"""Human-readable output: the states of daemons, and the progress of a long command."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from .._registry.namespace import log_path
from .output import escape, print_error

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from .._status import DaemonStatus

# Seconds before a command reports that it is still running.
_REPORT_DELAY = 1.0


def print_status(status: DaemonStatus) -> None:
    """Print the status of a daemon, one field a line."""
    print(f"{status.name}: {status.state}{'' if status.pid is None else f', pid {status.pid}'}")
    for title, text in _details(status):
        print(f"  {title:9} {escape(text)}")


def _details(status: DaemonStatus) -> Iterator[tuple[str, str]]:
    """Yield a title and a text for each field of a status that is known."""
    if status.problem is not None:
        yield "problem", status.problem
    if status.progress is not None:
        yield "progress", _one_line(status.progress)
    if status.state != "running" and status.since is not None:
        yield "since", f"{_duration(max(0.0, time.time() - status.since))} ago"
    if status.uptime is not None:
        detached = f", detached ({status.detached})" if status.detached else ""
        yield "uptime", _duration(status.uptime) + detached
    if status.version is not None:
        app = f"app {status.app_version}, " if status.app_version else ""
        yield "version", f"{app}harness_ipc {status.version}, Python {status.python}"
    if status.requests is not None:
        yield "requests", f"{status.requests} answered, {status.errors} with an error; connections: {status.connections}"
    if status.idle is not None and status.loop_lag is not None:
        yield "loop", f"idle for {_duration(status.idle)}, lag {status.loop_lag * 1000:.1f} ms"
    if status.health is not None:
        verdict = {True: "healthy: ", False: "not healthy: ", None: ""}[status.healthy]
        yield "health", verdict + json.dumps(status.health)
    if status.argv is not None:
        yield "command", shlex.join(status.argv)
    if status.cwd is not None:
        yield "directory", status.cwd
    if status.environment:
        yield "variables", " ".join(status.environment)
    yield "log", status.log_path


def print_table(found: list[DaemonStatus], *, with_apps: bool) -> None:
    """Print a line for each daemon, truncated to the width of the terminal if there is one."""
    heads = ("NAME", "STATE", "PID", "UPTIME", "REQUESTS", "ERRORS", "VERSION", "APP", "HEALTH OR PROBLEM")
    rows = [heads, *map(_row, found)]
    if with_apps:
        rows = [(app, *row) for app, row in zip(["OF", *(status.app for status in found)], rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        cells = (
            text.rjust(width) if 2 <= i - with_apps <= 5 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip()[:limit])


def _row(status: DaemonStatus) -> tuple[str, ...]:
    cells = (
        status.name,
        status.state,
        status.pid,
        None if status.uptime is None else _duration(status.uptime),
        status.requests,
        status.errors,
        status.version,
        status.app_version,
        status.problem or (None if status.health is None else json.dumps(status.health)),
    )
    return tuple("-" if cell is None else escape(" ".join(str(cell).split())) for cell in cells)


def _one_line(value: Any) -> str:
    """Return JSON that a daemon has reported as one printable line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(escape(text).split())


def _duration(seconds: float) -> str:
    """Return seconds as text in at most two units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@contextlib.contextmanager
def progress(doing: str, options: argparse.Namespace) -> Iterator[Callable[[Any], None]]:
    """Report on stderr that a block is still running; on a terminal, in one line with the seconds, removed at the end.

    Yields a function that sets the value shown after the seconds.
    """
    done = threading.Event()
    begun = time.monotonic()
    name, log = options.name, log_path(options.name, namespace=options.namespace)
    shown = ""

    def set_shown(value: Any) -> None:
        nonlocal shown
        shown = f", {_one_line(value)}"

    def show() -> None:
        width = 0
        while not done.wait(_REPORT_DELAY):
            if not sys.stderr.isatty():
                print_error(f"still {doing} {name}; its log is {log}")
                return
            text = f"{doing} {name}: {time.monotonic() - begun:.0f} s{shown}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r{text.ljust(width)}", end="", file=sys.stderr, flush=True)
            width = len(text)
        print(f"\r{' ' * width}\r" if width else "", end="", file=sys.stderr, flush=True)

    reporter = threading.Thread(target=show, daemon=True)
    reporter.start()
    try:
        yield set_shown
    finally:
        done.set()
        reporter.join()
