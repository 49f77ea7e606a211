"""A managed browser: starting, adopting and ending it.

It ends with its daemon. If the daemon was killed, the next one finds the browser in the profile, and adopts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from functools import cached_property
from typing import TYPE_CHECKING

import psutil

from harness_ipc import HarnessIPCError, process_identity, report, spawn_kwargs

from . import connection, pipe, program
from .connection import Connection, ConnectionFailed
from .display import find_broken
from .errors import BrowserError, BrowserLost, BrowserNotFound, CDPError
from .profile import ACTIVE_PORT, Note, Profile, read_active_port
from .program import (
    browser_environment,
    command_line,
    describe_broken_display,
    download_behavior,
    find_binary,
    further_arguments,
    has_display,
    is_root,
    root_refusal,
    settings_digest,
)
from .reasons import find_reason, lacks_display
from .requested import BINARY, PROFILE, URL, WEBSOCKET, requested_settings

if TYPE_CHECKING:
    from typing import Any

    from .connection import OnEvent

logger = logging.getLogger(__name__)

# Seconds for a new browser to answer: with a cold disk it takes a few.
START_TIMEOUT = 30.0
# Seconds for it to end after it was closed, and after it was terminated. Then it is killed.
_CLOSE_PERIOD = 5.0
_TERMINATE_PERIOD = 2.0
_KILL_PERIOD = 10.0
# Seconds for a browser that has closed its DevTools to end.
_EXIT_PERIOD = 2.0
# Seconds between two polls: for the end of a process that is not our child, or for a file of Chrome.
_POLL = 0.01

# Chrome reads from descriptor 3 and writes to 4, which subprocess passes as standard input and output. The interpreter gets the
# whole environment, since it may need more than the browser, whose variables are named by the first argument.
_EXEC_WITH_PIPE = """
import os, sys
os.dup2(0, 3)
os.dup2(1, 4)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
names, *command = sys.argv[1:]
try:
    os.execve(command[0], command, {name: os.environ[name] for name in names.split("=") if name in os.environ})
except OSError as error:
    print(error.strerror, file=sys.stderr)
    sys.exit(127)
