"""A browser of our own: its program, its private profile, its start and its end.

It ends with the daemon. One that a killed daemon has left is found again in the profile by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import platformdirs
import psutil

from harness_ipc import spawn_kwargs

from . import WEBSOCKET
from .cdp import Connection, ConnectionFailed
from .errors import BrowserError, BrowserNotFound

if TYPE_CHECKING:
    from .cdp import OnEvent

logger = logging.getLogger(__name__)

# The variables that say what our own browser is.
BINARY = "HARNESS_CHROME"
ARGUMENTS = "HARNESS_CHROME_ARGS"
PROFILE = "HARNESS_CHROME_PROFILE"

# Seconds for an own browser to open its DevTools: a cold disk takes a few.
START_TIMEOUT = 30.0
# Seconds for it to end after it was asked to, and after it was terminated; then it is killed.
_CLOSE_PERIOD = 5.0
_TERMINATE_PERIOD = 2.0
_KILL_PERIOD = 10.0
# Seconds for the system to release what a process held that has ended: it takes microseconds, on an idle machine.
_RELEASE_PERIOD = 1.0
# Seconds between two looks at what nothing announces: a file of Chrome's.
_POLL = 0.01
# Two readings of one process's time of creation may differ by that much (seconds), since it is derived from the boot time.
_CREATED_WITHIN = 2.0
# In a profile: Chrome's own word on where its DevTools are; what we started there, and what it says.
ACTIVE_PORT = "DevToolsActivePort"
_NOTE = "harness-browser.json"
_LOCK = "harness-browser.lock"
_STDERR = "harness-browser.stderr"

if sys.platform == "win32":
    _BINARIES = [
        os.path.expandvars(f"{root}/{place}")
        for place in (
            "Google/Chrome/Application/chrome.exe",
            "Chromium/Application/chrome.exe",
            "Microsoft/Edge/Application/msedge.exe",
            "BraveSoftware/Brave-Browser/Application/brave.exe",
        )
        for root in ("%ProgramFiles%", "%ProgramFiles(x86)%", "%LocalAppData%")
    ]
elif sys.platform == "darwin":
    _BINARIES = [
        f"/Applications/{name}.app/Contents/MacOS/{name}"
        for name in ("Google Chrome", "Chromium", "Microsoft Edge", "Brave Browser")
    ]
else:
    _BINARIES = [
        "google-chrome",
        "google-chrome-stable",
        "chromium",
        "chromium-browser",
        "microsoft-edge",
        "microsoft-edge-stable",
        "brave-browser",
    ]


# For a browser that a program drives: nothing that asks, phones home by itself or locks a key ring.
_FLAGS = [
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--password-store=basic",
    "--use-mock-keychain",
]
# CSS pixels of a window that nobody sees; Chrome's own default is 800,600. HARNESS_CHROME_ARGS may say otherwise.
_WINDOW = "1280,900"


class OwnBrowser:
    """A browser that this daemon starts, in a private profile that belongs to the daemon's name.

    Whoever holds the profile's lock may start a browser there and end it; a note says which process that is.
    """

    def __init__(self, name: str) -> None:
        self.profile = os.environ.get(PROFILE) or os.path.join(
            platformdirs.user_data_dir("harness-ipc", False), "browser", name
        )
        self._note = Path(self.profile, _NOTE)
        # A daemon looks from threads, too.
        self._lock = filelock.FileLock(os.path.join(self.profile, _LOCK), mode=0o600, thread_local=False)
        self._child: subprocess.Popen[bytes] | None = None

    async def connect(self, on_event: OnEvent) -> Connection:
        """Connect to the one that a dead daemon has left in the profile, or start one. Raises `BrowserNotFound`."""
        try:
            self._claim()
            return await self._adopt(on_event) or await self._start(on_event)
        except BaseException as error:
            self.end()
            if isinstance(error, ConnectionFailed):
                raise BrowserNotFound(
                    f"a browser of our own was started, but {error}; see {os.path.join(self.profile, _STDERR)}"
                ) from None
            if isinstance(error, psutil.Error | OSError) and not isinstance(error, BrowserError):
                raise BrowserNotFound(
                    f"a browser of our own can't be had in {self.profile}: {error}; set {PROFILE} to a directory of yours"
                ) from None
            raise

    async def close(self, connection: Connection) -> None:
        """Ask the browser to end, and see to it that it does."""
        patience = 0.0
        with contextlib.suppress(BrowserError):
            await connection.call("Browser.close", timeout=_CLOSE_PERIOD)
            patience = _CLOSE_PERIOD
        await asyncio.to_thread(self.end, patience)

    def end(self, patience: float = 0.0) -> bool:
        """Return whether a browser of ours ran in the profile, which does no more: after `patience` seconds it is ended.

        Only the very process that the note names is signalled, by pid and time of creation, and its own children. A browser
        of another daemon that lives is left alone.
        """
        if not self._lock.is_locked:
            if not self._note.exists():
                return False
            try:
                self._claim()
            except BrowserNotFound:
                return False
        try:
            return self._end_process(patience)
        finally:
            self._lock.release()

    def pid(self) -> int | None:
        """Return the process id of the browser that the note names, if it runs."""
        process = self._process()
        return None if process is None else process.pid

    def _claim(self) -> None:
        if self._lock.is_locked:
            return
        try:
            os.makedirs(self.profile, mode=0o700, exist_ok=True)
            # The system may release a killed daemon's lock a moment after its process counts as ended.
            patience = 0.0 if self._noted("daemon") is not None else _RELEASE_PERIOD
            self._lock.acquire(timeout=patience, poll_interval=_POLL)
        except filelock.Timeout:
            raise BrowserNotFound(self._in_use(self._noted("daemon"))) from None

    def taken(self) -> str | None:
        """Return that another daemon has the profile, for people, if one has."""
        daemon = self._noted("daemon")
        return None if daemon is None or daemon.pid == os.getpid() else self._in_use(daemon)

    def _in_use(self, daemon: psutil.Process | None) -> str:
        who = "another daemon" if daemon is None else f"the daemon of pid {daemon.pid}"
        return f"the profile {self.profile} is in use by {who}: stop that one, or set {PROFILE} to another directory"

    def _process(self) -> psutil.Process | None:
        if self._child is not None and self._child.poll() is None:
            return psutil.Process(self._child.pid)
        return self._noted("browser")

    def _noted(self, who: str) -> psutil.Process | None:
        """Return the process that the note names, if it lives."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return _living(*json.loads(self._note.read_text("utf-8"))[who])
        return None

    def _end_process(self, patience: float) -> bool:
        process = self._process()
        if process is not None:
            family = [process]
            with contextlib.suppress(psutil.Error):
                family += process.children(recursive=True)
            steps = (None, patience), (psutil.Process.terminate, _TERMINATE_PERIOD), (psutil.Process.kill, _KILL_PERIOD)
            for signal, period in steps:
                if signal is not None:
                    for member in family:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            signal(member)
                deadline = time.monotonic() + period
                while (family := [member for member in family if _lives(member)]) and time.monotonic() < deadline:
                    time.sleep(_POLL)
                if not family:
                    break
            self._remove_singleton(process.pid)
        if self._child is not None:
            self._child.wait()
            self._child = None
        with contextlib.suppress(OSError):
            self._note.unlink()
            # It names nobody any more, and is not there of itself: it was our browser's.
            os.unlink(os.path.join(self.profile, ACTIVE_PORT))
        return process is not None

    def _remove_singleton(self, ended: int | None = None) -> None:
        """Remove Chrome's own lock of the profile, if its holder is the one that has `ended`, or can't be there any more.

        Chrome leaves it when a signal ends it, and takes that of another host for a living one: of a container that was
        killed, or of a machine that was renamed. (On Windows it is no file.)
        """
        try:
            host, _, pid = os.readlink(os.path.join(self.profile, "SingletonLock")).rpartition("-")
        except OSError:
            return
        if host == socket.gethostname() and pid != str(ended) and pid.isdecimal() and psutil.pid_exists(int(pid)):
            return
        for name in ("SingletonLock", "SingletonCookie", "SingletonSocket"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.profile, name))

    async def _adopt(self, on_event: OnEvent) -> Connection | None:
        process = self._process()
        if (active := read_active_port(self.profile)) is not None:
            with contextlib.suppress(ConnectionFailed):
                connection = await Connection.open(f"ws://127.0.0.1:{active[0]}{active[1]}", on_event)
                if process is None:
                    await connection.close()
                    raise BrowserNotFound(
                        f"the profile {self.profile} is in use by a browser that is not ours: end it, or set {PROFILE} to "
                        "another directory"
                    )
                logger.info("the browser of an earlier daemon is still there: pid %d", process.pid)
                self._write_note(process)
                return connection
        return None

    def _write_note(self, process: psutil.Process) -> None:
        me = psutil.Process()
        note = {"browser": [process.pid, process.create_time()], "daemon": [me.pid, me.create_time()]}
        draft = self._note.with_suffix(".tmp")
        draft.write_text(json.dumps(note), "utf-8")
        os.replace(draft, self._note)

    async def _start(self, on_event: OnEvent) -> Connection:
        binary = find_binary()
        if binary is None:
            where = f"{BINARY}={os.environ[BINARY]} is no program" if os.environ.get(BINARY) else "none is installed"
            raise BrowserNotFound(
                f"there is no browser: none runs with its DevTools open, and {where}; install Chrome or Chromium, or set "
                f"{BINARY} to its program, or {WEBSOCKET} to one that runs elsewhere"
            )
        arguments = command_line(binary, self.profile)
        # What is left of one that hangs, or that has died.
        await asyncio.to_thread(self._end_process, 0.0)
        self._remove_singleton()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.profile, ACTIVE_PORT))
        with open(os.path.join(self.profile, _STDERR), "wb") as stderr:
            try:
                child = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, **spawn_kwargs())
            except OSError as error:
                raise BrowserNotFound(f"{binary} can't be run: {error.strerror}; set {BINARY} to a browser's program") from None
        self._child = child
        logger.info("started pid %d: %s", child.pid, shlex.join(arguments))
        if "--no-sandbox" in arguments:
            logger.warning("running as root: the browser's sandbox is off (--no-sandbox), and a page that breaks it is root")
        self._write_note(psutil.Process(child.pid))
        port, path = await self._active_port(child, binary)
        return await Connection.open(f"ws://127.0.0.1:{port}{path}", on_event)

    async def _active_port(self, child: subprocess.Popen[bytes], binary: str) -> tuple[int, str]:
        deadline = time.monotonic() + START_TIMEOUT
        while (active := read_active_port(self.profile)) is None:
            if (status := child.poll()) is not None:
                raise BrowserNotFound(
                    f"{binary} ended with status {status} before it was ready{self._last_words()}; see "
                    f"{os.path.join(self.profile, _STDERR)}"
                )
            if time.monotonic() > deadline:
                raise BrowserNotFound(f"{binary} has not opened its DevTools within {START_TIMEOUT:g} s{self._last_words()}")
            await asyncio.sleep(_POLL)
        return active

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = Path(self.profile, _STDERR).read_text("utf-8", "backslashreplace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return f" ({ascii(last)[1:-1][:300]})" if last else ""
        return ""


def find_binary() -> str | None:
    """Return the program of an own browser: `HARNESS_CHROME` if that is set, else the first usual one that is installed."""
    demanded = os.environ.get(BINARY)
    return next(filter(None, map(shutil.which, [demanded] if demanded else _BINARIES)), None)


def command_line(binary: str, profile: str) -> list[str]:
    """Return the command line of an own browser. Raises `BrowserNotFound` if `HARNESS_CHROME_ARGS` can't be read."""
    arguments = [binary, "--remote-debugging-port=0", f"--user-data-dir={profile}", *_FLAGS]
    if not has_display():
        arguments += ["--headless=new", f"--window-size={_WINDOW}"]
    if is_root():
        # Chrome refuses to run as root otherwise.
        arguments.append("--no-sandbox")
    try:
        return [*arguments, *shlex.split(os.environ.get(ARGUMENTS, "")), "about:blank"]
    except ValueError as error:
        raise BrowserNotFound(
            f"{ARGUMENTS}={os.environ[ARGUMENTS]!a} are no arguments: {error}; mend it, or unset it"
        ) from None


def has_display() -> bool:
    """Return whether a window could be shown."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def is_root() -> bool:
    """Return whether this process is root, for whom the browser's sandbox does not work."""
    return sys.platform != "win32" and os.geteuid() == 0


def _lives(process: psutil.Process) -> bool:
    # A zombie has ended: it only waits for its parent to hear of it.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _living(pid: Any, created: Any) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if _lives(process) and abs(process.create_time() - created) <= _CREATED_WITHIN:
            return process
    return None


def read_active_port(profile: str) -> tuple[int, str] | None:
    """Return port and path from Chrome's file, or None if there is none or it is still being written."""
    with contextlib.suppress(OSError, ValueError):
        port, path, *_ = Path(profile, ACTIVE_PORT).read_text("ascii").splitlines()
        if path.startswith("/"):
            return int(port), path
    return None
