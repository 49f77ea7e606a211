"""Diagnosis of this machine, with commands that fix problems. Changes nothing: starts, stops and removes nothing.

A test connection to itself uses a private temporary directory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from . import __version__, _status, _transport
from ._doctor.directories import log_directory, runtime_directory, socket_path
from ._doctor.finding import Finding, describe, quote, without_remedy
from ._doctor.round_trip import round_trip
from ._registry import files, lifetime, processes, records
from ._registry.namespace import DEFAULT_APP, Namespace
from ._text import escape_control
from .errors import DaemonNotRunning, HarnessIPCError, UnsafeDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DEPENDENCIES = ("platformdirs", "filelock", "psutil")
# Seconds to find out whether something listens at a socket.
_CONNECT_TIMEOUT = 5.0
_OF_A_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})\.(json|[0-9a-f]{32}\.tmp)")
_SOCKET = re.compile(r"[0-9a-f]{16}\.sock")


def run(*, as_json: bool = False, namespace: Namespace | None = None) -> int:
    """Print the findings, one per line or as one JSON object. Return the exit status: 1 if there is a failure, else 0."""
    findings = examine(namespace)
    ok = all(finding.level != "failure" for finding in findings)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            _print_line(f"{finding.level.upper():<9}{finding.topic}: {finding.text}{remedy}")
    sys.stdout.flush()
    return 0 if ok else 1


def examine(namespace: Namespace | None = None) -> list[Finding]:
    """Run all checks and return their findings. Raises nothing: a check that raises becomes a finding of level "failure"."""
    checks: list[Callable[[Namespace], Iterator[Finding]]] = [_python, _dependencies, _processes]
    checks += [runtime_directory, log_directory, socket_path, round_trip, _daemons]
    namespace = namespace or Namespace()
    findings: list[Finding] = []
    for check in checks:
        try:
            for finding in check(namespace):
                findings.append(finding)  # noqa: PERF402 - what was found before a check failed is kept
        except Exception as error:
            topic = check.__name__.strip("_").replace("_", " ")
            remedy = error.remedy if isinstance(error, UnsafeDirectory) else None
            findings.append(Finding("failure", topic, f"the check failed: {describe(error)}", remedy))
    return findings


def _python(_: Namespace) -> Iterator[Finding]:
    implementation = platform.python_implementation()
    text = f"{implementation} {platform.python_version()}, {sys.executable or 'its path is unknown'}"
    supported = implementation == "CPython"
    yield Finding("ok", "python", text) if supported else Finding("warning", "python", f"{text}: only CPython is supported")
    yield Finding("ok", "harness_ipc", f"{__version__}, {os.path.dirname(__file__)}")


def _dependencies(_: Namespace) -> Iterator[Finding]:
    for name in _DEPENDENCIES:
        try:
            importlib.import_module(name)
            yield Finding("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("ok", name, "its version is unknown: it was installed without its metadata")
        except ImportError as error:
            remedy = f"{quote(sys.executable)} -m pip install --force-reinstall {name}"
            yield Finding("failure", name, f"it can't be imported: {describe(error)}", remedy)


def _processes(_: Namespace) -> Iterator[Finding]:
    if why := processes.why_identity_is_unavailable():
        yield Finding("failure", "processes", f"{why}: no daemon can start, or be signalled", "mount -t proc proc /proc")
    else:
        yield Finding("ok", "processes", "they can be identified")


# Daemons and stale files.


def _daemons(namespace: Namespace) -> Iterator[Finding]:
    directory = namespace.runtime_dir
    try:
        # Before the daemons are queried: files that they remove meanwhile are not stale.
        entries = sorted(files.list_private_dir(directory))
        daemons = _status.list_daemons(namespace=namespace)
    except UnsafeDirectory:
        # The check of the directory has reported it.
        return
    for status in daemons:
        yield _daemon(status, namespace)
    if not daemons:
        yield Finding("ok", "daemons", "none are running")
    # Any other state may belong to a living process.
    living = {status.name for status in daemons if status.state != "stale"}
    leftovers = list(_leftovers(namespace, entries, living))
    yield from leftovers or [Finding("ok", "leftovers", "none")]


def _daemon(status: _status.DaemonStatus, namespace: Namespace) -> Finding:
    topic = f"daemon {status.name}"
    text = status.state if status.pid is None else f"{status.state}, pid {status.pid}"
    if status.problem:
        text += f": {status.problem}"
    log = f"; its log is {status.log_path}"
    match status.state:
        case "running":
            text += f", for {status.uptime or 0:.0f} s"
            if error := (status.health or {}).get("error"):
                if isinstance(error, dict):
                    error = f"{error.get('type')}: {error.get('message')}"
                return Finding("warning", topic, f"{text}, but not healthy: {error}{log}")
            return Finding("ok", topic, text)
        case "starting" | "absent":
            return Finding("ok", topic, text + log)
        case "stale":
            return Finding("warning", topic, text + log, _stop(status.name, namespace))
        case "forbidden":
            try:
                records.read(status.name, namespace=namespace)
            except UnsafeDirectory as error:
                return Finding("failure", topic, f"{status.state}: {without_remedy(error)}", error.remedy)
    return Finding("failure", topic, text + log)


def _leftovers(namespace: Namespace, entries: list[str], living: set[str]) -> Iterator[Finding]:
    """Find those of `entries` that still exist and belong to no living process; `living` are the names of daemons."""
    directory = namespace.runtime_dir
    used: set[str] = set()
    left: dict[str, tuple[str, str]] = {}
    for entry in entries:
        if not (match := _OF_A_NAME.fullmatch(entry)):
            continue
        name, kind = match.groups()
        # `stop` removes stale files, but would stop a living daemon too.
        remedy = _remove(os.path.join(directory, entry)) if name in living else _stop(name, namespace)
        is_alive, address = False, ""
        with contextlib.suppress(HarnessIPCError, OSError, ValueError):
            record = records.read_file(os.path.join(directory, entry), name)
            is_alive = name in living if kind == "json" else lifetime.is_living(record)
            address = record.address
        if kind == "json" and not address:
            continue
        if is_alive:
            used.add(address)
        else:
            if kind != "json":
                left[entry] = "left by a daemon that died while starting or draining", remedy
            if _SOCKET.fullmatch(socket := os.path.basename(address)):
                left[socket] = "the socket of a daemon that died", remedy
    for entry in entries:
        path = os.path.join(directory, entry)
        if _SOCKET.fullmatch(entry) and path not in used and entry not in left and _has_no_listener(path):
            left[entry] = "a socket without a record, where nobody listens", _remove(path)
        if entry in left and os.path.lexists(path):
            what, remedy = left[entry]
            yield Finding("warning", "leftovers", f"{path}: {what}", remedy)


def _has_no_listener(address: str) -> bool:
    # A daemon that ends removes its record a moment before its socket.
    try:
        _transport.connect(address, _transport.deadline_after(_CONNECT_TIMEOUT)).close()
    except DaemonNotRunning:
        return True
    except HarnessIPCError:
        pass
    return False


def _stop(name: str, namespace: Namespace) -> str:
    app = "" if namespace.app == DEFAULT_APP else f" --app={namespace.app}"
    # argparse would take a name that begins with "-" for an option.
    return f"harness-ipc{app} stop --name{'=' if name.startswith('-') else ' '}{name}"


def _remove(path: str) -> str:
    return f"{'del' if sys.platform == 'win32' else 'rm'} {quote(path)}"


def _print_line(text: str) -> None:
    # Escape control characters, and characters that the console can't encode.
    shown = escape_control(text)
    encoding = sys.stdout.encoding or "ascii"
    print(shown.encode(encoding, "backslashreplace").decode(encoding))