"""
# The exit status of a shell if a program can't be run.
_CANNOT_RUN = 127


class ManagedBrowser:
    """A browser started by the daemon, in a private profile for the daemon's name."""

    def __init__(self, name: str) -> None:
        self._profile = Profile(name)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def profile(self) -> str:
        """The path of the profile."""
        return self._profile.path

    async def connect(self, on_event: OnEvent) -> Connection:
        """Adopt the browser that a killed daemon has left, or start one. Raises `BrowserNotFound`."""
        if (refusal := root_refusal()) is not None:
            raise BrowserNotFound(refusal)
        # Raises if a setting is invalid, before anything is started.
        download_behavior()
        further_arguments()
        self._profile.acquire()
        try:
            return await self._adopt(on_event) or await self._start(on_event)
        except BaseException as error:
            self.end()
            if isinstance(error, ConnectionFailed):
                raise BrowserNotFound(f"a browser was started, but {error}; see {self._profile.stderr}") from None
            if isinstance(error, psutil.Error | OSError) and not isinstance(error, HarnessIPCError):
                raise BrowserNotFound(
                    f"a browser can't be started in {self.profile}: {error}; set {PROFILE} to a directory of yours"
                ) from None
            raise

    async def close(self, connection: Connection) -> None:
        """End the browser: by CDP, then by signals."""
        grace_period = 0.0
        with contextlib.suppress(BrowserError):
            await connection.call("Browser.close", timeout=_CLOSE_PERIOD)
            grace_period = _CLOSE_PERIOD
        await asyncio.to_thread(self.end, grace_period)

    def end(self, grace_period: float = 0.0) -> bool:
        """End the browser of the profile if it has not ended after `grace_period` seconds. Return whether there was one.

        Only the process identified in the note is signalled, and its descendants; never the browser of another running daemon.
        Raises `UnsafeDirectory` if others could have written the note.
        """
        if not self._profile.is_locked:
            if not self._profile.has_note():
                return False
            try:
                self._profile.acquire()
            except BrowserNotFound:
                return False
        try:
            return self._end_process(grace_period)
        finally:
            self._profile.release()

    def pid(self) -> int | None:
        """Return the process id of the browser, or None if it is not running. Raises `UnsafeDirectory`."""
        if self._child is not None and self._child.poll() is None:
            return self._child.pid
        return self._profile.browser()

    @cached_property
    def settings(self) -> dict[str, str]:
        """The settings of this browser, as in `requested.requested_settings`."""
        # Cached: each command needs it, and searching PATH takes longer than the rest of its request.
        settings = requested_settings({name: value for name, value in os.environ.items() if name not in (WEBSOCKET, URL)})
        return settings | {BINARY: find_binary() or os.environ.get(BINARY, ""), PROFILE: self.profile}

    def has_current_settings(self) -> bool:
        """Return whether the browser of the profile was started with the current settings. Raises `UnsafeDirectory`."""
        return self._profile.note().settings in (None, settings_digest()) or find_binary() is None

    def taken(self) -> str | None:
        """Return the text of the error if another daemon uses the profile, else None. Raises `UnsafeDirectory`."""
        daemon = self._profile.daemon()
        return None if daemon in (None, os.getpid()) else self._profile.in_use(daemon)

    async def set_downloads(self, connection: Connection, context: str | None = None) -> None:
        """Deny downloads, or save them in `HARNESS_CHROME_DOWNLOADS`, in a browser context (by default the default one).

        The setting outlives the daemon. Raises `BrowserNotFound` if the directory can't be used.
        """
        params = download_behavior()
        if context is not None:
            params["browserContextId"] = context
        await connection.call("Browser.setDownloadBehavior", params, outlasting=True)

    # The connection.

    async def _adopt(self, on_event: OnEvent) -> Connection | None:
        pid = self.pid()
        if pid is None:
            if self._profile.is_used_by_another():
                raise BrowserNotFound(
                    f"the profile {self.profile} is in use by a browser that is not ours: end it, or set {PROFILE} to another "
                    "directory"
                )
            return None
        if not self.has_current_settings():
            logger.info("the browser of pid %d was started with other settings: it is not adopted", pid)
            return None
        try:
            async with asyncio.timeout(connection.OPEN_TIMEOUT):
                adopted = await (self._reopen_pipe if program.USES_PIPE else self._open_port)(pid, on_event)
        except (BrowserLost, CDPError, ConnectionFailed, TimeoutError) as error:
            logger.info("the browser of pid %d can't be adopted: %s", pid, str(error) or "it does not answer")
            return None
        logger.info("the browser of an earlier daemon is still there: pid %d", pid)
        return adopted

    async def _start(self, on_event: OnEvent) -> Connection:
        binary = find_binary()
        if binary is None:
            where = f"{BINARY}={os.environ[BINARY]} is not a program" if os.environ.get(BINARY) else "none is installed"
            raise BrowserNotFound(
                f"there is no browser: none runs with its DevTools open, and {where}; install Chrome or Chromium, or set "
                f"{BINARY} to its program, or {WEBSOCKET} to one that runs elsewhere"
            )
        broken = find_broken(os.environ)
        environment = browser_environment({name: value for name, value in os.environ.items() if name not in broken})
        window = has_display(broken)
        if (text := describe_broken_display(broken)) is not None:
            await _warn(f"{text}: the browser does not use it{'' if window else ', and is headless'}")
        if is_root():
            logger.warning("running as root: the browser's sandbox is off (--no-sandbox), and a page that breaks it is root")
        try:
            try:
                return await self._start_once(binary, environment, window, on_event)
            except BrowserLost:
                # The display accepts connections, but may still refuse this user.
                if not window or not lacks_display(self._profile.read_stderr()):
                    raise
                await _warn(f"the browser can't use its display{self._quoted_reason()}: it is headless")
                return await self._start_once(binary, environment, False, on_event)
        except BrowserLost:
            raise BrowserNotFound(await self._why_lost(binary)) from None
        except TimeoutError:
            text = f"{binary} has not opened its DevTools within {START_TIMEOUT:g} s{self._quoted_reason()}"
            raise BrowserNotFound(text) from None

    async def _start_once(self, binary: str, environment: dict[str, str], window: bool, on_event: OnEvent) -> Connection:
        arguments = command_line(binary, self.profile, window=window)
        # A browser that hangs, or the rest of one that died.
        await asyncio.to_thread(self._end_process, 0.0)
        self._profile.remove_singleton()
        async with asyncio.timeout(START_TIMEOUT):
            return await (self._start_with_pipe if program.USES_PIPE else self._start_with_port)(
                arguments, environment, on_event
            )

    async def _start_with_pipe(self, arguments: list[str], environment: dict[str, str], on_event: OnEvent) -> Connection:
        if sys.platform == "win32":
            raise NotImplementedError("Windows has no FIFOs")
        names = "=".join(environment)
        command = [sys.executable, "-I", "-S", "-c", _EXEC_WITH_PIPE, names, *arguments]
        with pipe.create_fifos(self._profile.to_browser, self._profile.from_browser) as (stdin, stdout):
            pid = self._spawn(arguments, command, stdin=stdin, stdout=stdout)
            transport = pipe.open_pipe(self._profile.to_browser, self._profile.from_browser, pid)
        return await self._enter(Connection(transport, None), pid, None, on_event)

    async def _reopen_pipe(self, pid: int, on_event: OnEvent) -> Connection:
        if sys.platform == "win32":
            raise NotImplementedError("Windows has no FIFOs")
        stale = self._profile.note().session
        transport = pipe.open_pipe(self._profile.to_browser, self._profile.from_browser, pid)
        return await self._enter(Connection(transport, None, adopted=True), pid, stale, on_event)

    async def _enter(self, connection: Connection, pid: int, stale: str | None, on_event: OnEvent) -> Connection:
        try:
            session = await connection.enter_root_session(stale, on_event)
            self._write_note(pid, session)
            await self.set_downloads(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _start_with_port(self, arguments: list[str], environment: dict[str, str], on_event: OnEvent) -> Connection:
        pid = self._spawn(arguments, arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
        while read_active_port(self.profile) is None:
            if self._child is None or self._child.poll() is not None:
                raise BrowserLost("the browser has ended")
            await asyncio.sleep(_POLL)
        return await self._open_port(pid, on_event)

    async def _open_port(self, pid: int, on_event: OnEvent) -> Connection:
        if (active := read_active_port(self.profile)) is None:
            raise ConnectionFailed(f"{self.profile} has no {ACTIVE_PORT}")
        connection = await Connection.open(f"ws://127.0.0.1:{active[0]}{active[1]}", on_event)
        try:
            self._write_note(pid)
            await self.set_downloads(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    # The process.

    def _spawn(self, arguments: list[str], command: list[str], **options: Any) -> int:
        stderr = self._profile.create_stderr()
        if sys.platform != "win32":
            # Files of the browser, including downloads, are private to this user.
            options["umask"] = 0o077
        try:
            self._child = subprocess.Popen(command, stderr=stderr, **options, **spawn_kwargs())
        except OSError as error:
            raise BrowserNotFound(_cannot_run(arguments[0], error.strerror or str(error))) from None
        finally:
            os.close(stderr)
        # Without values, which may be secret.
        switches = " ".join(word.partition("=")[0] for word in arguments[1:] if word.startswith("-"))
        logger.info("started pid %d: %s %s", self._child.pid, arguments[0], switches)
        self._write_note(self._child.pid)
        return self._child.pid

    def _write_note(self, pid: int, session: str | None = None) -> None:
        note = Note(process_identity(pid), process_identity(os.getpid()), session, settings_digest())
        self._profile.write_note(note)

    async def _why_lost(self, binary: str) -> str:
        """Return why the started browser is lost: it has ended, or closed its DevTools."""
        assert self._child is not None, "a browser was started"
        try:
            status = await asyncio.to_thread(self._child.wait, _EXIT_PERIOD)
        except subprocess.TimeoutExpired:
            return f"{binary} has closed its DevTools{self._quoted_reason()}; see {self._profile.stderr}"
        if status == _CANNOT_RUN:
            return _cannot_run(binary, find_reason(self._profile.read_stderr()))
        return f"{binary} ended with status {status} before it was ready{self._quoted_reason()}; see {self._profile.stderr}"

    def _quoted_reason(self) -> str:
        reason = find_reason(self._profile.read_stderr())
        return f" ({reason})" if reason else ""

    def _end_process(self, grace_period: float) -> bool:
        pid = self.pid()
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                # psutil signals only this process, not a later one with its pid: check again that it is the browser.
                if self.pid() == pid:
                    _end_processes(process, grace_period)
            self._profile.remove_singleton(pid)
        if self._child is not None:
            self._child.wait()
            self._child = None
        if not self._profile.is_used_by_another():
            self._profile.forget()
        return pid is not None


async def _warn(text: str) -> None:
    """Log a warning, and report it to the clients that wait for the start."""
    logger.warning("%s", text)
    await report(text)


def _end_processes(process: psutil.Process, grace_period: float) -> None:
    """End the process and its descendants if they have not ended after `grace_period` seconds."""
    processes = _with_descendants([process])
    steps = (None, grace_period), ("SIGTERM", _TERMINATE_PERIOD), ("SIGKILL", _KILL_PERIOD)
    for name, period in steps:
        if name is not None:
            processes = _with_descendants(processes)
            _signal(process, processes, name)
        deadline = time.monotonic() + period
        while (processes := [member for member in processes if _is_alive(member)]) and time.monotonic() < deadline:
            time.sleep(_POLL)
        if not processes:
            break


def _with_descendants(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = dict.fromkeys(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.update(dict.fromkeys(process.children(recursive=True)))
    return list(found)


def _signal(leader: psutil.Process, processes: list[psutil.Process], name: str) -> None:
    # First the process group, which includes children that are being forked.
    if sys.platform != "win32" and _is_alive(leader):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(leader.pid) == leader.pid:
                os.killpg(leader.pid, getattr(signal, name))
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate() if name == "SIGTERM" else member.kill()


def _is_alive(process: psutil.Process) -> bool:
    # A zombie has ended; only its parent can reap it.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _cannot_run(binary: str, reason: str) -> str:
    return f"{binary} can't be run: {reason or 'no reason was given'}; set {BINARY} to a browser's program"
