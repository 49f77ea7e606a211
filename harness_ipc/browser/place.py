"""A client's connection to the browser's daemon, and the places that it has in tabs. It knows no page.

The daemon is started where none runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading

from harness_ipc import ConnectionLost, DaemonNotRunning, HarnessIPCError, RemoteError, connect_daemon

from . import MAX_MESSAGE, check_extra, is_ours, not_ours
from .errors import BrowserLost, from_remote, from_reply
from .own_imports import without_program_directory
from .requested import asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from harness_ipc import Client

# Seconds for the daemon to start, with a browser that starts or asks its user.
START_TIMEOUT = 60.0
# Seconds for a tab of the process's own to close when it ends.
_LEAVE_TIMEOUT = 5.0


def start_daemon(
    name: str,
    *,
    timeout: float = START_TIMEOUT,
    on_unhealthy: Literal["accept", "restart"] = "accept",
    on_progress: Callable[[Any], object] | None = None,
) -> None:
    """Be sure that the browser's daemon `name` runs. Arguments and errors are those of `harness_ipc.ensure_daemon`."""
    with without_program_directory():
        # Not needed by a process that finds the daemon.
        from harness_ipc import ensure_daemon

        check_extra()
        # -P: `python -m` would import from the current directory first.
        argv = [sys.executable, "-P", "-m", "harness_ipc.browser.daemon", name]
        ensure_daemon(name, argv, timeout=timeout, on_unhealthy=on_unhealthy, on_progress=on_progress)


class Place:
    """That a client is in a tab: a stream in flight, whose end tells the daemon that the client has left, however it ended.

    `session` and `target` are the tab's; `own` is whether the daemon closes the tab then.
    """

    def __init__(self, client: Client, wanted: dict[str, Any], timeout: float) -> None:
        self.client = client
        self.process = os.getpid()
        self._stream = client.stream("enter_tab", wanted, timeout=timeout)
        try:
            # It is not iterated any further: it ends with the place.
            reply = next(self._stream)
        except RemoteError as error:
            raise from_remote(error) from None
        self.generation = client.generation
        self.number: str = reply["place"]
        self.update(reply)

    def update(self, reply: dict[str, Any]) -> None:
        """Be in the tab that the daemon has answered with."""
        self.session: str = reply["session_id"]
        self.target: str = reply["target_id"]
        self.own: bool = reply["own"]

    @property
    def is_known(self) -> bool:
        """Whether the daemon is still the one that answered."""
        return self.client.generation == self.generation

    def leave(self) -> None:
        """Tell the daemon at once, and return when a tab of its own is closed."""
        if self.own and self.process == os.getpid():
            with contextlib.suppress(HarnessIPCError):
                self.client.request({"meta": "leave_tab", "place": self.number}, timeout=_LEAVE_TIMEOUT)
        self._stream.close()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()


class Connection:
    """The client of a browser's daemon in one process: a forked child has another one."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Re-entrant: a signal handler may use the browser while it is held.
        self.lock = threading.RLock()
        self.client: Client | None = None
        # Those whose tabs are closed at the end of the process.
        self._own: set[Place] = set()

    def connect(self, name: str, timeout: float, on_progress: Callable[[Any], object] | None = None) -> Client:
        """Return the client of the daemon `name`, which is started if it does not run. See `Browser.connect`."""
        if self.client is None or self.client.name != name:
            with self.lock:
                if self.client is None or self.client.name != name:
                    self.client = _connect(name, timeout, on_progress)
                return self.client
        return self.client

    def enter(self, wanted: dict[str, Any], timeout: float) -> Place:
        """Return a place of the client's, which is connected, in the tab that is `wanted`."""
        assert self.client is not None, "nobody enters a tab before there is a daemon"
        place = Place(self.client, wanted, timeout)
        if place.own:
            if not self._own:
                atexit.register(self.close)
            self._own.add(place)
        return place

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Return the daemon's reply. A daemon that went before it got the message is started again."""
        assert self.client is not None, "nobody asks before there is a daemon"
        try:
            return self.client.request(message, timeout=timeout)
        except (ConnectionLost, DaemonNotRunning) as error:
            if error.maybe_executed:
                raise
            start_daemon(self.client.name)
        return self.client.request(message, timeout=timeout)

    def leave(self, place: Place) -> None:
        """Leave a tab: one that was opened for this process is closed."""
        self._own.discard(place)
        place.leave()

    def close(self) -> None:
        """Leave all tabs, and close the client, if there is one."""
        if self.pid != os.getpid():
            return
        for place in list(self._own):
            self.leave(place)
        with self.lock:
            client, self.client = self.client, None
        if client is not None:
            client.close()


def _connect(name: str, timeout: float, on_progress: Callable[[Any], object] | None) -> Client:
    with without_program_directory():
        try:
            return _find(name, timeout)
        except (DaemonNotRunning, ConnectionLost):
            # Lost, if one is just dying: nothing was done yet.
            start_daemon(name, timeout=timeout, on_progress=on_progress)
        except BrowserLost:
            start_daemon(name, timeout=timeout, on_unhealthy="restart", on_progress=on_progress)
        return _find(name, timeout)


def _find(name: str, timeout: float) -> Client:
    """Return the client of a daemon whose browser is there, and is the one that the environment asks for."""
    client = connect_daemon(name, max_message=MAX_MESSAGE)
    try:
        if not is_ours(client.app_version):
            raise not_ours(name)
        reply = client.request({"meta": "check_browser", "asked": asked(os.environ)}, timeout=timeout)
        if "error" in reply:
            raise from_reply(reply["error"])
    except BaseException:
        client.close()
        raise
    return client
