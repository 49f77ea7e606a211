"""The record of one daemon generation: publish, load, discard; and the lifetime lock. It opens no connection.

A generation is one run of one daemon. Its address is new each time. Clients learn it from the record, which is a file
``<name>.json`` in the runtime directory, renamed into place after the listener is bound.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

from . import paths
from ._registry import processes
from ._registry.namespace import Namespace, private_path
from .errors import AlreadyRunning, DaemonNotRunning, HarnessIPCError, IncompatibleDaemon, StartFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import psutil
    from filelock import BaseFileLock

SCHEMA = 1
# A record is about 600 bytes and argv; Linux allows 128 KiB for one argument (execve(2), MAX_ARG_STRLEN).
_MAX_RECORD = 256 * 1024

# Seconds since 1970, far beyond any clock and within what a float and a datetime can hold: the year 9999.
_END_OF_TIME = 253_402_300_800

# What a daemon can be doing while clients can't find it, and the endings of the files that then say which process it is.
PHASES = ("starting", "draining")
# Seconds for a process that holds the lifetime lock only to clean up.
_LOCK_PATIENCE = 0.5

_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "generation": (str,),
    "family": (str,),
    "address": (str,),
    "authkey": (str,),
    "pid": (int,),
    "create_time": _NUMBER,
    "version": (str,),
    "python": (str,),
    "started_at": _NUMBER,
    "argv": (list,),
    "max_message": (int,),
    "state": (str,),
}
# What a record may lack: that of a system that does not tell, or of an earlier version.
_OPTIONAL_TYPES: dict[str, tuple[type, ...]] = {
    "start_ticks": (int,),
    "boot_id": (str,),
    "pid_namespace": (str,),
    "time_namespace": (str,),
}


class Record:
    """What a client has to know to reach one generation of a daemon, and what a person wants to know about it."""

    __slots__ = ("_authkey", "_fields")

    def __init__(self, fields: dict[str, Any]) -> None:
        """Take the fields of a record's file. Raises `ValueError` that says which one is wrong."""
        for key, kinds in _TYPES.items():
            # Not isinstance: to that, True is a pid.
            if type(fields.get(key)) not in kinds:
                raise ValueError(f"its {key} is missing or of a wrong type")
        for key, kinds in _OPTIONAL_TYPES.items():
            if key in fields and type(fields[key]) not in kinds:
                raise ValueError(f"its {key} is of a wrong type")
        if fields["pid"] <= 0 or fields["max_message"] <= 0:
            raise ValueError("its pid or max_message is not positive")
        if not (0 <= fields["create_time"] < _END_OF_TIME and 0 <= fields["started_at"] < _END_OF_TIME):
            raise ValueError("its create_time or started_at is no time")
        if not fields["address"] or "\0" in fields["address"]:
            raise ValueError("its address is not usable")
        # As the keys are derived from it; raises UnicodeError, a ValueError.
        fields["address"].encode("utf-8", "surrogateescape")
        try:
            self._authkey = bytes.fromhex(fields["authkey"])
        except ValueError:
            self._authkey = b""
        if len(self._authkey) != 32:
            # Without the original's text: it may quote the key.
            raise ValueError("its authkey is not 64 hexadecimal digits") from None
        self._fields = {**fields}
        del self._fields["authkey"]

    @property
    def name(self) -> str:
        return str(self._fields["name"])

    @property
    def generation(self) -> str:
        return str(self._fields["generation"])

    @property
    def family(self) -> str:
        return str(self._fields["family"])

    @property
    def address(self) -> str:
        return str(self._fields["address"])

    @property
    def authkey(self) -> bytes:
        return self._authkey

    @property
    def pid(self) -> int:
        return int(self._fields["pid"])

    @property
    def max_message(self) -> int:
        """The largest message, in bytes, that the daemon takes."""
        return int(self._fields["max_message"])

    def public(self) -> dict[str, Any]:
        """Return every field but the authkey: for reports."""
        return dict(self._fields)

    def to_json(self) -> bytes:
        """Return the content of the record's file, with the authkey."""
        return json.dumps({**self._fields, "authkey": self._authkey.hex()}, indent=1).encode("ascii") + b"\n"

    def __repr__(self) -> str:
        return f"<Record {self.name!r} generation={self.generation!r} pid={self.pid} address={self.address!r}>"


