"""The private profile directory of a managed browser: its lock, its note, and stale files.

The holder of the lock may start and end a browser in it. The note identifies the browser's process and its daemon. Other users
can't write to the directory, but it may have been open to them earlier: so no file is opened through a link, and new files
replace existing ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import psutil

from harness_ipc import StartFailed, UnsafeDirectory, check_private_dir, create_private_dir, is_same_process

from .errors import BrowserNotFound
from .requested import PROFILE

# Chrome's file with its DevTools port.
ACTIVE_PORT = "DevToolsActivePort"
_NOTE = "harness-browser.json"
_DRAFT = "harness-browser.tmp"
_LOCK = "harness-browser.lock"
_STDERR = "harness-browser.stderr"
_TO_BROWSER = "harness-browser.in"
_FROM_BROWSER = "harness-browser.out"
# The limit of a note or an ACTIVE_PORT in bytes; they have a few hundred.
_LIMIT = 64 * 1024
# Bytes to read at the end of the browser's standard error.
_TAIL = 64 * 1024
# Seconds for the system to release the lock of a process that has ended, usually microseconds.
_RELEASE_PERIOD = 1.0
# Seconds between two attempts.
_POLL = 0.01

# O_NONBLOCK: opening a FIFO must not block.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW


@dataclass(frozen=True, slots=True)
class Note:
    """The identities (`harness_ipc.process_identity`) of the browser and its daemon, and the daemon's root session."""

    browser: dict[str, Any] | None = None
    daemon: dict[str, Any] | None = None
    session: str | None = None
    # `program.settings_digest` at its start.
    settings: str | None = None


def _default_directory() -> str:
    try:
        directory = platformdirs.user_data_dir("harness-ipc", False)
    except RuntimeError:
        directory = ""
    if not os.path.isabs(directory):
        raise BrowserNotFound(f"there is no home directory for the browser's profile: set HOME, or {PROFILE} to a directory")
    return os.path.join(directory, "browser")


def explain(error: UnsafeDirectory) -> tuple[str, str | None]:
    """Return the problem of a profile and what to do, and a command that fixes it, or None."""
    if "HARNESS_IPC_" in error.remedy:
        # The remedy would move the runtime directory, not the profile.
        return f"{str(error).removesuffix(f': run `{error.remedy}`')}: set {PROFILE} to another directory", None
    return f"{error}, or set {PROFILE} to another directory", error.remedy


