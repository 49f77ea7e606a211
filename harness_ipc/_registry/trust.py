"""Checks whether other users could replace or read a path, and returns a shell command that fixes it. Changes nothing.

On Windows there is little to check: the access control list of the user's profile protects the files in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys

from ..errors import UnsafeDirectory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# The limit of Linux (path_resolution(7)).
_MAX_LINKS = 40
_SHARED_IN = ("/", "/home", "/private", "/private/var", "/run", "/Users", "/var", "/var/cache", "/var/lib", "/var/spool")
_SHARED_TREES = ("/bin/", "/boot/", "/dev/", "/etc/", "/lib/", "/proc/", "/sbin/", "/sys/", "/usr/")
# What a word of a shell command may have besides letters and digits: `str.translate` removes it.
_UNQUOTED = dict.fromkeys(map(ord, "@%+=:,./-_"))

_homes: dict[int, str | None] = {}


def refusal(path: str, problem: str, remedy: str) -> UnsafeDirectory:
    """Return the error for `path`, which has the `problem`."""
    return UnsafeDirectory(f"{path} {problem}, so it is not private to you: run `{remedy}`", path=path, remedy=remedy)


def home() -> str | None:
    """Return the home directory in passwd, which is the same for all processes of this user, or None."""
    if sys.platform == "win32":
        return None
    uid = os.geteuid()
    if uid not in _homes:
        import pwd

        try:
            found = pwd.getpwuid(uid).pw_dir
        except KeyError:
            found = ""
        _homes[uid] = found if os.path.isabs(found) and found.strip("/") else None
    return _homes[uid]


def check_ancestors(path: str) -> None:
    """Raise `UnsafeDirectory` if another user could replace `path` by replacing one of its parent directories.

    Each must belong to root, to the owner of ``/`` or to this user, and must not be writable by others unless it is sticky.
    Links are checked, and so are their targets. Missing directories are ignored.
    """
    if sys.platform == "win32":
        return
    uid = os.geteuid()
    writable: list[tuple[str, int]] = []
    try:
        for entry, info in _walk(os.path.dirname(path)):
            if info.st_uid not in (0, uid, os.lstat("/").st_uid):
                remedy = _home_remedy(info.st_uid, uid) or relocation_remedy()
                raise refusal(path, f"is in {entry}, which belongs to uid {info.st_uid}", remedy)
            if not stat.S_ISLNK(info.st_mode) and not info.st_mode & stat.S_ISVTX and others_can_write(info):
                writable.append((entry, info.st_uid))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnsafeDirectory:
        raise
    except OSError as error:
        raise denied(path, error) from error
    if writable:
        entries = [entry for entry, _ in writable]
        ours = all(owner == uid and not is_shared(entry) for entry, owner in writable)
        remedy = f"chmod go-w {' '.join(map(_quote, entries))}" if ours else relocation_remedy()
        raise refusal(path, f"is in {entries[0]}, where others can write", remedy)


def _walk(path: str, links: int = 0) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each directory and link on the way to `path`, and its status; targets of links too."""
    if links > _MAX_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    parent = os.path.dirname(path)
    if parent != path:
        yield from _walk(parent, links)
    info = os.lstat(path)
    yield path, info
    if stat.S_ISLNK(info.st_mode):
        yield from _walk(os.path.join(parent, os.readlink(path)), links + 1)


def others_can_write(info: os.stat_result) -> bool:
    """Return whether another user can write there. A private group of this user does not count."""
    return bool(info.st_mode & stat.S_IWOTH) or bool(info.st_mode & stat.S_IWGRP and not _is_own_group(info.st_gid))


def _is_own_group(gid: int) -> bool:
    """Return whether the group is this user's private group, without other members (umask 002)."""
    if sys.platform == "win32":
        return False
    import grp
    import pwd

    try:
        me, members = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid).gr_mem
    except KeyError:
        return False
    others = (user for user in pwd.getpwall() if user.pw_gid == gid and user.pw_uid != me.pw_uid)
    return me.pw_gid == gid and set(members) <= {me.pw_name} and not any(others)


def is_shared(path: str) -> bool:
    """Return whether other programs depend on the mode of the directory `path`: a system directory, or a home."""
    real, own = os.path.realpath(path), home()
    above_home = own is not None and f"{os.path.realpath(own)}/".startswith(f"{real}/")
    return above_home or os.path.dirname(real) in _SHARED_IN or f"{real}/".startswith(_SHARED_TREES)


def may_close(path: str) -> bool:
    """Return whether others may be denied the directory `path`: no other program depends on it or on a directory in it."""
    try:
        with os.scandir(path) as entries:
            inside = any(entry.is_dir(follow_symlinks=False) and entry.stat().st_mode & 0o055 for entry in entries)
    except OSError:
        inside = False
    return not inside and not is_shared(path)


