"""The daemon that holds one browser. It routes requests and events to its parts. Run it with `python -m`.

A request is ``{"method", "params", "session_id", "timeout"}`` for CDP, where all but the method are optional;
``{"meta": verb}``; or the request of a stream: see `Part`. The reply contains the session that was used, so that a caller can
stay in its tab when others switch.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import harness_ipc

from . import APP_VERSION, BROWSER, BROWSER_DOMAINS, MAX_MESSAGE, daemon_name, discovery
from .accessibility import Accessibility
from .addresses import address_of, without_secret
from .connection import SESSION_NOT_FOUND, Connection
from .download_events import DownloadEvents
from .errors import BrowserError, BrowserLost, BrowserMismatch, BrowserNotFound, CDPError
from .events import Events, shorten
from .frames import Frames
from .gone import GoneBrowser
from .logins import Logins
from .navigation import Navigation
from .part import Part, bad_request, named_session, timeout_of
from .requested import find_mismatch, reload_command, requested_settings
from .sessions import Sessions
from .tabs import Tabs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .launcher import ManagedBrowser
    from .part import Message, Method, Stream, Verb

logger = logging.getLogger("harness_ipc.browser.daemon")  # not __main__

IDLE_TIMEOUT = "HARNESS_BROWSER_IDLE_TIMEOUT"

# Seconds for the browser to answer a health check, whose client waits two.
_HEALTH_TIMEOUT = 1.5


class _Table:
    """Verbs, streams and methods of all parts, by name."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.verbs: dict[str, Verb] = {}
        self.streams: dict[str, Stream] = {}
        self.methods: dict[str, Method] = {}
        for part in parts:
            self.verbs |= part.verbs
            self.streams |= part.streams
            self.methods |= part.methods


