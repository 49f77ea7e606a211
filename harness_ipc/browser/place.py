"""A client's connection to the browser daemon, which it starts if necessary, and its presence in tabs: `Place`."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading

from harness_ipc import ConnectionLost, DaemonNotRunning, HarnessIPCError, connect_daemon

from . import MAX_MESSAGE, check_extra, is_browser_daemon, wrong_daemon
from .errors import CLASSES, BrowserLost, from_reply
from .own_imports import without_program_directory
from .requested import requested_settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, TypeVar

    from harness_ipc import Client

    _T = TypeVar("_T")

# Seconds for the daemon to start, including its browser, whose user may have to allow the connection.
START_TIMEOUT = 60.0
# Seconds to close the process's own tabs when it ends.
_LEAVE_TIMEOUT = 5.0


def start_daemon(
    name: str,
    *,
    timeout: float = START_TIMEOUT,
    on_unhealthy: Literal["accept", "restart"] = "accept",
    on_progress: Callable[[Any], object] | None = None,
) -> None:
    """Start the browser daemon `name` unless it runs. Arguments and errors are those of `harness_ipc.ensure_daemon`."""
    with without_program_directory():
        # Imported only to start a daemon.
        from harness_ipc import ensure_daemon

        check_extra()
        # -P: otherwise modules in the current directory could shadow others.
        argv = [sys.executable, "-P", "-m", "harness_ipc.browser.daemon", name]
        ensure_daemon(name, argv, timeout=timeout, on_unhealthy=on_unhealthy, on_progress=on_progress)


class Place:
    """A client's presence in a tab: a stream in flight, whose end tells the daemon that the client has left.

    `session` and `target` are those of the tab; `own` is whether the daemon closes the tab at the end.
    """

    def __init__(self, client: Client, wanted: dict[str, Any], timeout: float) -> None:
        self.client = client
        self.process = os.getpid()
        self._stream = client.stream("enter_tab", wanted, timeout=timeout)
        # The only item: the stream stays open until the place is left.
        reply = next(self._stream)
        self.generation = client.generation
        self.number: str = reply["place"]
        self.update(reply)

    def update(self, reply: dict[str, Any]) -> None:
        """Set the tab from a reply of the daemon."""
        self.session: str = reply["session_id"]
        self.target: str = reply["target_id"]
        self.own: bool = reply["own"]

    @property
    def is_known(self) -> bool:
        """Whether the daemon is still the one that created this place."""
        return self.client.generation == self.generation

    def leave(self) -> None:
        """Leave the tab, and return when the daemon has closed it, if it is its own."""
        if self.own and self.process == os.getpid():
            with contextlib.suppress(HarnessIPCError):
                self.client.request({"meta": "leave_tab", "place": self.number}, timeout=_LEAVE_TIMEOUT)
        self._stream.close()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()


class Connection:
    """The client of a browser daemon in one process: a forked child has another one."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Re-entrant: a signal handler may use the browser at any time.
        self.lock = threading.RLock()
        self.client: Client | None = None
        # Places whose tabs are closed at the end of the process.
        self._own: set[Place] = set()

    def connect(self, name: str, timeout: float, on_progress: Callable[[Any], object] | None = None) -> Client:
        """Return the client of the daemon `name`, which is started if necessary. See `Browser.connect`."""
        if self.client is None or self.client.name != name:
            with self.lock:
                if self.client is None or self.client.name != name:
                    self.client = _connect(name, timeout, on_progress)
                return self.client
        return self.client

    def enter(self, wanted: dict[str, Any], timeout: float) -> Place:
        """Return a new place in the tab that is `wanted`. `connect` first."""
        place = self._with_daemon(lambda client: Place(client, wanted, timeout))
        if place.own:
            if not self._own:
                atexit.register(self.close)
            self._own.add(place)
        return place

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Return the daemon's reply."""
        return self._with_daemon(lambda client: client.request(message, timeout=timeout))

    def _with_daemon(self, send: Callable[[Client], _T]) -> _T:
        """Return what `send` does. If the daemon ended before it got the message, start it again."""
        assert self.client is not None, "used before `connect`"
        try:
            return send(self.client)
        except (ConnectionLost, DaemonNotRunning) as error:
            if error.maybe_executed:
                raise
            start_daemon(self.client.name)
        return send(self.client)

    def leave(self, place: Place) -> None:
        """Leave a tab; it is closed if it was opened for this process."""
        self._own.discard(place)
        place.leave()

    def close(self) -> None:
        """Leave all tabs and close the client, if any."""
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
            # ConnectionLost, if the daemon is dying: nothing was done yet.
            start_daemon(name, timeout=timeout, on_progress=on_progress)
        except BrowserLost:
            start_daemon(name, timeout=timeout, on_unhealthy="restart", on_progress=on_progress)
        return _find(name, timeout)


def _find(name: str, timeout: float) -> Client:
    """Return the client of a running daemon whose browser is connected, and is the one that the environment asks for."""
    client = connect_daemon(name, max_message=MAX_MESSAGE, errors=CLASSES.values())
    try:
        if not is_browser_daemon(client.app_version):
            raise wrong_daemon(name)
        reply = client.request({"meta": "check_browser", "requested_settings": requested_settings(os.environ)}, timeout=timeout)
        if "error" in reply:
            raise from_reply(reply["error"])
    except BaseException:
        client.close()
        raise
    return client