# What was read last, by path, with what the file system said of the file. Parsing is most of the cost of finding a daemon, and
# a file with the same identity, times and size is the same record: publishing always makes a new file.
_read_last: dict[str, tuple[tuple[int, ...], Record]] = {}


def load(name: str, *, again: bool = False, namespace: Namespace | None = None) -> Record:
    """Return the published record of the daemon `name`. Creates nothing. `again` reads it even if it seems unchanged.

    Raises `DaemonNotRunning` if there is none or if it is damaged, `IncompatibleDaemon` if a later version wrote it, and
    `UnsafeDirectory` if it could have been planted or read by somebody else.
    """
    path = private_path(name, "json", namespace)
    try:
        # Taken before the content is read: a record that is replaced in between is read again next time.
        stamp = paths.private_file_stamp(path)
        last = _read_last.get(path)
        if last is not None and last[0] == stamp and not again:
            return last[1]
        data = paths.read_private_file(path, _MAX_RECORD)
    except FileNotFoundError:
        raise DaemonNotRunning(f"no daemon {name!r} is running: start it first") from None
    try:
        record = _parse(data)
        if record.name != name:
            raise ValueError("it names another daemon")
    except ValueError as error:
        raise DaemonNotRunning(
            f"the record {path} is damaged ({error}): start the daemon {name!r} again, which replaces it"
        ) from None
    _read_last[path] = stamp, record
    return record


def _parse(data: bytes) -> Record:
    """Return the record in `data`. Raises `ValueError` in words that never quote `data`, and `IncompatibleDaemon`."""
    if len(data) > _MAX_RECORD:
        raise ValueError(f"it is larger than {_MAX_RECORD} bytes")
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    schema = fields.get("schema")
    if type(schema) is not int:
        raise ValueError("its schema is missing or of a wrong type")
    if schema != SCHEMA:
        raise IncompatibleDaemon(
            f"the daemon's record has schema {str(schema)[:20]}, this version knows {SCHEMA}: "
            "use the version of harness_ipc that started the daemon, also to stop it"
        )
    return Record(fields)


