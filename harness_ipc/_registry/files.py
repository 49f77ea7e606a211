"""Private directories and files: created, and checked at each use for owner, mode and links.

Writers tighten a mode that is too open. The error for an unsafe path contains a shell command that fixes it. No file is opened,
and no mode changed, through a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time

from ..errors import EXHAUSTED, ConnectionLost, HarnessIPCError, ResourceExhausted, StartFailed
from . import trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO, TypeVar

    T = TypeVar("T")

# Mode bits that must not be set: on a private directory or file, and on the directory of logs.
_PRIVATE = 0o077
LOG_DIRECTORY = 0o022

# Seconds to retry, and between retries: on Windows, a file that another process (a virus scanner) has open can't be replaced,
# removed or opened.
SHARING_TIMEOUT = 1.0
_SHARING_INTERVAL = 0.01

ANOTHER_PLACE = "make room, or set HARNESS_IPC_RUNTIME_DIR to a directory of your own on a local disk"

# O_NONBLOCK: opening a FIFO must not block.
NOFOLLOW_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

# Device and inode of the directories whose ancestors were checked, by path. As long as they are the same, no ancestor has been
# replaced: another user could not have moved this user's directory there.
_checked: dict[str, tuple[int, int]] = {}


def check_private_dir(path: str, *, forbidden: int = _PRIVATE) -> bool:
    """Return whether the directory `path` exists; raise `UnsafeDirectory` if it exists and is not private.

    `forbidden` are the mode bits that must not be set.
    """
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise trust.denied(path, error) from error
    trust.check_private(path, info, stat.S_IFDIR, forbidden)
    if _checked.get(path) != (identity := (info.st_dev, info.st_ino)):
        trust.check_ancestors(path)
        _checked[path] = identity
    return True


def list_private_dir(path: str) -> list[str]:
    """Return the names in the directory `path`, or none if it is missing. Raises `UnsafeDirectory` or `ResourceExhausted`."""
    if not check_private_dir(path):
        return []
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(path, error) from error


def create_private_dir(path: str, *, forbidden: int = _PRIVATE, tighten: bool = False) -> None:
    """Create the directory `path` and missing parents with mode 0700; check it like `check_private_dir`.

    With `tighten`, the mode bits `forbidden` of an existing directory of this user are cleared, with a warning.
    """
    if tighten and sys.platform != "win32":
        with contextlib.suppress(OSError):  # the check reports the problem
            if os.lstat(path).st_mode & forbidden and trust.may_close(path):
                trust.check_ancestors(path)
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW_FLAGS)
                try:
                    _tighten(path, descriptor, forbidden)
                finally:
                    os.close(descriptor)
    if check_private_dir(path, forbidden=forbidden):
        return
    trust.check_ancestors(path)
    remedy = trust.chown_remedy(path) or trust.relocation_remedy()
    advice = f"run `{remedy}`, or set HARNESS_IPC_RUNTIME_DIR and HARNESS_IPC_LOG_DIR to directories that you can write"
    with start_failures(f"{path} can't be created", advice):
        _make_dir(path)
    check_private_dir(path, forbidden=forbidden)


def _make_dir(path: str) -> None:
    parent = os.path.dirname(path)
    if parent != path and not os.path.isdir(parent):
        _make_dir(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        if sys.platform != "win32" and stat.S_IMODE(os.lstat(path).st_mode) & 0o700 != 0o700:
            # The umask has cleared the owner's bits too.
            os.chmod(path, 0o700, follow_symlinks=False)


def _tighten(path: str, descriptor: int, forbidden: int) -> None:
    """Clear the mode bits `forbidden` of a file or directory of this user, unless others can write to it."""
    info = os.fstat(descriptor)
    if sys.platform == "win32" or info.st_uid != os.geteuid() or not info.st_mode & forbidden or trust.others_can_write(info):
        return
    import logging

    mode = stat.S_IMODE(info.st_mode)
    os.fchmod(descriptor, mode & ~forbidden)
    logging.getLogger(__name__).warning("%s was open to others: its mode was %04o, now %04o", path, mode, mode & ~forbidden)


def file_fingerprint(path: str) -> tuple[int, ...]:
    """Return a fingerprint of the content of the file `path`. Raises what `read_private_file` does."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    trust.check_private(path, info, stat.S_IFREG, _PRIVATE)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def read_private_file(path: str, limit: int) -> bytes:
    """Return up to `limit` + 1 bytes of a file that only this user can write and read.

    Raises `FileNotFoundError`; `UnsafeDirectory` if it is a link, another user's, open to others or unreadable; and
    `ResourceExhausted` if this process has no free descriptor or memory.
    """
    descriptor = _open_for_reading(path)
    try:
        # Not always limit + 1: allocating such a buffer takes longer than all the rest.
        return os.read(descriptor, min(limit, os.fstat(descriptor).st_size) + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def open_log_for_reading(path: str) -> BinaryIO:
    """Open the log `path`, with the checks of a private file. Raises what `read_private_file` does."""
    check_private_dir(os.path.dirname(path), forbidden=LOG_DIRECTORY)
    return open(_open_for_reading(path), "rb")


def _open_for_reading(path: str) -> int:
    try:
        return retry_on_sharing_violation(open_private_file, path, os.O_RDONLY)
    except (FileNotFoundError, HarnessIPCError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> HarnessIPCError:
    if error.errno in EXHAUSTED:
        return ResourceExhausted(
            f"{path} can't be read: {error.strerror}; close files or connections that are not used, or raise the limit"
        )
    if isinstance(error, PermissionError):
        return trust.refusal(path, f"can't be read ({error.strerror})", trust.chmod_remedy(path))
    return ConnectionLost(f"{path} can't be read: {error.strerror}")


def open_private_file(path: str, flags: int, *, tighten: bool = False) -> int:
    """Open the file `path` with `flags`, never through a link, and return the descriptor. A new file has mode 0600.

    Raises `OSError`, and `UnsafeDirectory` if it is not a private regular file of this user. With `tighten`, the mode of one
    that others can only read is changed.
    """
    try:
        descriptor = _open(path, flags | NOFOLLOW_FLAGS)
    except OSError as error:
        if error.errno not in EXHAUSTED:
            # Report a link or another user's file as such.
            with contextlib.suppress(FileNotFoundError):
                file_fingerprint(path)
        raise
    try:
        if tighten:
            _tighten(path, descriptor, _PRIVATE)
        trust.check_private(path, os.fstat(descriptor), stat.S_IFREG, _PRIVATE)
        if flags & os.O_CREAT and sys.platform != "win32":
            # The umask may have cleared the owner's bits too.
            os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: str, flags: int) -> int:
    if sys.platform == "win32" and flags & os.O_APPEND:
        import _winapi
        import msvcrt

        # FILE_GENERIC_WRITE without FILE_WRITE_DATA, and FILE_READ_ATTRIBUTES: each write appends, also one of a child process,
        # where O_APPEND has no effect. FILE_SHARE_READ and FILE_SHARE_WRITE; OPEN_ALWAYS.
        return msvcrt.open_osfhandle(_winapi.CreateFile(path, 0x120194, 3, 0, 4, 0, 0), os.O_WRONLY | os.O_APPEND)
    return os.open(path, flags, 0o600)


def write_private_file(path: str, data: bytes) -> None:
    """Create the file `path` with mode 0600 and `data` in it. Raises `OSError`, also if it exists."""
    with open(open_private_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(data)


def move_if_absent(draft: str, path: str) -> bool:
    """Rename the file `draft` to `path`, or return False if that exists. On POSIX the name `draft` may stay."""
    try:
        # On Windows, rename does not replace.
        retry_on_sharing_violation(os.rename if sys.platform == "win32" else os.link, draft, path)
    except FileExistsError:
        return False
    return True


def remove(path: str) -> None:
    """Remove the file `path`, ignoring errors."""
    with contextlib.suppress(OSError):
        retry_on_sharing_violation(os.unlink, path)


def open_private_log(path: str) -> int:
    """Open the log `path` for appending, mode 0600, never through a link, and return the descriptor.

    Its directory is created if missing; others may read that, but not write. A log that others can only read is tightened.
    """
    create_private_dir(os.path.dirname(path), forbidden=LOG_DIRECTORY, tighten=True)
    try:
        return open_private_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, tighten=True)
    except HarnessIPCError:
        raise
    except OSError as error:
        raise log_failure(path, "opened", error) from error


def log_failure(path: str, what: str, error: OSError) -> StartFailed:
    """Return the error for a log that can't be `what`, such as "opened"."""
    todo = f"make room in {os.path.dirname(path)}, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StartFailed(
        f"the log {path} can't be {what}: {error.strerror}; {todo}set HARNESS_IPC_LOG_DIR to a directory that you can write"
    )


def retry_on_sharing_violation(action: Callable[..., T], *arguments: object, seconds: float = SHARING_TIMEOUT) -> T:
    """Return ``action(*arguments)``; on Windows, retry for `seconds` while another process has the file open."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action(*arguments)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() >= deadline:
                raise
            time.sleep(_SHARING_INTERVAL)


@contextlib.contextmanager
def start_failures(what: str, remedy: str) -> Iterator[None]:
    """Convert an `OSError` of the block to `StartFailed`, with `what` failed, the reason and the `remedy` in its text."""
    try:
        yield
    except HarnessIPCError:
        raise
    except OSError as error:
        raise StartFailed(f"{what}: {error.strerror}; {remedy}") from error
