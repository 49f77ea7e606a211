"""Follows the navigations of the main frame of each session, and waits for a page to load: one request, answered by events.

Code in a page begins a navigation some time after Chrome has answered the click, the key or the script that ran it. An
evaluation that is sent after that answer is ordered behind it: its reply comes after `Page.frameRequestedNavigation`. While a
navigation is under way, Chrome holds evaluations back for the document in which it ends, also where that is the old one (a
download, a 204, a navigation that was stopped). Measured on Chromium 156.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from .errors import SERVER_ERROR, CDPError
from .part import Part, timeout_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .connection import Connection
    from .daemon import BrowserApp
    from .part import Message, Verb

# Answered behind what the page has queued with setTimeout(…, 0), and behind its load handlers. Some pages replace setTimeout.
_LOADED = """new Promise(done => {
  const native = Function.prototype.toString.call(setTimeout).includes("[native code]")
  const look = () => {
    if (document.readyState !== "complete") document.addEventListener("readystatechange", look, {once: true})
    else if (native) setTimeout(done, 0, true)
    else done(true)
  }
  look()
})"""
# A page that refreshes itself after less than that, in seconds, is a redirect: Chrome keeps it out of the history, too.
_REDIRECT_DELAY = 1.0
# Seconds until a page is asked again that had no document to ask, unless an event comes first.
_RETRY = 0.1


class _Page:
    """What the events of one session say of the navigations of its main frame."""

    def __init__(self) -> None:
        # Navigations to other documents that were started, with the loader and the address of the last.
        self.started = 0
        self.loader = self.url = ""
        # The renderer has asked for one that the browser has not started yet.
        self.requested = False
        # One is about to be asked for.
        self.scheduled = False
        # Set, and replaced, with each event.
        self.changed = asyncio.Event()

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
        self.changed.set()
        self.changed = asyncio.Event()


class Navigation(Part):
    """The navigations of the sessions, and the requests that wait for them."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._pages: dict[str, _Page] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests about navigations."""
        return {"wait_for_load": self._wait_for_load, "last_navigation": self._last_navigation}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Note how a main frame, whose id is that of its target, navigates."""
        if method == "Target.detachedFromTarget":
            self._pages.pop(params["sessionId"], None)
        elif method.startswith("Page.") and session is not None:
            frame = params["frame"]["id"] if "frame" in params else params.get("frameId")
            if frame == self.app.sessions.target_of(session):
                self._page(session).on_event(method.removeprefix("Page."), params)

    def on_lost(self) -> None:
        """Forget the sessions of the connection that was lost."""
        self._pages.clear()

    def _page(self, session: str) -> _Page:
        return self._pages.setdefault(session, _Page())

    async def _wait_for_load(self, message: Message) -> Message:
        """Wait until the page has loaded, or what it navigates to. ``loaded`` is False after ``timeout`` seconds."""
        timeout = timeout_of(message)
        session = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                loaded = False
                while not loaded:
                    # A session that ended meanwhile is attached again, or its tab is gone.
                    connection, session, _ = await self.app.sessions.page_of(message)
                    loaded = await self._is_loaded(connection, session, timeout)
                return {"loaded": True, "session_id": session}
        return {"loaded": False, "session_id": session}

    async def _is_loaded(self, connection: Connection, session: str, timeout: float) -> bool:
        """Wait until the document has loaded, and return whether it stays: False if it makes, or made, room for another."""
        page = self._page(session)
        started, changed = page.started, page.changed
        asked = {"expression": _LOADED, "awaitPromise": True, "returnByValue": True}
        try:
            await connection.call("Runtime.evaluate", asked, session=session, timeout=timeout)
        except CDPError as error:
            if error.code != SERVER_ERROR or error.data.get("crashed"):
                raise
            # The document that was asked has made room for the next one.
            if session in self.app.sessions:
                await self._wait(changed)
            return False
        if page.requested:
            # The browser starts it, or refuses it, before it answers.
            page.requested = False
            await connection.call("Page.getNavigationHistory", session=session, timeout=timeout)
            return False
        if page.scheduled:
            await self._wait(page.changed)
            return False
        return page.started == started

    @staticmethod
    async def _wait(changed: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY):
                await changed.wait()

    async def _last_navigation(self, message: Message) -> Message:
        """Return ``loader_id`` and ``url`` of the navigation that was started last."""
        connection, session, _ = await self.app.sessions.page_of(message)
        await connection.call("Page.getNavigationHistory", session=session, timeout=timeout_of(message))
        page = self._page(session)
        return {"loader_id": page.loader, "url": page.url, "session_id": session}
