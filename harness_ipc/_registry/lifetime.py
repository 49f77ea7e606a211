"""A daemon's registration: the name lock, and the record that its holder writes.

Only one process at a time holds a name, even if a cleaner of old files removes the lock: a process that acquires the lock gives
way to the record of a living process, and creates its own record only where there is none.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import time

from ..errors import AlreadyRunning, DaemonNotRunning, HarnessIPCError, IncompatibleDaemon, StartFailed
from . import files, processes, records
from .locks import NameLock
from .namespace import Namespace, check_name, private_path, private_temporary_dir
from .records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# Seconds to wait for a lock, which another process may hold just to clean up, and between attempts at most.
_LOCK_TIMEOUT = 0.5
_RETRY_INTERVAL = 0.02
# Retries after another process has removed a file.
_TRIES = 20
# Seconds for other processes (on Windows, a virus scanner) to close the record before it becomes ready.
_READY_TIMEOUT = 5.0
# Seconds between updates of the files' times, which keep a cleaner of old files from removing them.
TOUCH_INTERVAL = 3600.0


class Registration:
    """A name that this process holds for one generation, until `release`.

    Its methods may be called from any thread, one at a time.
    """

    def __init__(
        self, name: str, *, generation: str, address: str, family: str, namespace: Namespace | None = None, **optional: Any
    ) -> None:
        """Acquire the name, and record that this process is starting. `optional`: `argv`, `cwd`, `environment`, `detached`.

        Raises `AlreadyRunning`, with the pid of the holder, `StartFailed` and `UnsafeDirectory`.
        """
        from .. import __version__

        check_name(name)
        self._namespace = namespace or Namespace()
        self._directory = self._namespace.runtime_dir
        files.create_private_dir(self._directory, tighten=True)
        own = {"schema": records.SCHEMA, "name": name, "generation": generation, "family": family, "address": address}
        fields = {
            **own,
            **processes.own_identity(),
            "authkey": os.urandom(32).hex(),
            "version": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            "started_at": time.time(),
            "argv": [sys.executable, *sys.orig_argv[1:]],
            "environment": {},
            "state": records.STARTING,
        }
        with contextlib.suppress(OSError):  # it may have been removed
            fields["cwd"] = os.getcwd()
        self.record = Record(fields | {key: value for key, value in optional.items() if value is not None})
        self._pid = os.getpid()
        self._path = os.path.join(self._directory, f"{name}.json")
        self._touched = time.monotonic()
        self._lock = self._acquire_name()
        self._lock.share_directory()

    def _acquire_name(self) -> NameLock:
        for _ in range(_TRIES):
            lock = _acquire(self._directory, self.record.name)
            try:
                self._write(self.record)
                # After the write: a process that locks a newer file now finds the record.
                if lock.is_current():
                    return lock
                self._unlink()
            except BaseException:
                lock.release()
                raise
            lock.release()
            time.sleep(random.random() * _RETRY_INTERVAL)  # noqa: S311 - no secret
        raise StartFailed(f"another program keeps removing the lock of {self.record.name!r} from {self._directory}: stop it")

    def report(self, progress: Any) -> None:
        """Record the progress of the app's start. Errors are ignored."""
        self.record = self.record.replace(progress=progress)
        with contextlib.suppress(HarnessIPCError, OSError):
            self._write(self.record)

    def publish(self, *, app_version: str | None, max_message: int) -> None:
        """Record that clients can connect. Raises `StartFailed`, or `AlreadyRunning` if another process holds the name."""
        record = self.record.replace(app_version=app_version, max_message=max_message, state=records.READY, progress=None)
        self._write(record)
        self.record = record

    def look(self) -> bool:
        """Restore a lock or a record that was removed, and return whether clients can find this generation.

        True if that is unknown, e.g. because of EMFILE, or while others can read the directory.
        """
        try:
            if not self._lock.is_current():
                self._lock.try_acquire()
            if not self._is_own():
                self._write(self.record)
            if time.monotonic() - self._touched >= TOUCH_INTERVAL:
                self._touch()
            return self.record.family != "AF_UNIX" or os.path.lexists(self.record.address)
        except AlreadyRunning:
            return False
        except (HarnessIPCError, OSError):
            return os.path.lexists(self._directory)

    def drain(self) -> None:
        """Record that clients can't connect while requests in flight finish. If the disk is full, remove the record."""
        with contextlib.suppress(HarnessIPCError, OSError):
            if self._pid == os.getpid() and self._is_own():
                self.record = self.record.replace(state=records.DRAINING)
                try:
                    self._write(self.record)
                except HarnessIPCError:
                    self._unlink()

    def release(self) -> None:
        """Remove the record and release the name. Idempotent. Does neither in a forked child: both are the parent's."""
        if self._pid == os.getpid():
            self._unlink()
        self._lock.release()

    def _is_own(self) -> bool:
        try:
            return records.read(self.record.name, namespace=self._namespace).generation == self.record.generation
        except (DaemonNotRunning, IncompatibleDaemon):
            return False

    def _unlink(self) -> None:
        with contextlib.suppress(HarnessIPCError):
            if self._is_own():
                files.remove(self._path)

    def _write(self, record: Record) -> None:
        """Write `record`. Raises `AlreadyRunning` if the name has the record of another living process, and `StartFailed`."""
        data = record.to_json()
        if len(data) > (limit := records.MAX_RECORD):
            size = f"{len(data)} bytes, the limit is {limit}"
            raise StartFailed(f"the record {self._path} has {size}: use a shorter command line, or add fewer variables")
        with files.start_failures(f"the record {self._path} can't be written", files.ANOTHER_PLACE):
            for _ in range(_TRIES):
                # A cleaner may have removed the draft.
                with contextlib.suppress(FileNotFoundError), _draft(self._directory, record.name, data) as draft:
                    if self._is_own():
                        timeout = _READY_TIMEOUT if record.state == records.READY else files.SHARING_TIMEOUT
                        files.retry_on_sharing_violation(os.replace, draft, self._path, seconds=timeout)
                        return
                    if files.move_if_absent(draft, self._path):
                        return
                    other = _remove_dead(self._directory, record.name)
                    if other is not None and other.generation != record.generation:
                        raise _already_running(record.name, other)
        raise StartFailed(f"another program keeps removing the record {self._path}: stop it")

    def _touch(self) -> None:
        """Update the times of all files that a cleaner must not remove, and of their directories."""
        self._touched = time.monotonic()
        self._lock.share_directory()
        paths = [f"{self._path.removesuffix('.json')}.lock", self._path, self._directory]
        if self.record.family == "AF_UNIX":
            paths += [self.record.address, os.path.dirname(self.record.address)]
        for path in paths:
            with contextlib.suppress(OSError):
                os.utime(path)