def check_private(path: str, info: os.stat_result, kind: int, forbidden: int) -> None:
    """Raise `UnsafeDirectory` unless `path` is a file or directory (`kind`) of this user without the mode bits `forbidden`."""
    if sys.platform == "win32":
        if info.st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT:
            raise refusal(path, "is a link", f'rmdir "{path}"')
        if stat.S_IFMT(info.st_mode) != kind:
            raise refusal(path, "is of another type", f'move "{path}" "{path}.old"')
        return
    uid = os.geteuid()
    if info.st_mode & (0o170000 | forbidden) == kind and info.st_uid == uid:
        return
    quoted = _quote(path)
    if stat.S_ISLNK(info.st_mode):
        raise refusal(path, "is a symbolic link", f"rm {quoted}" if info.st_uid == uid else f"sudo rm {quoted}")
    if info.st_uid != uid:
        raise refusal(path, f"belongs to uid {info.st_uid}, not to {uid}", _ownership_remedy(path, info, uid))
    if stat.S_IFMT(info.st_mode) != kind:
        raise refusal(path, f"is not a {'directory' if kind == stat.S_IFDIR else 'regular file'}", f"mv {quoted} {quoted}.old")
    remedy = chmod_remedy(path) if kind == stat.S_IFREG or may_close(path) else relocation_remedy()
    raise refusal(path, f"has mode {stat.S_IMODE(info.st_mode):04o}", remedy)


def denied(path: str, error: OSError) -> UnsafeDirectory:
    """Return the error for a path that this user can't examine."""
    return refusal(path, f"can't be examined ({error.strerror})", chown_remedy(path) or relocation_remedy())


def chmod_remedy(path: str) -> str:
    """Return the remedy for an unreadable file or directory of this user."""
    if sys.platform == "win32":
        return f'icacls "{path}" /reset'
    return f"chmod {700 if os.path.isdir(path) else 600} {_quote(path)}"


def _ownership_remedy(path: str, info: os.stat_result, uid: int) -> str:
    """Return the remedy for the user `uid` if `path` belongs to another user."""
    if remedy := _home_remedy(info.st_uid, uid):
        return remedy
    if info.st_uid == 0 and not is_shared(path):
        return chown_remedy(path) or f"sudo chown -R {uid} {_quote(path)}"
    if not stat.S_ISDIR(info.st_mode):
        return f"sudo rm {_quote(path)}"
    # In a sticky directory such as /tmp it was planted, and can be removed. Elsewhere it may be needed.
    planted = os.stat(os.path.dirname(path)).st_mode & stat.S_ISVTX
    return f"sudo rm -r {_quote(path)}" if planted else relocation_remedy()


def chown_remedy(path: str) -> str | None:
    """Return the remedy if `path`, or a parent directory, was created with sudo in a directory of this user."""
    if sys.platform == "win32":
        return None
    made_by_root = None
    while (parent := os.path.dirname(path)) != path:
        with contextlib.suppress(OSError):  # it can't be examined, but a parent can
            if os.lstat(path).st_uid == 0 and os.lstat(parent).st_uid == os.geteuid() != 0:
                made_by_root = f"sudo chown -R {os.geteuid()} {_quote(path)}"
        path = parent
    return made_by_root


def _home_remedy(owner: int, uid: int) -> str | None:
    """Return the remedy for root with the `HOME` of the user `owner` (sudo without -H)."""
    with contextlib.suppress(OSError):
        if uid == 0 != owner == os.stat(os.environ.get("HOME", "/")).st_uid:
            return "sudo -H -s"
    return None


def relocation_remedy() -> str:
    """Return the command that sets both directories to another place."""
    if sys.platform == "win32":
        return r"set HARNESS_IPC_RUNTIME_DIR=%USERPROFILE%\.harness-ipc\run"
    own = home()
    if own is None or not os.access(own, os.W_OK | os.X_OK):
        return "d=$(mktemp -d) && export HARNESS_IPC_RUNTIME_DIR=$d/run HARNESS_IPC_LOG_DIR=$d/log"
    return f"export HARNESS_IPC_RUNTIME_DIR={_quote(own)}/.harness-ipc/run HARNESS_IPC_LOG_DIR={_quote(own)}/.harness-ipc/log"


def _quote(path: str) -> str:
    """Return what `shlex.quote` does: that may be another module by now, of a directory that is first on sys.path."""
    if path.isascii() and path.translate(_UNQUOTED).isalnum():
        return path
    return "'" + path.replace("'", "'\"'\"'") + "'"
