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
import shlex
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import __version__, _status, _transport
from ._protocol.handshake import Keys
from ._protocol.session import READY, ClientProtocol, ServerProtocol
from ._registry import files, lifetime, processes, records, trust
from ._registry.namespace import DEFAULT_APP, Namespace, private_temporary_dir, runtime_root
from ._text import escape_control
from ._transport import Framing, listen
from .errors import ConnectionLost, DaemonNotRunning, HarnessIPCError, UnsafeDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal

_DEPENDENCIES = ("platformdirs", "filelock", "psutil")
# Seconds for the round trip, which takes milliseconds.
_ROUND_TRIP = 5.0
# Free bytes below which the disk counts as full.
_LOW_SPACE = 1024 * 1024
_QUESTION, _ANSWER = b'{"question":1}', b'{"answer":1}'
_MAX_MESSAGE = 64
# File systems on which locks, atomic renames or sockets may fail. WSL mounts Windows disks as 9p.
_NETWORK = re.compile(r"(fuse\.)?(nfs\d?|cifs|smb\w*|afs|afpfs|9p|ceph|glusterfs|lustre|gpfs|beegfs|davfs|webdav|sshfs|s3fs)")
_OF_A_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})\.(json|[0-9a-f]{32}\.tmp)")
_SOCKET = re.compile(r"[0-9a-f]{16}\.sock")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `remedy` is a shell command that fixes the problem, or None."""

    level: Literal["ok", "warning", "failure"]
    topic: str
    text: str
    remedy: str | None = None


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
    checks += [_runtime_directory, _log_directory, _socket_path, _round_trip, _daemons]
    namespace = namespace or Namespace()
    findings: list[Finding] = []
    for check in checks:
        try:
            for finding in check(namespace):
                findings.append(finding)  # noqa: PERF402 - what was found before a check failed is kept
        except Exception as error:
            topic = check.__name__.strip("_").replace("_", " ")
            remedy = error.remedy if isinstance(error, UnsafeDirectory) else None
            findings.append(Finding("failure", topic, f"the check failed: {_describe(error)}", remedy))
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
            remedy = f"{_quote(sys.executable)} -m pip install --force-reinstall {name}"
            yield Finding("failure", name, f"it can't be imported: {_describe(error)}", remedy)


def _processes(_: Namespace) -> Iterator[Finding]:
    if why := processes.why_identity_is_unavailable():
        yield Finding("failure", "processes", f"{why}: no daemon can start, or be signalled", "mount -t proc proc /proc")
    else:
        yield Finding("ok", "processes", "they can be identified")


# Directories.


def _runtime_directory(namespace: Namespace) -> Iterator[Finding]:
    why = runtime_root()[1]
    yield _directory("runtime directory", namespace.runtime_dir, why, "HARNESS_IPC_RUNTIME_DIR", 0o077)


def _log_directory(namespace: Namespace) -> Iterator[Finding]:
    variable = "HARNESS_IPC_LOG_DIR"
    why = f"{variable} is set" if os.environ.get(variable) else "the platform's directory for logs"
    if namespace.log_dir.startswith(namespace.runtime_dir):
        why = "in the runtime directory, since HOME is not a directory"
    # Others may read its directory but not write to it, as in `open_private_log`.
    finding = _directory("log directory", namespace.log_dir, why, variable, files.LOG_DIRECTORY)
    if finding.level == "ok" and sys.platform == "win32" and _is_of_store() and "\\appdata\\" in namespace.log_dir.lower():
        text = f"{finding.text}; Python from the Store sees a private copy of AppData, so other programs don't find the logs"
        finding = Finding("warning", "log directory", text, _set(variable, r"%USERPROFILE%\.harness-ipc\log"))
    yield finding


def _is_of_store() -> bool:
    return "\\windowsapps\\" in f"{sys.base_prefix}\\".lower()


def _directory(topic: str, path: str, why: str, variable: str, forbidden: int) -> Finding:
    try:
        exists = files.check_private_dir(path, forbidden=forbidden)
        trust.check_ancestors(path)
    except UnsafeDirectory as error:
        return Finding("failure", topic, f"{_without_remedy(error)} ({why})", error.remedy)
    elsewhere = _set(variable, "<a directory of your own on a local disk>")
    text, place = f"{path} ({why})", path
    if exists:
        if sys.platform != "win32":
            info = os.stat(path)
            text += f", owner uid {info.st_uid}, mode {info.st_mode & 0o7777:04o}"
            if info.st_mode & 0o300 != 0o300:
                return Finding("failure", topic, f"{text}: you can't write there", f"chmod 700 {_quote(path)}")
    else:
        # A missing Windows drive has no parent.
        while not os.path.lexists(place) and place != os.path.dirname(place):
            place = os.path.dirname(place)
        text += ", will be created at the first start"
    if not os.path.isdir(place):
        return Finding("failure", topic, f"{text}, but {place} is not a directory", elsewhere)
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return Finding("failure", topic, f"{text}, but {place} can't be written", trust.give_back(path) or elsewhere)
    kind = _file_system(place)
    if kind is not None:
        text += f", on {kind}"
        if _NETWORK.fullmatch(kind):
            return Finding("warning", topic, f"{text}, a network file system: locks and sockets may fail there", elsewhere)
    if (free := shutil.disk_usage(place).free) < _LOW_SPACE:
        return Finding("warning", topic, f"{text}: its disk is full ({free} bytes free): make room", elsewhere)
    return Finding("ok", topic, text)


def _file_system(path: str) -> str | None:
    if sys.platform == "win32":
        return None
    import psutil

    try:
        partitions = psutil.disk_partitions(all=True)
    except OSError:
        # Linux without /proc.
        return None
    real = os.path.realpath(path) + "/"
    # The last first: a later mount hides an earlier one at the same path.
    mounts = [
        (len(mount.mountpoint), mount.fstype)
        for mount in reversed(partitions)
        if real.startswith(mount.mountpoint.rstrip("/") + "/")
    ]
    return max(mounts, key=lambda mount: mount[0])[1] if mounts else None


if sys.platform == "win32":

    def _socket_path(_: Namespace) -> Iterator[Finding]:
        # A pipe is not in the file system.
        return iter(())

    def _trial_parent() -> str | None:
        return None

else:
    MAX_ADDRESS = listen.MAX_ADDRESS

    def _socket_path(namespace: Namespace) -> Iterator[Finding]:
        topic = "socket path"
        length = _socket_length(namespace.runtime_dir)
        if length <= MAX_ADDRESS:
            yield Finding("ok", topic, f"{length} bytes, the operating system allows {MAX_ADDRESS}")
            return
        short = private_temporary_dir()
        text = f"{length} bytes in the runtime directory, the operating system allows {MAX_ADDRESS}"
        remedy = _set("HARNESS_IPC_RUNTIME_DIR", "<a directory with a shorter path>")
        if _socket_length(short) > MAX_ADDRESS:
            yield Finding("failure", topic, f"{text}, and {short} is too long as well", remedy)
            return
        fallback = _directory(topic, short, "the short directory for sockets", "HARNESS_IPC_RUNTIME_DIR", 0o077)
        yield Finding(fallback.level, topic, f"{text}: instead, {fallback.text}", fallback.remedy)

    def _socket_length(directory: str) -> int:
        return len(os.fsencode(os.path.join(directory, f"{0:016x}.sock")))

    def _trial_parent() -> str | None:
        # The round trip must not fail because of a long TMPDIR, which daemons need not use.
        return None if _socket_length(os.path.join(tempfile.gettempdir(), "hi-12345678")) <= MAX_ADDRESS else "/tmp"  # noqa: S108


# The channel.


def _round_trip(_: Namespace) -> Iterator[Finding]:
    errors: list[Exception] = []
    with tempfile.TemporaryDirectory(prefix="hi-", dir=_trial_parent(), ignore_cleanup_errors=True) as directory:
        try:
            seconds = _timed_round_trip(directory, errors)
        except (HarnessIPCError, OSError) as error:
            # Often only one side knows why the connection failed.
            text = "; the other side: ".join(map(_describe, [error, *errors]))
            yield Finding("failure", "round trip", f"over {listen.FAMILY} it failed: {text}")
            return
    text = f"over {listen.FAMILY}, connected, authenticated and answered in {seconds * 1000:.1f} ms"
    yield Finding("ok", "round trip", text)


def _timed_round_trip(directory: str, errors: list[Exception]) -> float:
    address = listen.new_address(directory, records.new_generation_id())
    keys = Keys(os.urandom(32), address)
    deadline = _transport.deadline_after(_ROUND_TRIP)
    listener = listen.Listener(address)
    daemon = threading.Thread(target=_answer, args=(listener, keys, deadline, errors), name="harness-ipc-doctor", daemon=True)
    daemon.start()
    try:
        start = time.perf_counter()
        _ask(address, keys, deadline)
        return time.perf_counter() - start
    finally:
        if daemon.is_alive():
            listener.wake()
            daemon.join(_ROUND_TRIP)
        listener.close()


def _ask(address: str, keys: Keys, deadline: float) -> None:
    connection = _transport.connect(address, deadline)
    try:
        connection.deadline = deadline
        protocol = ClientProtocol(keys, _transport.Framing(), _MAX_MESSAGE)
        while not isinstance(event := protocol.next_event(), dict):
            if event == READY:
                protocol.send_request(_QUESTION)
            connection.send(protocol.data_to_send())
            if event is None:
                protocol.receive_data(connection.receive(protocol.frame_limit))
        if event != json.loads(_ANSWER):
            raise HarnessIPCError("the reply differs from the request")
    finally:
        connection.close()


def _answer(listener: listen.Listener, keys: Keys, deadline: float, errors: list[Exception]) -> None:
    try:
        with contextlib.closing(listener.accept_port()) as port:
            protocol = ServerProtocol(keys, Framing(), _MAX_MESSAGE)
            while not isinstance(event := protocol.next_event(), dict):
                if event is None:
                    _write(port, protocol, deadline)
                    data = port.wait(deadline, reading=True, limit=protocol.max_frame)
                    if data == b"":
                        raise ConnectionLost("the peer closed the connection")
                    if data is not None:
                        protocol.receive_data(data)
                    _transport.remaining(deadline)
            protocol.send_reply(_ANSWER)
            _write(port, protocol, deadline)
    except (HarnessIPCError, OSError) as error:
        errors.append(error)


def _write(port: listen.Port, protocol: ServerProtocol, deadline: float) -> None:
    for chunk in protocol.data_to_send():
        port.begin_write(chunk)
        while port.is_writing:
            _transport.remaining(deadline)
            port.wait(deadline, reading=False, limit=0)


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
                return Finding("failure", topic, f"{status.state}: {_without_remedy(error)}", error.remedy)
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
        lives, address = False, ""
        with contextlib.suppress(HarnessIPCError, OSError, ValueError):
            record = records.read_file(os.path.join(directory, entry), name)
            lives = name in living if kind == "json" else lifetime.is_living(record)
            address = record.address
        if kind == "json" and not address:
            continue
        if lives:
            used.add(address)
        else:
            if kind != "json":
                left[entry] = "left by a daemon that died while starting or draining", remedy
            if _SOCKET.fullmatch(socket := os.path.basename(address)):
                left[socket] = "the socket of a daemon that died", remedy
    for entry in entries:
        path = os.path.join(directory, entry)
        if _SOCKET.fullmatch(entry) and path not in used and entry not in left and _nobody_listens(path):
            left[entry] = "a socket without a record, where nobody listens", _remove(path)
        if entry in left and os.path.lexists(path):
            what, remedy = left[entry]
            yield Finding("warning", "leftovers", f"{path}: {what}", remedy)


def _nobody_listens(address: str) -> bool:
    # A daemon that ends removes its record a moment before its socket.
    try:
        _transport.connect(address, _transport.deadline_after(_ROUND_TRIP)).close()
    except DaemonNotRunning:
        return True
    except HarnessIPCError:
        pass
    return False


# Text and commands.


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _without_remedy(error: UnsafeDirectory) -> str:
    return str(error).removesuffix(f": run `{error.remedy}`")


def _stop(name: str, namespace: Namespace) -> str:
    app = "" if namespace.app == DEFAULT_APP else f" --app={namespace.app}"
    # argparse would take a name that begins with "-" for an option.
    return f"harness-ipc{app} stop --name{'=' if name.startswith('-') else ' '}{name}"


def _set(variable: str, value: str) -> str:
    return f"{'set' if sys.platform == 'win32' else 'export'} {variable}={value}"


def _remove(path: str) -> str:
    return f"{'del' if sys.platform == 'win32' else 'rm'} {_quote(path)}"


def _quote(path: str) -> str:
    return f'"{path}"' if sys.platform == "win32" else shlex.quote(path)


def _print_line(text: str) -> None:
    # Escape control characters, and characters that the console can't encode.
    shown = escape_control(text)
    encoding = sys.stdout.encoding or "ascii"
    print(shown.encode(encoding, "backslashreplace").decode(encoding))
