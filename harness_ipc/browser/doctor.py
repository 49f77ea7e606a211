"""Diagnosis of the browser and its daemon, with commands that fix problems. Changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import harness_ipc
from harness_ipc import HarnessIPCError, UnsafeDirectory, escape_control

from . import APP_VERSION, daemon_name, is_browser_daemon, wrong_daemon
from .requested import BINARY, reload_command, requested_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Literal

    from harness_ipc import DaemonStatus

    from . import launcher

# Seconds for the daemon to answer.
_TIMEOUT = 5.0
# The limit of a page's title, address or dialog in characters.
_LONG = 200
# The number of round trips; the median is reported.
_ROUND_TRIPS = 21


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `remedy` is a shell command that fixes the problem, or None."""

    level: Literal["ok", "warning", "failure"]
    topic: str
    text: str
    remedy: str | None = None


def run(*, as_json: bool = False) -> int:
    """Print the findings, one per line or as one JSON object. Return the exit status: 1 if there is a failure, else 0."""
    findings = list(examine(daemon_name()))
    ok = all(finding.level != "failure" for finding in findings)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            print(escape_control(f"{finding.level.upper():<9}{finding.topic}: {finding.text}{remedy}"))
    return 0 if ok else 1


def examine(name: str) -> Iterator[Finding]:
    """Yield findings on the browser daemon `name`. Raises what `harness_ipc.daemon_status` does."""
    yield Finding("ok", "python", f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}")
    yield Finding("ok", "harness_ipc", f"{harness_ipc.__version__}, {os.path.dirname(harness_ipc.__file__)}")
    try:
        import websockets

        yield Finding("ok", "websockets", importlib.metadata.version(websockets.__name__))
    except ImportError as error:
        remedy = f"{shlex.quote(sys.executable)} -m pip install 'harness-ipc[browser]'"
        yield Finding("failure", "websockets", f"it can't be imported: {error}", remedy)
        return
    yield from _managed_browser()
    status = harness_ipc.daemon_status(name)
    if status.state in ("absent", "stale"):
        yield from _without_daemon(name, status)
    else:
        yield from _with_daemon(name, status)


def _managed_browser() -> Iterator[Finding]:
    """Report the browser that would be started."""
    from . import program
    from .display import find_broken

    topic = "own browser"
    binary = program.find_binary()
    if binary is None:
        named = os.environ.get(BINARY)
        text = f"{BINARY}={named} is not a program" if named else "no Chrome, Chromium, Edge or Brave is installed"
        yield Finding("warning", topic, f"{text}: only a browser that runs already can be used")
        return
    unreachable = find_broken(os.environ)
    window, broken = program.has_display(unreachable), program.describe_broken_display(unreachable)
    where = "in a window" if window else f"headless, since {broken or 'there is no display'}"
    text = f"{binary}, {where}"
    if (refusal := program.root_refusal()) is not None:
        yield Finding("warning", topic, f"{text}, but {refusal}")
        return
    if program.is_root():
        text += ", without its sandbox (--no-sandbox), since you are root"
    yield Finding("warning" if broken else "ok", topic, text)


def _without_daemon(name: str, status: DaemonStatus) -> Iterator[Finding]:
    how = "was killed" if status.state == "stale" else "is not running"
    yield Finding("ok", f"daemon {name}", f"it {how}: the next command starts it; its log is {status.log_path}")
    yield from _next_browser(name)


def _next_browser(name: str) -> Iterator[Finding]:
    """Report the browser that a new daemon would use."""
    from . import discovery
    from .connection import ConnectionFailed

    for source in discovery.sources(name):
        text = f"the next command uses {source.how}"
        if source.own is not None:
            yield from _next_managed_browser(name, source.own, text)
            return
        assert source.probe is not None
        try:
            # Without prompting the browser's user.
            asyncio.run(source.probe())
        except ConnectionFailed as error:
            if source.named is not None:
                yield Finding("failure", "browser", str(error))
                return
            if source.file is not None and not isinstance(error, discovery.OwnerUnknown):
                remedy = f"rm {shlex.quote(source.file)}"
                yield Finding("warning", "browser", f"{source.file} is stale: {error}", remedy)
            elif not isinstance(error, discovery.NotListening):
                yield Finding("warning", "browser", f"{source.how} is not used: {error}")
        else:
            yield _named_browser(text, source.named[1]) if source.named else Finding("ok", "browser", text)
            return


