"""How the browser and its daemon are, and the command that mends what is wrong. It looks, and changes nothing."""

from __future__ import annotations

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

from . import APP_VERSION, WEBSOCKET, daemon_name, is_ours, not_ours

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Literal

    from harness_ipc import DaemonStatus

    from . import discovery

# Seconds for the daemon to answer.
_TIMEOUT = 5.0
# Characters of a page's title, address or dialog that are told.
_LONG = 200
# Round trips of which the median is told.
_ROUND_TRIPS = 21


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `remedy` is a command that mends it, or None where none does."""

    level: Literal["ok", "warning", "failure"]
    topic: str
    text: str
    remedy: str | None = None


def run(*, as_json: bool = False) -> int:
    """Print the findings, one a line, or as one JSON object, and return the exit status: 1 if there is a failure, else 0."""
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
    """Yield what there is to say of the browser's daemon `name`. Raises what `harness_ipc.daemon_status` does."""
    yield Finding("ok", "python", f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}")
    yield Finding("ok", "harness_ipc", f"{harness_ipc.__version__}, {os.path.dirname(harness_ipc.__file__)}")
    try:
        import websockets

        yield Finding("ok", "websockets", importlib.metadata.version(websockets.__name__))
    except ImportError as error:
        remedy = f"{shlex.quote(sys.executable)} -m pip install 'harness-ipc[browser]'"
        yield Finding("failure", "websockets", f"it can't be imported: {error}", remedy)
        return
    yield from _own_browser()
    status = harness_ipc.daemon_status(name)
    if status.state in ("absent", "stale"):
        yield from _without_daemon(name, status)
    else:
        yield from _with_daemon(name, status)


def _own_browser() -> Iterator[Finding]:
    """Say what would be started."""
    from . import program

    topic = "own browser"
    binary = program.find_binary()
    if binary is None:
        demanded = os.environ.get(program.BINARY)
        text = f"{program.BINARY}={demanded} is no program" if demanded else "no Chrome, Chromium, Edge or Brave is installed"
        yield Finding("warning", topic, f"{text}: only a browser that runs already can be used")
        return
    text = f"{binary}, {'in a window' if program.has_display() else 'headless, since there is no display'}"
    if (refusal := program.root_refusal()) is not None:
        yield Finding("warning", topic, f"{text}, but {refusal}")
        return
    if program.is_root():
        text += ", without its sandbox (--no-sandbox), since you are root"
    yield Finding("ok", topic, text)


def _without_daemon(name: str, status: DaemonStatus) -> Iterator[Finding]:
    from . import discovery, launcher, local, profile, program

    how = "was killed" if status.state == "stale" else "does not run"
    yield Finding("ok", f"daemon {name}", f"it {how}: the next command starts it; its log is {status.log_path}")
    managed = launcher.ManagedBrowser(name)
    remedy = None
    try:
        taken = managed.taken()
        pid = None if taken is not None else managed.pid()
    except UnsafeDirectory as error:
        text, remedy = profile.explain(error)
        taken, pid = f"its profile {text}", None
    if pid is not None:
        text = f"pid {pid} was left by a daemon that was killed; the next one takes it"
        yield Finding("warning", "browser", text, _reload(name))
    for source in discovery.sources(name):
        if source.own is not None:
            if taken is not None:
                yield Finding("failure", "browser", taken, remedy)
            elif (refusal := program.root_refusal()) is not None:
                yield Finding("failure", "browser", refusal)
            elif pid is None and program.find_binary() is None:
                yield Finding(
                    "failure", "browser", "there is none: install Chrome or Chromium, or start one with its DevTools open"
                )
            else:
                yield Finding("ok", "browser", f"the next command uses {source.how}")
            return
        assert source.address is not None
        if source.demanded:
            yield _named_browser(f"the next command uses {source.how}", source.how, source.address)
            return
        try:
            # Nothing is asked: that could open a window that asks its user.
            local.connect_to_ours(*source.address).close()
        except local.NotOurs as error:
            if source.file is None or not error.uids:
                yield Finding("warning", "browser", f"{source.how} is not used: {error}")
            else:
                yield _stale(source, str(error))
        except (OSError, OverflowError) as error:
            if source.file is not None:
                yield _stale(source, _unreachable(error))
        else:
            yield Finding("ok", "browser", f"the next command uses {source.how}")
            return