class BrowserApp:
    """The app of the browser daemon `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._source: discovery.Source | None = None
        self._connection: Connection | None = None
        # Held to connect and to attach to tabs: tasks that waited for it find that done.
        self.reconnect_lock = asyncio.Lock()
        self.events = Events(self)
        self.sessions = Sessions(self)
        self.logins = Logins(self)
        self.tabs = Tabs(self)
        self.frames = Frames(self)
        # In the order in which they receive events.
        self._parts: list[Part] = [
            self.events,
            self.sessions,
            self.logins,
            self.tabs,
            self.frames,
            Accessibility(self),
            Navigation(self),
            GoneBrowser(self),
            DownloadEvents(self),
        ]
        self._table = _Table(self._parts)
        self._table.verbs |= {"check_browser": self._check_browser, "connection_status": self._connection_status}

    async def start(self) -> None:
        """Find or start the browser and attach to a page. Raises `BrowserNotFound`."""
        self._source, self._connection = await discovery.find(self._name, self._on_event)
        try:
            for part in self._parts:
                part.on_connected(self.connection)
            await self.sessions.watch_tabs()
            await self.sessions.attach_a_page()
        except BrowserError as error:
            raise BrowserNotFound(f"{self._source.how} has no page to attach to: {error}") from None

    async def stop(self) -> None:
        """Close the connection. A managed browser ends."""
        if self._connection is not None:
            if self.own_browser is not None:
                await self.own_browser.close(self._connection)
            await self._connection.close()

    def drain(self) -> None:
        """End all streams, since the daemon stops."""
        for part in self._parts:
            part.on_drain()

    async def health(self) -> Message:
        """Check the browser. Raises `BrowserLost` or `BrowserTimeout` if it does not answer."""
        begun = time.perf_counter()
        version = await self.connection.call("Browser.getVersion", timeout=_HEALTH_TIMEOUT)
        milliseconds = round((time.perf_counter() - begun) * 1000, 3)
        return {"browser": version.get("product"), "found": self._how, "round_trip_ms": milliseconds}

    async def handle(self, message: Message) -> Any:
        """Return the reply to one request, or the items of a stream. Raises `BrowserError`."""
        verb = message.get("meta")
        if verb is None:
            method = message.get("method")
            if isinstance(method, str) and method in self._table.streams:
                return self._table.streams[method](message.get("params") or {})
            return await self._forward(message)
        verbs = self._table.verbs
        if not isinstance(verb, str) or verb not in verbs:
            raise bad_request(f"there is no meta request {verb!a}: use {', '.join(verbs)}, health, ping or shutdown")
        return await verbs[verb](message)

    async def _forward(self, message: Message) -> Message:
        method = message.get("method")
        params = message.get("params") or {}
        timeout = timeout_of(message)
        if not isinstance(method, str) or not isinstance(params, dict):
            raise bad_request('a request must be {"method": text, "params": object, "session_id": text, "timeout": seconds}')
        connection = await self.connected()
        named = named_session(message)
        if named == BROWSER or (named is None and method.startswith(BROWSER_DOMAINS)):
            return {"result": await self._call_browser(method, params, timeout), "session_id": None}
        session = await self.sessions.session_for(named)
        self.sessions.check_page(session, method)
        try:
            result = await connection.call(method, params, session=session, timeout=timeout)
        except CDPError as error:
            if error.code != SESSION_NOT_FOUND:
                raise
            # The call did not run: retry once.
            self.sessions.forget(session)
            session = await self.sessions.session_for(named and session)
            result = await (await self.connected()).call(method, params, session=session, timeout=timeout)
        return {"result": result, "session_id": session}

    async def _call_browser(self, method: str, params: Message, timeout: float) -> Message:
        if method in self._table.methods:
            return await self._table.methods[method](params, timeout)
        if method == "Target.setDiscoverTargets" or (method == "Target.setAutoAttach" and params.get("waitForDebuggerOnStart")):
            raise bad_request(
                f"{method} would change all tabs, also those of others: pass the session_id of a page, or of "
                'cdp("Target.attachToBrowserTarget")'
            )
        return await self.connection.call(method, params, timeout=timeout)

    # The connection.

    @property
    def _how(self) -> str | None:
        return None if self._source is None else self._source.how

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of a browser that is not managed, or None if unknown."""
        endpoint = self.connection.endpoint
        return None if endpoint is None else address_of(endpoint)

    @property
    def own_browser(self) -> ManagedBrowser | None:
        """The managed browser, or None."""
        return None if self._source is None else self._source.own

    @property
    def connection(self) -> Connection:
        """The connection. If it is lost, each call raises."""
        assert self._connection is not None, "used before `start`"
        return self._connection

    async def connected(self) -> Connection:
        """Return the connection; reconnect if it was lost. Raises `BrowserLost` if that fails."""
        if self.connection.lost is not None:
            async with self.reconnect_lock:
                if self.connection.lost is not None:
                    await self._reconnect()
        return self.connection

    async def _reconnect(self) -> None:
        assert self._source is not None
        for part in self._parts:
            part.on_lost()
        # No page of the new connection succeeds the default session, unless its tab still exists.
        tab = self.sessions.target_of(self.sessions.default)
        logger.warning("the connection to the browser was lost: connecting again to %s", self._source.how)
        try:
            self._connection = await self._source.connect(self._on_event)
            for part in self._parts:
                part.on_connected(self.connection)
            await self.sessions.watch_tabs()
            # Sessions end with their connection. Those of a tab that still exists are attached again when a request names them.
            if tab not in {info["targetId"] for info in await self.sessions.targets()}:
                await self.sessions.attach_a_page()
        except BrowserError as error:
            for part in self._parts:
                part.on_unreachable(error)
            raise BrowserLost(
                f"the browser is gone, and reconnecting failed: {error}; the next command looks for another one"
            ) from None

    def _on_event(self, method: str, params: Message, session: str | None, frame: str | bytes) -> None:
        """Pass an event to the parts, in the order of the browser."""
        if session is not None and session not in self.sessions:
            # A session that has ended: each one is announced by its parent before it has events.
            return
        if self.logins.owns(session):
            self.logins.on_event(method, params, session)
            return
        # First: it truncates long texts, also for the other parts.
        self.events.add(session, method, params, frame)
        for part in self._parts:
            part.on_event(method, params, session)

    async def _check_browser(self, message: Message) -> Message:
        """Raise `BrowserLost` if the browser is gone, and `BrowserMismatch` if the command asks for another one."""
        mismatch = self._mismatch(message)
        if mismatch is None:
            await self.connected()
        elif self.connection.lost is not None:
            raise BrowserLost(str(self.connection.lost))
        else:
            wanted, instead = mismatch
            raise BrowserMismatch(
                f"the daemon {self._name!r} holds {self._how}{instead}, but this command asks for {wanted}: run "
                f"{reload_command(self._name)} to replace it, or choose another --name"
            )
        return {}

    def _mismatch(self, message: Message) -> tuple[str, str] | None:
        wanted = message.get("requested_settings") or {}
        if not isinstance(wanted, dict) or not all(isinstance(value, str) for value in wanted.values()):
            raise bad_request("the requested settings must be an object of variables and values")
        assert self._source is not None
        own = None if self._source.own is None else self._source.own.settings
        return find_mismatch(wanted, own, self._source.named, self.connection.endpoint)

    async def _connection_status(self, message: Message) -> Message:
        """Return the state of the browser, without reconnecting."""
        named = None if self._source is None or self._source.named is None else without_secret(self._source.named[1])
        mismatch = self._mismatch(message)
        own = self.own_browser
        status: Message = {"connected": False, "found": self._how, "own": own is not None, "pid": own.pid() if own else None}
        status |= {"named": named, "mismatch": None if mismatch is None else mismatch[0]}
        status |= {"browser": None, "round_trip_ms": None, "session_id": None, "tab": None, "dialog": None, "problem": None}
        try:
            health = await self.health()
            status |= {"connected": True, "browser": health["browser"], "round_trip_ms": health["round_trip_ms"]}
            status["session_id"] = self.sessions.default
            if self.sessions.default in self.sessions:
                tab = await self.tabs.current_tab({})
                status["tab"] = {key: tab[key] for key in ("targetId", "url", "title")}
                shorten(status["tab"])
                status["dialog"] = self.sessions.dialog_of(tab["targetId"])
        except BrowserError as error:
            status["problem"] = str(error)
        return status


def main() -> None:
    """Run the daemon named by the first argument, or by `BU_NAME`. Raises what `harness_ipc.run_daemon` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else daemon_name()
    # Make paths absolute: they are relative to the starter's directory, which a daemon leaves.
    os.environ.update(requested_settings(os.environ))
    idle = os.environ.get(IDLE_TIMEOUT)
    try:
        idle_timeout = float(idle) if idle else None
    except ValueError:
        # There is no log yet: the starter reads this from standard error.
        sys.exit(f"{IDLE_TIMEOUT}={idle!a} is not a number of seconds")
    # The tree of a page has a hundred thousand objects without cycles: collections would take a quarter of a snapshot's time.
    gc.set_threshold(100_000, 50, 50)
    app = BrowserApp(name)
    harness_ipc.run_daemon(
        app, name, app_version=APP_VERSION, idle_timeout=idle_timeout, max_message=MAX_MESSAGE, on_drain=app.drain
    )


if __name__ == "__main__":
    try:
        main()
    except harness_ipc.HarnessIPCError as error:
        # The log, which may be stderr, and the starter have the error. A traceback would add nothing.
        sys.exit(harness_ipc.escape_control(str(error)) if sys.stderr.isatty() else 1)
