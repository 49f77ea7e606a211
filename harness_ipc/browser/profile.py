"""The private profile directory of a managed browser: its lock, its note, its stale files. It starts and signals no process.

The holder of the lock may start a browser there and end it. The note says which process that browser is, and which daemon
drives it. Another user can't write in the directory. It may have been open to others once: so nothing is opened through a link,
and a new file takes the place of what was there.
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

# Chrome's own word on where its DevTools port is.
ACTIVE_PORT = "DevToolsActivePort"
_NOTE = "harness-browser.json"
_DRAFT = "harness-browser.tmp"
_LOCK = "harness-browser.lock"
_STDERR = "harness-browser.stderr"
_TO_BROWSER = "harness-browser.in"
_FROM_BROWSER = "harness-browser.out"
# Bytes of a note, of an ACTIVE_PORT: both take some hundred.
_LIMIT = 64 * 1024
# Bytes at the end of the browser's standard error that are read.
_TAIL = 64 * 1024
# Seconds for the system to release the lock of a process that has ended: microseconds on an idle machine.
_RELEASE_PERIOD = 1.0
# Seconds between two tries.
_POLL = 0.01

# O_NONBLOCK: a FIFO in a file's place must not block the open.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW


@dataclass(frozen=True, slots=True)
class Note:
    """Identities (`harness_ipc.process_identity`) of the browser and of its daemon, and the daemon's root session in it."""

    browser: dict[str, Any] | None = None
    daemon: dict[str, Any] | None = None
    session: str | None = None
    # What it was started with (`program.settings_digest`).
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
    """Return what is wrong with a profile and what to do, and the command that fixes it, if there is one."""
    if "HARNESS_IPC_" in error.remedy:
        # It would move the runtime directory.
        return f"{str(error).removesuffix(f': run `{error.remedy}`')}: set {PROFILE} to another directory", None
    return f"{error}, or set {PROFILE} to another directory", error.remedy


class Profile:
    """The profile of the daemon `name`: `HARNESS_CHROME_PROFILE`, or a directory of the name's own."""

    def __init__(self, name: str) -> None:
        self.path = os.path.abspath(os.environ.get(PROFILE) or os.path.join(_default_directory(), name))
        self.stderr = os.path.join(self.path, _STDERR)
        # FIFOs: what the browser reads, and what it writes.
        self.to_browser = os.path.join(self.path, _TO_BROWSER)
        self.from_browser = os.path.join(self.path, _FROM_BROWSER)
        # A daemon looks from threads, too.
        self._lock = filelock.FileLock(os.path.join(self.path, _LOCK), mode=0o600, thread_local=False)

    @property
    def is_locked(self) -> bool:
        """Whether we hold its lock."""
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
            # Its own text names the runtime directory's variables.
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else "unknown"
            raise BrowserNotFound(
                f"the browser's profile {self.path} can't be created: {reason}; set {PROFILE} to a directory of yours"
            ) from None
        try:
            self._unlink_planted_lock()
            # A killed daemon's lock may be released a moment after its process has ended.
            patience = 0.0 if self.daemon() is not None else _RELEASE_PERIOD
            self._lock.acquire(timeout=patience, poll_interval=_POLL)
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
        """Return, for people, that another daemon has the profile: the process `daemon`, if that is known."""
        who = "another daemon" if daemon is None else f"the daemon of pid {daemon}"
        return f"the profile {self.path} is in use by {who}: stop that one, or set {PROFILE} to another directory"

    # The note.

    def has_note(self) -> bool:
        """Return whether there is a note, whatever it says. Raises `UnsafeDirectory`."""
        return check_private_dir(self.path) and os.path.lexists(os.path.join(self.path, _NOTE))

    def note(self) -> Note:
        """Return the note, an empty one if there is none that we have written. Raises `UnsafeDirectory`."""
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
        """Replace the note, in one step. Raises `OSError`."""
        draft = os.path.join(self.path, _DRAFT)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        with open(os.open(draft, _CREATE, 0o600), "w", encoding="utf-8") as file:
            json.dump(
                {"browser": note.browser, "daemon": note.daemon, "session": note.session, "settings": note.settings}, file
            )
        os.replace(draft, os.path.join(self.path, _NOTE))

    def browser(self) -> int | None:
        """Return the pid of the noted browser, if it still runs. Raises `UnsafeDirectory`."""
        return _pid_if_alive(self.note().browser)

    def daemon(self) -> int | None:
        """Return the pid of the noted daemon, if it still runs. Raises `UnsafeDirectory`."""
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
        """Remove what is there only while a browser runs: the note, its FIFOs, `DevToolsActivePort`."""
        for name in (_NOTE, _TO_BROWSER, _FROM_BROWSER, ACTIVE_PORT):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.path, name))

    def is_used_by_another(self) -> bool:
        """Return whether a browser has the profile, by Chrome's own sign of it: a socket. Started anew, Chrome would go there.

        On Windows False: there is no such socket.
        """
        if sys.platform != "win32":
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.setblocking(False)
                # A link to a short path, below the temporary directory.
                client.connect(os.readlink(os.path.join(self.path, "SingletonSocket")))
                return True
        return False

    def remove_singleton(self, ended: int | None = None) -> None:
        """Remove Chrome's own lock of the profile, if its holder is the one that has `ended`, or can't be there any more.

        Chrome leaves it when a signal ends it, and takes that of another host for a living one: of a container that was
        killed, or of a machine that was renamed. (On Windows it is no file.)
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
        """Remove a lock that we have not made: filelock truncates the file behind it (a hard link's, too)."""
        with contextlib.suppress(FileNotFoundError):
            if not _is_own_file(os.lstat(self._lock.lock_file), forbidden=0):
                os.unlink(self._lock.lock_file)


def read_active_port(profile: str) -> tuple[int, str] | None:
    """Return port and path from Chrome's file, or None if there is none or it is still being written."""
    with contextlib.suppress(OSError, ValueError):
        port, path, *_ = Path(profile, ACTIVE_PORT).read_text("ascii").splitlines()
        if path.startswith("/"):
            return int(port), path
    return None


def _pid_if_alive(identity: dict[str, Any] | None) -> int | None:
    return identity["pid"] if identity is not None and is_same_process(identity) else None


def _is_own_file(info: os.stat_result, forbidden: int = 0o077) -> bool:
    """Return whether it is a regular file of this user with one name, and without the `forbidden` bits of its mode."""
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        return False
    return sys.platform == "win32" or (info.st_uid == os.geteuid() and not info.st_mode & forbidden)


def _read_own_file(path: str, tail: int = 0) -> bytes:
    """Return a small file, or the last `tail` bytes. Raises `OSError`, and `ValueError` for one that we have not made."""
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