class Profile:
    """The profile of the daemon `name`: `HARNESS_CHROME_PROFILE`, or a directory for that name."""

    def __init__(self, name: str) -> None:
        self.path = os.path.abspath(os.environ.get(PROFILE) or os.path.join(_default_directory(), name))
        self.stderr = os.path.join(self.path, _STDERR)
        # The FIFOs that the browser reads from and writes to.
        self.to_browser = os.path.join(self.path, _TO_BROWSER)
        self.from_browser = os.path.join(self.path, _FROM_BROWSER)
        # The daemon also uses it in threads.
        self._lock = filelock.FileLock(os.path.join(self.path, _LOCK), mode=0o600, thread_local=False)

    @property
    def is_locked(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock.is_locked

    def acquire(self) -> None:
        """Create the directory if it is missing, check it, and lock it. Raises `BrowserNotFound`; idempotent."""
        if self._lock.is_locked:
            return
        try:
            create_private_dir(self.path)
        except UnsafeDirectory as error:
            raise BrowserNotFound(f"the browser's profile {explain(error)[0]}") from None
        except StartFailed as error:
            # The error's text names the variables of the runtime directory.
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else "unknown"
            raise BrowserNotFound(
                f"the browser's profile {self.path} can't be created: {reason}; set {PROFILE} to a directory of yours"
            ) from None
        try:
            self._unlink_planted_lock()
            # The system may release a killed daemon's lock a moment after its end.
            timeout = 0.0 if self.daemon() is not None else _RELEASE_PERIOD
            self._lock.acquire(timeout=timeout, poll_interval=_POLL)
        except filelock.Timeout:
            raise BrowserNotFound(self.in_use(self.daemon())) from None
        except OSError as error:
            raise BrowserNotFound(
                f"the browser's profile {self.path} can't be locked: {error.strerror}; set {PROFILE} to another directory"
            ) from None

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def in_use(self, daemon: int | None) -> str:
        """Return the text that another daemon uses the profile: the process `daemon`, or None if unknown."""
        who = "another daemon" if daemon is None else f"the daemon of pid {daemon}"
        return f"the profile {self.path} is in use by {who}: stop that one, or set {PROFILE} to another directory"

    # The note.

    def has_note(self) -> bool:
        """Return whether there is a note. Raises `UnsafeDirectory`."""
        return check_private_dir(self.path) and os.path.lexists(os.path.join(self.path, _NOTE))

    def note(self) -> Note:
        """Return the note, or an empty one if there is none, or it is invalid. Raises `UnsafeDirectory`."""
        if check_private_dir(self.path):
            with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
                found = json.loads(_read_own_file(os.path.join(self.path, _NOTE)))
                browser, daemon, *texts = (found.get(key) for key in ("browser", "daemon", "session", "settings"))
                if (
                    isinstance(browser, dict)
                    and isinstance(daemon, dict)
                    and all(isinstance(text, str | None) for text in texts)
                ):
                    return Note(browser, daemon, *texts)
        return Note()

    def write_note(self, note: Note) -> None:
        """Replace the note atomically. Raises `OSError`."""
        draft = os.path.join(self.path, _DRAFT)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        with open(os.open(draft, _CREATE, 0o600), "w", encoding="utf-8") as file:
            json.dump(
                {"browser": note.browser, "daemon": note.daemon, "session": note.session, "settings": note.settings}, file
            )
        os.replace(draft, os.path.join(self.path, _NOTE))

    def browser(self) -> int | None:
        """Return the pid of the browser in the note, or None if it has ended. Raises `UnsafeDirectory`."""
        return _pid_if_alive(self.note().browser)

    def daemon(self) -> int | None:
        """Return the pid of the daemon in the note, or None if it has ended. Raises `UnsafeDirectory`."""
        return _pid_if_alive(self.note().daemon)

    # Files of the browser.

    def create_stderr(self) -> int:
        """Return the descriptor of a new file for the browser's standard error. Raises `OSError`."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.stderr)
        return os.open(self.stderr, _CREATE, 0o600)

    def read_stderr(self) -> str:
        """Return the end of the browser's standard error; empty if there is none."""
        with contextlib.suppress(OSError, ValueError):
            return _read_own_file(self.stderr, _TAIL).decode("utf-8", "backslashreplace")
        return ""

    def forget(self) -> None:
        """Remove the files of a running browser: the note, the FIFOs, `DevToolsActivePort`."""
        for name in (_NOTE, _TO_BROWSER, _FROM_BROWSER, ACTIVE_PORT):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.path, name))

    def is_used_by_another(self) -> bool:
        """Return whether a browser uses the profile, shown by Chrome's singleton socket, to which a new Chrome would connect.

        False on Windows, where there is no such socket.
        """
        if sys.platform != "win32":
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.setblocking(False)
                # A link to a short path, below the temporary directory.
                client.connect(os.readlink(os.path.join(self.path, "SingletonSocket")))
                return True
        return False

    def remove_singleton(self, ended: int | None = None) -> None:
        """Remove Chrome's lock of the profile, if its holder is the process `ended`, or can't exist any more.

        Chrome does not remove it when it is ended by a signal, and respects the lock of another host name: of a killed
        container, or a renamed machine. (On Windows it is not a file.)
        """
        try:
            host, _, pid = os.readlink(os.path.join(self.path, "SingletonLock")).rpartition("-")
        except OSError:
            return
        if host == socket.gethostname() and pid != str(ended) and pid.isdecimal() and psutil.pid_exists(int(pid)):
            return
        for name in ("SingletonLock", "SingletonCookie", "SingletonSocket"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.path, name))

    def _unlink_planted_lock(self) -> None:
        """Remove a lock file that is not ours: filelock would truncate the target of a link, also of a hard link."""
        with contextlib.suppress(FileNotFoundError):
            if not _is_own_file(os.lstat(self._lock.lock_file), forbidden=0):
                os.unlink(self._lock.lock_file)


def read_active_port(profile: str) -> tuple[int, str] | None:
    """Return port and path from Chrome's file, or None if it is missing or incomplete."""
    with contextlib.suppress(OSError, ValueError):
        port, path, *_ = Path(profile, ACTIVE_PORT).read_text("ascii").splitlines()
        if path.startswith("/"):
            return int(port), path
    return None


def _pid_if_alive(identity: dict[str, Any] | None) -> int | None:
    return identity["pid"] if identity is not None and is_same_process(identity) else None


def _is_own_file(info: os.stat_result, forbidden: int = 0o077) -> bool:
    """Return whether it is a regular file of this user with one link and without the mode bits `forbidden`."""
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        return False
    return sys.platform == "win32" or (info.st_uid == os.geteuid() and not info.st_mode & forbidden)


def _read_own_file(path: str, tail: int = 0) -> bytes:
    """Return the content of a small file, or its last `tail` bytes. Raises `OSError`, and `ValueError` for a foreign file."""
    descriptor = os.open(path, os.O_RDONLY | _NOFOLLOW)
    try:
        info = os.fstat(descriptor)
        if not _is_own_file(info) or (not tail and info.st_size > _LIMIT):
            raise ValueError(f"{path} is not one of ours")
        if tail:
            os.lseek(descriptor, max(0, info.st_size - tail), os.SEEK_SET)
        return os.read(descriptor, tail or _LIMIT)
    finally:
        os.close(descriptor)