def _next_managed_browser(name: str, own: launcher.ManagedBrowser, text: str) -> Iterator[Finding]:
    from . import profile, program
    from .errors import BrowserNotFound

    remedy = None
    try:
        # Raises if a setting is invalid.
        program.further_arguments()
        problem = own.taken()
        pid = None if problem is not None else own.pid()
        if pid is not None:
            fate = "takes it" if own.has_current_settings() else "ends it, since it was started with other settings"
            left = f"pid {pid} was left by a daemon that was killed; the next one {fate}"
            yield Finding("warning", "browser", left, reload_command(name))
        elif problem is None and program.find_binary() is None:
            problem = "there is none: install Chrome or Chromium, or start one with its DevTools open"
    except BrowserNotFound as error:
        problem = str(error)
    except UnsafeDirectory as error:
        reason, remedy = profile.explain(error)
        problem = f"its profile {reason}"
    problem = problem or program.root_refusal()
    if problem is not None:
        yield Finding("failure", "browser", problem, remedy)
    else:
        yield Finding("ok", "browser", text)


def _named_browser(text: str, url: str) -> Finding:
    """Report `text` on the browser at the address `url` in the environment, and its owner if that is another user."""
    from . import local
    from .addresses import address_of

    host, port = address_of(url)
    others: frozenset[int] = frozenset()
    with contextlib.suppress(OSError, ValueError, OverflowError):
        if local.is_here(host, port):
            sock, others = local.connect_to_any(host, port)
            sock.close()
    if others:
        text += f", which belongs to {local.describe_users(others)}"
    return Finding("warning" if others - {local.ROOT} else "ok", "browser", text)


def _with_daemon(name: str, status: DaemonStatus) -> Iterator[Finding]:
    topic = f"daemon {name}"
    text = status.state if status.pid is None else f"{status.state}, pid {status.pid}"
    if status.state == "starting":
        yield Finding("ok", topic, f"{text}: wait, or see its log {status.log_path}")
        return
    if status.state != "running":
        yield Finding("failure", topic, f"{text}: {status.problem}; its log is {status.log_path}")
        return
    if not is_browser_daemon(status.app_version):
        yield Finding("failure", topic, str(wrong_daemon(name)))
        return
    text += f", for {status.uptime or 0:.0f} s"
    if status.app_version == APP_VERSION:
        yield Finding("ok", topic, text)
    else:
        text += f", but it is {status.app_version} and this is {APP_VERSION}"
        yield Finding("warning", topic, text, reload_command(name))
    try:
        with harness_ipc.connect_daemon(name, timeout=_TIMEOUT, request_timeout=_TIMEOUT) as client:
            reply = client.request({"meta": "connection_status", "requested_settings": requested_settings(os.environ)})
            yield from _browser(name, reply)
            if reply["connected"]:
                # Otherwise a request would make the daemon start a browser.
                yield _round_trip(client)
    except (HarnessIPCError, LookupError, TypeError) as error:
        text = f"the daemon does not report its state: {type(error).__name__}: {error}"
        yield Finding("failure", "browser", text, reload_command(name))


def _browser(name: str, status: dict[str, Any]) -> Iterator[Finding]:
    found = status["found"] + (f", pid {status['pid']}" if status["pid"] else "")
    if not status["connected"]:
        yield Finding(
            "failure", "browser", f"{found}: {status['problem']}; the next command tries to reconnect", reload_command(name)
        )
        return
    text = f"{status['browser']}, {found}; it answers the daemon in {status['round_trip_ms']:.1f} ms"
    if status["mismatch"] is not None:
        yield Finding("failure", "browser", f"{text}, but the next command asks for {status['mismatch']}", reload_command(name))
        return
    yield Finding("ok", "browser", text) if status["named"] is None else _named_browser(text, status["named"])
    tab = status["tab"]
    if tab is None:
        yield Finding("warning", "page", f"none is attached{_because(status['problem'])}; the next request attaches one")
    elif status["dialog"]:
        kind, message = status["dialog"].get("type"), status["dialog"].get("message")
        yield Finding(
            "warning",
            "page",
            f"{_start(tab['url'])}: a dialog blocks it ({kind}: {_start(str(message))!r}); answer it with handle_dialog()",
        )
    else:
        yield Finding("ok", "page", f"{_start(tab['title']) or 'no title'}, {_start(tab['url']) or 'no address'}")


def _start(text: str) -> str:
    """Return the beginning of a page's text."""
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def _because(problem: str | None) -> str:
    return f" ({problem})" if problem else ""


def _round_trip(client: harness_ipc.Client) -> Finding:
    times = []
    for _ in range(_ROUND_TRIPS):
        begun = time.perf_counter()
        reply = client.request({"method": "Target.getTargets"})
        times.append(time.perf_counter() - begun)
        if "error" in reply:
            return Finding("failure", "round trip", f"the browser does not answer: {reply['error'].get('message')}")
    text = f"a request to the daemon, answered by the browser, takes {sorted(times)[_ROUND_TRIPS // 2] * 1000:.2f} ms"
    return Finding("ok", "round trip", text)