class Generation:
    """A daemon's own hold on its name for one run: prepared before the bind, published after it, discarded at the end."""

    def __init__(
        self,
        name: str,
        *,
        family: str,
        address: str,
        generation: str,
        app_version: str | None,
        max_message: int,
        detached: str | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        """Write down the generation under a temporary name, so that a crash before `publish` can be cleaned up too."""
        fields: dict[str, Any] = {
            "schema": SCHEMA,
            "name": paths.check_name(name),
            "generation": generation,
            "family": family,
            "address": address,
            "authkey": os.urandom(32).hex(),
            **_own_identity(),
            "version": _version(),
            "app_version": app_version,
            "python": ".".join(map(str, sys.version_info[:3])),
            "started_at": time.time(),
            "argv": [sys.executable, *sys.orig_argv[1:]],
            "cwd": _own_cwd(),
            "detached": detached,
            "max_message": max_message,
            "state": "ready",
        }
        self.record = Record({key: value for key, value in fields.items() if value is not None})
        self._namespace = namespace or Namespace()
        self._path = private_path(name, "json", self._namespace)
        self._draft = private_path(name, f"{generation}.tmp", self._namespace)
        self._draining = private_path(name, "draining", self._namespace)
        try:
            paths.write_private_file(self._draft, self.record.to_json())
        except OSError as error:
            self._forget_draft()
            raise StartFailed(f"the record {self._draft} can't be written: {error.strerror}; make room or set "
                              "HARNESS_IPC_RUNTIME_DIR to another directory") from error  # fmt: skip

    def publish(self) -> None:
        """Put the record in its place, atomically. Only now can clients find the daemon."""
        try:
            paths.retry_sharing(os.replace, self._draft, self._path)
        except OSError as error:
            self._forget_draft()
            raise StartFailed(f"the record {self._path} can't be published: {error.strerror}; remove it by hand, then "
                              "start again") from error  # fmt: skip
        forget_start(self.record.name, self._namespace)

    def is_published(self) -> bool:
        """Whether clients still find this generation."""
        try:
            found = load(self.record.name, namespace=self._namespace).generation == self.record.generation
        except DaemonNotRunning:
            return False
        except (HarnessIPCError, OSError):
            # It can't be told now, for want of descriptors perhaps.
            return True
        return found and (self.record.family != "AF_UNIX" or os.path.exists(self.record.address))

    def withdraw(self) -> None:
        """Let no client find this generation any more. Until `discard`, another name of the record tells who still drains."""
        self._forget_draft()
        if self._is_ours(self._path):
            with contextlib.suppress(OSError):
                paths.retry_sharing(os.replace, self._path, self._draining)

    def discard(self) -> None:
        """Remove all that was written of this generation, and nothing of a successor's."""
        self._forget_draft()
        for path in (self._path, self._draining):
            if self._is_ours(path):
                with contextlib.suppress(OSError):
                    paths.retry_sharing(os.unlink, path)

    def _is_ours(self, path: str) -> bool:
        try:
            return _parse(paths.read_private_file(path, _MAX_RECORD)).generation == self.record.generation
        except (OSError, ValueError, IncompatibleDaemon):
            return False

    def _forget_draft(self) -> None:
        with contextlib.suppress(OSError):
            paths.retry_sharing(os.unlink, self._draft)


def lock_lifetime(name: str, *, namespace: Namespace | None = None) -> BaseFileLock:
    """Take the lifetime lock of the daemon `name`, creating the runtime directory if need be. Waits for no daemon.

    It ends with `release()` or with the process, however that ends. Raises `AlreadyRunning`, naming the pid that holds it.
    """
    import filelock

    namespace = namespace or Namespace()
    directory = namespace.runtime_dir
    path = os.path.join(directory, f"{paths.check_name(name)}.lock")
    paths.create_private_dir(directory)
    # thread_local=False: it is taken in one thread and released in another.
    lock = filelock.FileLock(path, mode=0o600, thread_local=False)
    try:
        # Somebody may hold it for a moment only, to clean up: see `cleanup_endpoint`. Who serves does not let go.
        if not _acquire(lock, 0.0) and (_living_pid(name, namespace) or not _acquire(lock, _LOCK_PATIENCE)):
            pid = _living_pid(name, namespace)
            who = f"pid {pid}" if pid else "a process that has not published its record, or has withdrawn it"
            raise AlreadyRunning(f"the daemon {name!r} is already running: {who}; stop it first", pid=pid)
    except OSError as error:
        raise StartFailed(
            f"the lock {path} can't be taken: {error.strerror}; set HARNESS_IPC_RUNTIME_DIR to a directory that you can write"
        ) from error
    return lock


def _acquire(lock: BaseFileLock, timeout: float) -> bool:
    import filelock

    try:
        lock.acquire(timeout=timeout, poll_interval=0.01)
    except filelock.Timeout:
        return False
    return True


def cleanup_endpoint(name: str, *, namespace: Namespace | None = None) -> bool:
    """Remove what a dead generation of the daemon `name` left behind, and nothing of a living one.

    Returns whether the name is free now: False means that a daemon is running, and that nothing was touched. The lock file
    stays, since removing it would let two daemons hold "the" lock.
    """
    namespace = namespace or Namespace()
    paths.check_name(name)
    if not paths.check_private_dir(namespace.runtime_dir):
        return True
    try:
        lock = lock_lifetime(name, namespace=namespace)
    except AlreadyRunning:
        return False
    try:
        remove_leavings(name, namespace)
        forget_start(name, namespace)
    finally:
        lock.release()
    return True


def remove_leavings(name: str, namespace: Namespace) -> None:
    """Remove the records, drafts and sockets of dead generations. The caller holds the lifetime lock."""
    directory = os.path.dirname(private_path(name, "json", namespace))
    for entry in os.listdir(directory):
        if entry in (f"{name}.json", f"{name}.draining") or (entry.startswith(f"{name}.") and entry.endswith(".tmp")):
            path = os.path.join(directory, entry)
            with contextlib.suppress(OSError, ValueError, IncompatibleDaemon):
                record = _parse(paths.read_private_file(path, _MAX_RECORD))
                # A copy of another daemon's record names a socket that is in use.
                if record.name == name:
                    _remove_socket(record, directory)
            with contextlib.suppress(OSError):
                paths.retry_sharing(os.unlink, path)


def _remove_socket(record: Record, runtime_dir: str) -> None:
    # Only where, and as what, a generation's socket can be: a damaged record must not choose what is unlinked.
    directory, name = os.path.split(record.address)
    if name == f"{record.generation[:16]}.sock":
        with contextlib.suppress(OSError):
            if any(os.path.samefile(directory, place) for place in (runtime_dir, paths.private_temporary_dir())):
                os.unlink(record.address)


def note_start(name: str, namespace: Namespace) -> None:
    """Write down that this process, which holds the lifetime lock of `name`, is starting. Raises `StartFailed`."""
    path, draft = (private_path(name, ext, namespace) for ext in ("starting", f"{new_generation_id()}.tmp"))
    try:
        paths.write_private_file(draft, json.dumps({**_own_identity(), "started_at": time.time()}).encode())
        paths.retry_sharing(os.replace, draft, path)
    except OSError as error:
        raise StartFailed(f"the note {path} can't be written: {error.strerror}; make room or set HARNESS_IPC_RUNTIME_DIR to "
                          "another directory") from error  # fmt: skip


def forget_start(name: str, namespace: Namespace) -> None:
    """Remove the note. The caller holds the lifetime lock."""
    with contextlib.suppress(OSError):
        paths.retry_sharing(os.unlink, private_path(name, "starting", namespace))


def read_note(path: str) -> tuple[dict[str, Any], psutil.Process | None]:
    """Return the fields of a draft or a note of a start or a drain, {} if it is unreadable, and the process if that lives."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        note = json.loads(paths.read_private_file(path, _MAX_RECORD))
        if not 0 <= note.get("started_at", 0) < _END_OF_TIME:
            raise ValueError("its started_at is no time")
        return note, processes.find_process(note)
    return {}, None


def load_phase(name: str, phase: str, namespace: Namespace) -> tuple[psutil.Process, float] | None:
    """Return the process that is "starting" or "draining" as the daemon `name`, and when it started in seconds since 1970."""
    with contextlib.suppress(OSError, KeyError):
        note, process = read_note(private_path(name, phase, namespace))
        if process is not None:
            return process, float(note["started_at"])
    return None


def find_unrecorded(name: str, namespace: Namespace) -> tuple[psutil.Process, float, str] | None:
    """Return what `load_phase` does, and which phase it is, for the one process that is in either."""
    for phase in PHASES:
        if (noted := load_phase(name, phase, namespace)) is not None:
            return *noted, phase
    return None


def _living_pid(name: str, namespace: Namespace) -> int | None:
    with contextlib.suppress(HarnessIPCError, OSError):
        record = load(name, namespace=namespace)
        if processes.find_process(record.public()) is not None:
            return record.pid
    noted = find_unrecorded(name, namespace)
    return noted[0].pid if noted is not None else None


def _own_identity() -> dict[str, Any]:
    try:
        return processes.own_identity()
    except OSError as error:
        raise StartFailed(f"this process can't be identified: {error}; mount /proc in this container or chroot") from error


def _own_cwd() -> str | None:
    # It may have been removed.
    with contextlib.suppress(OSError):
        return os.getcwd()
    return None


def _version() -> str:
    from . import __version__

    return __version__


def new_generation_id() -> str:
    """Return a new unguessable name for a generation: 32 hexadecimal digits."""
    return os.urandom(16).hex()
