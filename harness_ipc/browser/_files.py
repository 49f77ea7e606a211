"""Writing files at paths chosen by the user, possibly in a directory that others can write to."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import sys

# Device names of Windows, with any suffix.
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{device}{number}" for device in ("COM", "LPT") for number in range(1, 10))}


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a file at `path` atomically, by renaming a new file.

    A symbolic link at `path` is replaced, not followed. The mode is that of a regular file of this user that is replaced, else
    0600. On Windows, access is that of the directory. Raises `OSError`, which names `path`; nothing is left behind then.
    """
    draft = _new_name(path)
    try:
        mode = _final_mode(path)
        with open(draft, "xb", opener=_open_private) as file:
            file.write(data)
            file.flush()
            # Only if it differs: a file system without modes may refuse a change.
            if sys.platform != "win32" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                os.fchmod(file.fileno(), mode)
        os.replace(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        if isinstance(error, OSError):
            # With the path that was given, not the draft's.
            raise OSError(error.errno, error.strerror, os.fspath(path), getattr(error, "winerror", None)) from None
        raise


def _new_name(path: str | os.PathLike[str]) -> str:
    """Return an unguessable path in the directory of `path`."""
    return os.path.join(os.path.dirname(path), f".harness-browser-{os.urandom(16).hex()}.tmp")


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _final_mode(path: str | os.PathLike[str]) -> int:
    """Return the permission bits for a file at `path`; on Windows they have no meaning."""
    if sys.platform == "win32":
        return 0
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return stat.S_IMODE(found.st_mode) & 0o777
    return 0o600


def move_file(source: str, folder: str, name: str) -> str:
    """Move a file to `folder` as `name`, numbered if that exists, and return its path. Its mode becomes 0600.

    Raises `OSError`.
    """
    if not os.path.exists(source):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
    stem, suffix = os.path.splitext(safe_name(name))
    for number in itertools.count():
        path = os.path.join(folder, f"{stem} ({number}){suffix}" if number else f"{stem}{suffix}")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            continue
        break
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            os.unlink(path)
            raise
        import shutil

        shutil.copyfile(source, path)
        os.unlink(source)
    os.chmod(path, 0o600)
    return path


def safe_name(name: str) -> str:
    """Return `name` without path separators, leading dots, and all that is invalid on one of the systems."""
    kept = "".join("_" if character in '<>:"/\\|?*' or not character.isprintable() else character for character in name)
    stem, suffix = os.path.splitext(kept.strip(". ") or "download")
    if stem.partition(".")[0].rstrip().upper() in _RESERVED:
        stem = f"_{stem}"
    # Bytes: most file systems allow 255, and a number may be added.
    end = suffix.encode()[:50]
    return (stem.encode()[: 200 - len(end)] + end).decode(errors="ignore")
