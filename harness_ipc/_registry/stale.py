"""What dead generations left, and how to tell: a record is moved aside and looked at again before it is removed."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys

from ..errors import IncompatibleDaemon
from . import files, processes, records
from .namespace import private_temporary_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .records import Record

# What link(2) fails with on a file system without hard links, or in a sandbox.
_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def remove_stale_files(directory: str, name: str) -> None:
    """Remove the drafts of dead generations, and their sockets. The caller holds the name lock."""
    for entry in os.listdir(directory):
        if entry.startswith(f"{name}.") and entry.endswith(".tmp"):
            path = os.path.join(directory, entry)
            with contextlib.suppress(OSError, ValueError, IncompatibleDaemon):
                if is_living(record := records.read_file(path)):
                    continue
                _remove_socket(record, name, directory)
            with contextlib.suppress(OSError):
                files.retry_on_sharing_violation(os.unlink, path)


def remove_dead(directory: str, name: str) -> Record | None:
    """Remove the record at the name's path, and the socket that it names. Return it instead if its process lives."""
    path = os.path.join(directory, f"{name}.json")
    if (living := read_living(path, name)) is not None:
        return living
    aside = os.path.join(directory, f"{name}.{records.new_generation_id()}.tmp")
    try:
        files.retry_on_sharing_violation(os.rename, path, aside)
    except FileNotFoundError:
        return None
    # Another process may have replaced it since it was read.
    if (living := read_living(aside, name)) is not None:
        create(aside, path)
    else:
        with contextlib.suppress(OSError, ValueError, IncompatibleDaemon):
            _remove_socket(records.read_file(aside), name, directory)
    with contextlib.suppress(OSError):
        files.retry_on_sharing_violation(os.unlink, aside)
    return living


def _remove_socket(record: Record, name: str, runtime_dir: str) -> None:
    # Only where, and as what, a generation's socket can be: a damaged record must not choose what is unlinked, and a copy of
    # another daemon's names a socket that is in use.
    directory, file = os.path.split(record.address)
    if record.name == name and file == f"{record.generation[:16]}.sock":
        with contextlib.suppress(OSError):
            if any(os.path.samefile(directory, place) for place in (runtime_dir, private_temporary_dir())):
                os.unlink(record.address)


def create(draft: str, path: str) -> bool:
    """Give `draft` the name `path`, or return False if that exists. On POSIX the file `draft` may stay."""
    try:
        # Windows' rename does not replace.
        files.retry_on_sharing_violation(os.rename if sys.platform == "win32" else os.link, draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # The empty file is nobody's record: for a moment the name is without one, and no other process creates it.
        try:
            files.write_private_file(path, b"")
        except FileExistsError:
            return False
        os.replace(draft, path)
    return True


def read_living(path: str, name: str) -> Record | None:
    """Return the record of `name` in the file `path` if its process lives. Raises as `files.read_private_file` does."""
    with contextlib.suppress(FileNotFoundError, ValueError, IncompatibleDaemon):
        record = records.read_file(path)
        if record.name == name and is_living(record):
            return record
    return None


def is_living(record: Record) -> bool:
    """Return whether the record's process lives. Where that can't be told: whether its socket accepts connections."""
    identity = record.public()
    if processes.find_process(identity) is not None:
        return True
    if sys.platform == "win32" or processes.why_unknown(identity) is None:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(record.address)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return True