def cleanup_endpoint(name: str, *, namespace: Namespace | None = None) -> bool:
    """Remove the stale files of a dead daemon `name`; never those of a living one.

    Returns whether the name is free. False means that a daemon is running, and that nothing was removed. The lock file stays.
    Raises `UnsafeDirectory`, `StartFailed` or `InvalidName`.
    """
    directory = os.path.dirname(private_path(name, "json", namespace))
    if not os.path.lexists(directory):
        return True
    try:
        lock = _acquire(directory, name)
    except AlreadyRunning:
        return False
    try:
        return _remove_dead(directory, name) is None
    finally:
        lock.release()


def restore_record(record: Record, namespace: Namespace) -> None:
    """Rewrite the record of a daemon that has ended, so that it can be restarted. Never replaces another record."""
    with contextlib.suppress(OSError, HarnessIPCError), _draft(namespace.runtime_dir, record.name, record.to_json()) as draft:
        files.move_if_absent(draft, private_path(record.name, "json", namespace))


def is_living(record: Record) -> bool:
    """Return whether the record's process is alive, or if that is unknown, whether its socket accepts connections."""
    if sys.platform == "win32" or processes.why_unknown(record.public()) is None:
        return processes.find_process(record.public()) is not None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(record.address)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return True


def _acquire(directory: str, name: str) -> NameLock:
    """Acquire the lock of a name, if no living process holds the name, and remove drafts. Raises what `Registration` does."""
    lock = NameLock(os.path.join(directory, f"{name}.lock"))
    deadline = time.monotonic() + _LOCK_TIMEOUT
    try:
        while True:
            acquired = lock.try_acquire()
            living = _read_living(os.path.join(directory, f"{name}.json"), name)
            if acquired and living is None:
                _remove_drafts(directory, name)
                return lock
            if living is not None or time.monotonic() >= deadline:
                raise _already_running(name, living)
            time.sleep(_RETRY_INTERVAL / 2)
    except BaseException:
        lock.release()
        raise


def _already_running(name: str, living: Record | None) -> AlreadyRunning:
    pid = None if living is None else living.pid
    who = "a process that has no record" if pid is None else f"pid {pid}"
    return AlreadyRunning(f"the daemon {name!r} is already running: {who}; stop it first", pid=pid)


def _read_living(path: str, name: str) -> Record | None:
    """Return the record of `name` in the file `path` if its process is alive. Raises what `files.read_private_file` does."""
    with contextlib.suppress(FileNotFoundError, ValueError, IncompatibleDaemon):
        record = records.read_file(path, name)
        return record if is_living(record) else None
    return None


def _remove_dead(directory: str, name: str) -> Record | None:
    """Remove the record of `name` and its socket. If its process is alive, keep both and return the record."""
    path = os.path.join(directory, f"{name}.json")
    if (living := _read_living(path, name)) is None:
        with contextlib.suppress(FileNotFoundError):
            aside = _draft_path(directory, name)
            files.retry_on_sharing_violation(os.rename, path, aside)
            # Another process may have replaced the record since it was read.
            if (living := _read_living(aside, name)) is not None:
                files.move_if_absent(aside, path)
                files.remove(aside)
        _remove_drafts(directory, name)
    return living


def _remove_drafts(directory: str, name: str) -> None:
    """Remove the drafts of dead generations, and the sockets named in them. The caller holds the name lock."""
    for entry in files.list_private_dir(directory):
        if entry.startswith(f"{name}.") and entry.endswith(".tmp"):
            path = os.path.join(directory, entry)
            with contextlib.suppress(OSError, ValueError, IncompatibleDaemon):
                if is_living(record := records.read_file(path, name)):
                    continue
                # Only a path that a socket of a generation can have: a damaged record must not choose what is unlinked.
                place, socket_name = os.path.split(record.address)
                if socket_name == f"{record.generation[:16]}.sock" and any(
                    os.path.samefile(place, each) for each in (directory, private_temporary_dir())
                ):
                    os.unlink(record.address)
            files.remove(path)


def _draft_path(directory: str, name: str) -> str:
    return os.path.join(directory, f"{name}.{records.new_generation_id()}.tmp")


@contextlib.contextmanager
def _draft(directory: str, name: str, data: bytes) -> Iterator[str]:
    """Write `data` to a new file and yield its path. After the block the file is removed if it still exists."""
    draft = _draft_path(directory, name)
    try:
        files.write_private_file(draft, data)
        yield draft
    finally:
        files.remove(draft)
