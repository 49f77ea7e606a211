"""A lock on a file that others may remove: valid only while the file is at its path."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from .._descriptors import close_in_child
from ..errors import HarnessIPCError
from . import files

# The errors for a lock that another process holds. Wine sets no errno.
if sys.platform == "win32":
    import msvcrt

    _HELD = (0, errno.EACCES, errno.EDEADLK)
else:
    import fcntl

    _HELD = (errno.EWOULDBLOCK,)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


class NameLock:
    """The lock of one name, held from `try_acquire` until `release` or the end of the process.

    If a cleaner removes the file, the holder locks a new one, and keeps the lock on the removed file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._pid = os.getpid()
        self._descriptors: list[int] = []
        self._directory: int | None = None
        close_in_child(self)

    def try_acquire(self) -> bool:
        """Lock the file, creating it if missing. Return False if another process holds the lock.

        Raises `UnsafeDirectory` if others could read or replace the file, and `StartFailed` if it can't be opened or locked.
        """
        with files.start_failures(f"the lock {self._path} can't be acquired", files.ANOTHER_PLACE):
            return self._try_acquire()

    def _try_acquire(self) -> bool:
        while True:
            try:
                descriptor = files.open_private_file(self._path, os.O_RDWR | os.O_CREAT)
            except PermissionError as error:
                if sys.platform == "win32" and not isinstance(error, HarnessIPCError):
                    # Another process has opened it exclusively.
                    return False
                raise
            current = False
            try:
                if not _try_lock(descriptor):
                    return False
                if current := self._is_at_path(descriptor):
                    self._descriptors.append(descriptor)
                    return True
            finally:
                if not current:
                    os.close(descriptor)

    def is_current(self) -> bool:
        """Whether the file at the path is the locked one. Raises `UnsafeDirectory`."""
        return self._is_at_path(self._descriptors[-1])

    def _is_at_path(self, descriptor: int) -> bool:
        # On Windows a file that is open without FILE_SHARE_DELETE can't be removed or renamed.
        if sys.platform != "win32":
            info = os.fstat(descriptor)
            try:
                if files.file_fingerprint(self._path)[:2] != (info.st_dev, info.st_ino):
                    return False
            except FileNotFoundError:
                return False
        return True

    def share_directory(self) -> None:
        """Hold a shared lock on the directory too, unless a cleaner of old files has locked it.

        systemd-tmpfiles skips a locked directory; it ignores locks on files.
        """
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                if self._directory is None:
                    self._directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._directory, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def release(self) -> None:
        """Unlock the file. A forked child only closes its copies; its parent still holds the lock."""
        descriptors, self._descriptors = self._descriptors, []
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None
        for descriptor in descriptors:
            # Closing is not enough if forked children have the descriptor. On Windows no other process has the handle.
            if sys.platform != "win32" and self._pid == os.getpid():
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    close_inherited = release