def _named_browser(text: str, how: str, address: tuple[str, int]) -> Finding:
    """Say `text` of the browser that the environment names, and name its owner if that is another user."""
    from . import local

    try:
        sock, others = local.connect_to_any(*address)
    except (OSError, ValueError, OverflowError) as error:
        return Finding("failure", "browser", f"{how} {_unreachable(error)}: start that browser, or unset the variable")
    sock.close()
    if others:
        text += f", which belongs to {local.describe_users(others)}"
    return Finding("warning" if others - {local.ROOT} else "ok", "browser", text)


def _stale(source: discovery.Source, problem: str) -> Finding:
    assert source.file is not None
    return Finding("warning", "browser", f"{source.file} is stale: {problem}", f"rm {shlex.quote(source.file)}")


def _unreachable(error: Exception) -> str:
    return f"can't be reached ({getattr(error, 'strerror', None) or type(error).__name__})"


def _with_daemon(name: str, status: DaemonStatus) -> Iterator[Finding]:
    topic = f"daemon {name}"
    text = status.state if status.pid is None else f"{status.state}, pid {status.pid}"
    if status.state == "starting":
        yield Finding("ok", topic, f"{text}: wait, or see its log {status.log_path}")
        return
    if status.state != "running":
        yield Finding("failure", topic, f"{text}: {status.problem}; its log is {status.log_path}")
        return
    if not is_ours(status.app_version):
        yield Finding("failure", topic, str(not_ours(name)))
        return
    text += f", for {status.uptime or 0:.0f} s"
    if status.app_version == APP_VERSION:
        yield Finding("ok", topic, text)
    else:
        text += f", but it is {status.app_version} and this is {APP_VERSION}"
        yield Finding("warning", topic, text, _reload(name))
    try:
        with harness_ipc.connect_daemon(name, timeout=_TIMEOUT, request_timeout=_TIMEOUT) as client:
            told = client.request({"meta": "connection_status"})
            yield from _browser(name, told)
            if told["connected"]:
                # Not otherwise: a request has the daemon start another browser.
                yield _round_trip(client)
    except (HarnessIPCError, LookupError, TypeError) as error:
        text = f"the daemon does not say how it is: {type(error).__name__}: {error}"
        yield Finding("failure", "browser", text, _reload(name))


def _browser(name: str, status: dict[str, Any]) -> Iterator[Finding]:
    from . import connection, discovery

    found = status["found"] + (f", pid {status['pid']}" if status["pid"] else "")
    if not status["connected"]:
        yield Finding("failure", "browser", f"{found}: {status['problem']}", _reload(name))
        return
    text = f"{status['browser']}, {found}; it answers the daemon in {status['round_trip_ms']:.1f} ms"
    variable, _, place = status["found"].partition(", ")
    if variable in (WEBSOCKET, discovery.URL) and connection.is_local(place):
        yield _named_browser(text, found, discovery.address_of(place))
    else:
        yield Finding("ok", "browser", text)
    tab = status["tab"]
    if tab is None:
        yield Finding("warning", "page", f"none is attached{_because(status['problem'])}; the next request attaches one")
    elif status["dialog"]:
        kind, message = status["dialog"].get("type"), status["dialog"].get("message")
        yield Finding(
            "warning",
            "page",
            f"{_start(tab['url'])}: a dialog holds it ({kind}: {_start(str(message))!r}); answer it with handle_dialog()",
        )
    else:
        yield Finding("ok", "page", f"{_start(tab['title']) or 'no title'}, {_start(tab['url']) or 'no address'}")


def _reload(name: str) -> str:
    return f"harness-browser --name={name} --reload"


def _start(text: str) -> str:
    """Return as much of a page's text as a line has room for."""
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
