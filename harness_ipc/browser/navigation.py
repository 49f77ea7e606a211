"""Follows the navigations of the main frame of each session, and waits for what a page comes to: one request each.

Code in a page begins a navigation some time after Chrome has answered the click, the key or the script that ran it. An
evaluation that is sent after that answer is ordered behind it: its reply comes after `Page.frameRequestedNavigation`. While a
navigation is under way, Chrome holds evaluations back for the document in which it ends, also where that is the old one (a
download, a 204, a navigation that was stopped). Measured on Chromium 156.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from harness_ipc import escape_control

from . import scripts
from .errors import SERVER_ERROR, CDPError, InvalidArgument
from .network import Requests
from .part import Changing, Part, bad_request, timeout_of
from .url_pattern import compile_url_pattern

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .connection import Connection
    from .daemon import BrowserApp
    from .part import Message, Verb

# A page that refreshes itself after less than that, in seconds, is a redirect: Chrome keeps it out of the history, too.
_REDIRECT_DELAY = 1.0
# Seconds until a page is asked again that had no document to ask, unless an event comes first.
_RETRY = 0.1


class _Page(Changing):
    """What the events of one session say of the navigations of its main frame. It changes with each of them."""

    def __init__(self) -> None:
        super().__init__()
        # Navigations to other documents that were started, with the loader and the address of the last.
        self.started = 0
        self.loader = self.url = ""
        # The renderer has asked for one that the browser has not started yet.
        self.requested = False
        # One is about to be asked for.
        self.scheduled = False
        self.requests = Requests()

    def on_event(self, event: str, params: Message) -> None:
        """Take note of an event of the domain Page that is of the main frame."""
        if event == "frameRequestedNavigation":
            self.requested = params.get("disposition") == "currentTab"
        elif event == "frameScheduledNavigation":
            self.scheduled = params.get("delay", 0) < _REDIRECT_DELAY
        elif event == "frameStartedNavigating":
            self.requested = False
            if "sameDocument" not in params.get("navigationType", ""):
                self.started += 1
                self.loader, self.url = params.get("loaderId", ""), params.get("url", "")
        if event in ("frameClearedScheduledNavigation", "frameNavigated"):
            self.scheduled = False
        self.notify()


class Navigation(Part):
    """The navigations of the sessions, and the requests that wait for them."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._pages: dict[str, _Page] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests about navigations."""
        waits = {
            "wait_for_load": self._is_loaded,
            "wait_for_element": self._has_element,
            "wait_for_url": self._has_url,
            "wait_for_network_idle": self._is_idle,
        }
        return {**{verb: self._repeated(wait) for verb, wait in waits.items()}, "last_navigation": self._last_navigation}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Note how main frames navigate, which have the ids of their targets, and what is requested."""
        if method == "Target.detachedFromTarget":
            if (page := self._pages.pop(params["sessionId"], None)) is not None:
                self._wake(page)
        elif method == "Target.targetCrashed":
            for crashed in self.app.sessions.of_target(params["targetId"]):
                self._wake(self._page(crashed))
        elif session is not None:
            domain, _, event = method.partition(".")
            page = self._page(session)
            if domain == "Network":
                page.requests.on_event(event, params)
            elif domain == "Page":
                self._on_page_event(page, event, params, self.app.sessions.target_of(session))

    def _on_page_event(self, page: _Page, event: str, params: Message, main_frame: str) -> None:
        frame = params["frame"]["id"] if "frame" in params else params.get("frameId", "")
        if event == "frameNavigated":
            page.requests.leave_document(frame, params["frame"]["loaderId"])
        elif event == "frameDetached":
            page.requests.leave_document(frame)
        if event == "javascriptDialogOpening":
            self._wake(page)
        elif frame == main_frame:
            page.on_event(event, params)

    @staticmethod
    def _wake(page: _Page) -> None:
        """Have all waits look again: the page can't answer."""
        page.notify()
        page.requests.notify()

    def on_connected(self, connection: Connection) -> None:
        """Wake all with the end of the connection."""

        def wake() -> None:
            for page in self._pages.values():
                self._wake(page)

        connection.when_lost(wake)

    def on_lost(self) -> None:
        """Forget the sessions of the connection that was lost."""
        self._pages.clear()

    def _page(self, session: str) -> _Page:
        return self._pages.setdefault(session, _Page())

    def _repeated(self, wait: Callable[[Message, Connection, str], Awaitable[bool]]) -> Verb:
        """Return the request that is answered once `wait` is True: ``done`` is False after ``timeout`` seconds."""

        async def repeated(message: Message) -> Message:
            session = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_of(message)):
                    done = False
                    while not done:
                        # A session that ended meanwhile is attached again, or its tab is gone.
                        connection, session, _ = await self.app.sessions.page_of(message)
                        done = await wait(message, connection, session)
                    return {"done": True, "session_id": session}
            return {"done": False, "session_id": session}

        return repeated

    async def _is_loaded(self, message: Message, connection: Connection, session: str) -> bool:
        return bool(await self._ask(message, connection, session, scripts.LOADED))

    async def _has_element(self, message: Message, connection: Connection, session: str) -> bool:
        selector, visible = message.get("selector"), message.get("visible", False)
        if not isinstance(selector, str) or not isinstance(visible, bool):
            raise bad_request("wait_for_element wants a selector, a text, and visible, true or false")
        milliseconds = min(timeout_of(message) * 1000, 2**31 - 1)
        expression = f"{scripts.ELEMENT}({json.dumps(selector)}, {json.dumps(visible)}, {milliseconds})"
        return bool(await self._ask(message, connection, session, expression))

    async def _has_url(self, message: Message, connection: Connection, session: str) -> bool:
        pattern = message.get("pattern")
        if not isinstance(pattern, str):
            raise bad_request("wait_for_url wants a pattern, a text")
        changed = self._page(session).changed
        url = await self._ask(message, connection, session, scripts.ADDRESS)
        if url is not None and compile_url_pattern(pattern).search(url):
            return True
        if url is not None:
            await changed.wait()
        return False

    async def _is_idle(self, message: Message, connection: Connection, session: str) -> bool:
        idle = message.get("idle")
        if isinstance(idle, bool) or not isinstance(idle, int | float) or not idle >= 0:
            raise bad_request("wait_for_network_idle wants idle, a number of seconds from 0 on")
        # Behind it, all is told that was begun just before.
        if await self._ask(message, connection, session, scripts.ADDRESS) is None:
            return False
        requests = self._page(session).requests
        if requests.pending:
            await requests.changed.wait()
            return False
        try:
            async with asyncio.timeout(idle):
                await requests.changed.wait()
        except TimeoutError:
            return True
        return False

    async def _ask(self, message: Message, connection: Connection, session: str, expression: str) -> Any:
        """Return the ``value`` of a script, or None if its document makes, or made, room for another."""
        page, timeout = self._page(session), timeout_of(message)
        started, changed = page.started, page.changed
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        try:
            reply = await connection.call("Runtime.evaluate", asked, session=session, timeout=timeout)
        except CDPError as error:
            if error.code != SERVER_ERROR or error.data.get("crashed"):
                raise
            # The document that was asked has made room for the next one.
            if session in self.app.sessions:
                await self._wait(changed)
            return None
        value = reply["result"].get("value") or {}
        if "invalid" in value:
            raise InvalidArgument(escape_control(value["invalid"]))
        if page.requested:
            # The browser starts it, or refuses it, before it answers.
            page.requested = False
            await self._catch_up(connection, session, timeout)
            return None
        if page.scheduled:
            await self._wait(page.changed)
            return None
        return value.get("value") if page.started == started else None

    @staticmethod
    async def _catch_up(connection: Connection, session: str, timeout: float) -> None:
        """Return once the browser has told which navigations it has started: it does before it answers."""
        try:
            await connection.call("Page.getNavigationHistory", session=session, timeout=timeout)
        except CDPError as error:
            # "Not attached to an active page" is the answer while one document makes room for the next, which was told.
            if error.code != SERVER_ERROR or error.data.get("crashed"):
                raise

    @staticmethod
    async def _wait(changed: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY):
                await changed.wait()

    async def _last_navigation(self, message: Message) -> Message:
        """Return ``loader_id`` and ``url`` of the navigation that was started last."""
        connection, session, _ = await self.app.sessions.page_of(message)
        await self._catch_up(connection, session, timeout_of(message))
        page = self._page(session)
        return {"loader_id": page.loader, "url": page.url, "session_id": session}
