"""Names, directories and private files: where a daemon's things are and whether that place is safe. Not what they say.

Nothing here creates a directory unless the function's name says so, and nothing is remembered: the owner, the mode and the
links are checked at each use.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import time

from ._base import EXHAUSTED
from .errors import ConnectionLost, HarnessIPCError, InvalidName, ResourceExhausted, StartFailed, UnsafeDirectory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO, TypeVar

    T = TypeVar("T")

_APP = "harness-ipc"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_SET_DIRECTORIES = "set HARNESS_IPC_RUNTIME_DIR and HARNESS_IPC_LOG_DIR to directories that you can write"

# On Windows a reader that has a file open, or a virus scanner, makes replacing, removing or opening it fail for a moment.
_SHARING_RETRY = 1.0
_SHARING_STEP = 0.01

# Never through a link; O_NONBLOCK, because a FIFO in a file's place must not hang the open.
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | _SAFELY
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _SAFELY


def is_name(name: object) -> bool:
    """Return whether `name` may name a daemon or an application."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str, what: str = "a daemon name") -> str:
    """Return `name` if it may name a daemon or an application, else raise `InvalidName`."""
    if not is_name(name):
        shown = ascii(name)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
        raise InvalidName(f"{shown} is not {what}: use 1 to 64 of A-Z a-z 0-9 _ -")
    return name


def runtime_location() -> tuple[str, str]:
    """Return the root of the runtime directories and, for people, why it is this one. Checks and creates nothing."""
    override = os.environ.get("HARNESS_IPC_RUNTIME_DIR")
    if override:
        return override if os.path.isabs(override) else os.path.abspath(override), "HARNESS_IPC_RUNTIME_DIR is set"
    return _default_location()


def private_temporary_dir() -> str:
    """Return the short directory for a socket whose path would be too long in the runtime directory."""
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"{_APP}-{_user_id()}")


if sys.platform == "win32":

    def _user_id() -> str:
        return os.environ.get("USERNAME", "user")

    def _default_location() -> tuple[str, str]:
        import platformdirs

        return platformdirs.user_runtime_dir(_APP, appauthor=False), "the platform's directory for the user"

    def _problem(path: str, info: os.stat_result, kind: int, forbidden: int) -> tuple[str, str] | None:
        # The access list of the profile protects what is in it; only links are looked at here.
        if info.st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT:
            return "is a link", f'rmdir "{path}"'
        if stat.S_IFMT(info.st_mode) != kind:
            return "is not what belongs there", f'del "{path}"'
        return None

    def _make_readable(path: str) -> str:
        return f'icacls "{path}" /reset'

else:

    def _user_id() -> str:
        return str(os.geteuid())

    def _default_location() -> tuple[str, str]:
        # XDG_RUNTIME_DIR and TMPDIR differ between a login, cron, ssh, sudo and a sandbox of one user, and two directories
        # would be two daemons: what exists decides. The fallback stays in use once it is there, so that a later login,
        # which creates /run/user/<uid>, does not hide the daemons that were started before it.
        fallback = f"/tmp/{_APP}-runtime-{_user_id()}"  # noqa: S108 - its owner is checked at each use
        if _is_own_dir(fallback):
            return fallback, "it exists already, from before this user's login directory did"
        if sys.platform == "darwin":
            import pwd

            home = pwd.getpwuid(os.geteuid()).pw_dir
            return f"{home}/Library/Caches/TemporaryItems/{_APP}", "the platform's directory for the user"
        login = f"/run/user/{_user_id()}"
        if _is_own_dir(login):
            return f"{login}/{_APP}", "the user's login directory exists"
        return fallback, f"{login} does not exist"

    def _is_own_dir(path: str) -> bool:
        try:
            info = os.lstat(path)
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()

    def _problem(path: str, info: os.stat_result, kind: int, forbidden: int) -> tuple[str, str] | None:
        if info.st_mode & (0o170000 | forbidden) == kind and info.st_uid == os.geteuid():
            return None
        import shlex

        quoted = shlex.quote(path)
        if stat.S_ISLNK(info.st_mode):
            return "is a symbolic link", f"rm {quoted}"
        if info.st_uid != os.geteuid():
            return f"belongs to uid {info.st_uid}, not to {os.geteuid()}", f"sudo rm -r {quoted}"
        if stat.S_IFMT(info.st_mode) != kind:
            return "is not a directory" if kind == stat.S_IFDIR else "is not a regular file", f"rm -r {quoted}"
        remedy = f"chmod 700 {quoted}" if kind == stat.S_IFDIR else _make_readable(path)
        return f"has mode {stat.S_IMODE(info.st_mode):04o}", remedy

    def _make_readable(path: str) -> str:
        import shlex

        return f"chmod 600 {shlex.quote(path)}"


def check_private_dir(path: str, *, forbidden: int = 0o077) -> bool:
    """Return whether the directory `path` exists; raise `UnsafeDirectory` if it is there and not private.

    `forbidden` are the mode bits that it must not have.
    """
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        remedy = "export HARNESS_IPC_RUNTIME_DIR=<a directory of your own>"
        raise UnsafeDirectory(
            f"{path} can't be examined ({error.strerror}): run `{remedy}`", path=path, remedy=remedy
        ) from error
    _refuse(path, info, stat.S_IFDIR, forbidden)
    return True


def create_private_dir(path: str, *, forbidden: int = 0o077) -> None:
    """Create the directory `path` with mode 0700 if it is missing, then check it as `check_private_dir` does."""
    if os.path.isfile(path):
        raise StartFailed(f"{path} is a file in the place of a directory: move it away, or {_SET_DIRECTORIES}")
    if check_private_dir(path, forbidden=forbidden):
        return
    try:
        _make_dir(path)
    except OSError as error:
        raise StartFailed(f"{path} can't be created: {error.strerror}; {_SET_DIRECTORIES}") from error
    check_private_dir(path, forbidden=forbidden)


def _make_dir(path: str) -> None:
    parent = os.path.dirname(path)
    if not os.path.lexists(parent):
        _make_dir(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        # The umask may have taken away even the owner's rights.
        os.chmod(path, 0o700)


def private_file_stamp(path: str) -> tuple[int, ...]:
    """Return what tells this content of the file `path` from any other. Raises as `read_private_file` does."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConnectionLost(f"{path} can't be examined: {error.strerror}") from error
    _refuse(path, info, stat.S_IFREG, 0o077)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def read_private_file(path: str, limit: int) -> bytes:
    """Return up to `limit` + 1 bytes of a file that only this user can write and read.

    Raises `FileNotFoundError`, `UnsafeDirectory` if it is a link, foreign, open to others or can't be read, and
    `ResourceExhausted` if this process has no free descriptor or memory.
    """
    descriptor = open_private_file(path)
    try:
        # Not limit + 1 in any case: a buffer of that size costs more than all the rest.
        return os.read(descriptor, min(limit, os.fstat(descriptor).st_size) + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def open_log_for_reading(path: str) -> BinaryIO:
    """Open the log `path` as a private file is read: no link is followed, and only a regular file of this user is opened.

    Raises as `read_private_file` does.
    """
    # As `open_private_log` demands it.
    check_private_dir(os.path.dirname(path), forbidden=0o022)
    return open(open_private_file(path), "rb")


def open_private_file(path: str) -> int:
    """Open the file `path` for reading and return the descriptor. Raises as `read_private_file` does."""
    try:
        descriptor = retry_sharing(os.open, path, _READ)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in EXHAUSTED:
            # A link or another user's file: say so, not that it can't be opened.
            _refuse(path, os.lstat(path), stat.S_IFREG, 0o077)
        raise _unreadable(path, error) from error
    try:
        _refuse(path, os.fstat(descriptor), stat.S_IFREG, 0o077)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unreadable(path: str, error: OSError) -> HarnessIPCError:
    if error.errno in EXHAUSTED:
        return ResourceExhausted(
            f"{path} can't be read: {error.strerror}; close files or connections that are not used, or raise the limit"
        )
    if isinstance(error, PermissionError):
        return _unsafe(path, f"can't be read ({error.strerror})", _make_readable(path))
    return ConnectionLost(f"{path} can't be read: {error.strerror}")


def write_private_file(path: str, data: bytes) -> None:
    """Create the file `path`, which must not exist, with mode 0600 and `data` in it. Raises `OSError`."""
    with open(os.open(path, _CREATE, 0o600), "wb") as file:
        os.chmod(path, 0o600)
        file.write(data)


def open_private_log(path: str, *_: object) -> int:
    """Open the log `path` for appending, mode 0600, never through a link; in the form of `open`'s opener."""
    create_private_dir(os.path.dirname(path), forbidden=0o022)
    try:
        descriptor = os.open(path, _APPEND, 0o600)
    except OSError as error:
        raise StartFailed(
            f"the log {path} can't be opened: {error.strerror}; set HARNESS_IPC_LOG_DIR to a directory that you can write"
        ) from error
    try:
        _refuse(path, os.fstat(descriptor), stat.S_IFREG, 0o077)
        # The umask may have taken away even the owner's rights.
        os.chmod(path, 0o600)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def retry_sharing(action: Callable[..., T], *arguments: object) -> T:
    """Return ``action(*arguments)``, repeated briefly while Windows says that somebody else has the file open."""
    deadline = time.monotonic() + _SHARING_RETRY
    while True:
        try:
            return action(*arguments)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() >= deadline:
                raise
            time.sleep(_SHARING_STEP)


def _refuse(path: str, info: os.stat_result, kind: int, forbidden: int) -> None:
    problem = _problem(path, info, kind, forbidden)
    if problem:
        raise _unsafe(path, *problem)


def _unsafe(path: str, problem: str, remedy: str) -> UnsafeDirectory:
    return UnsafeDirectory(f"{path} {problem}, so it is not private to you: run `{remedy}`", path=path, remedy=remedy)
