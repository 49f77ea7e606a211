"""Tracks the navigations of each session's frames, and answers requests that wait for a page.

Code in a page starts a navigation some time after Chrome has answered the click, key or script that ran it. The reply to an
evaluation that is sent after that answer arrives after `Page.frameRequestedNavigation`. During a navigation, Chrome queues
evaluations for the resulting document, also if that is the old one (a download, a 204, a stopped navigation). Observed in
Chromium 156.

Waits include the first document of an iframe, since the load event of the page comes after it, but not that of an iframe added
later (an advertisement). The page's session also reports navigations that it requests in an out-of-process iframe.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from enum import Enum, auto
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

# A refresh with a shorter delay, in seconds, counts as a redirect, as in Chrome's history.
_REDIRECT_DELAY = 1.0
_FIRST = "initialFrameNavigation"
# Seconds before a page without a document is asked again, unless there is an event first.
_RETRY = 0.1
# Seconds after which an iframe that does not answer is busy, or navigating.
_BUSY_TIMEOUT = 1.0


class _State(Enum):
    """The state of an iframe's navigation, removed at its end."""

    SCHEDULED = auto()
    # As `_Page.requested`.
    REQUESTED = auto()
    LOADING = auto()


class _Page(Changing):
    """The navigations of the frames of one session. Notifies of each change."""

    def __init__(self) -> None:
        super().__init__()
        # The number of navigations to other documents, and the loader and address of the last.
        self.started = 0
        self.loader = self.url = ""
        # The renderer has requested a navigation that the browser has not started yet.
        self.requested = False
        # A navigation is scheduled, but not yet requested.
        self.scheduled = False
        # Navigations of frames, including the main frame, from one document to another.
        self.frames: dict[str, _State] = {}
        self.requests = Requests()

    def on_event(self, event: str, params: Message) -> None:
        """Process a Page event of the main frame."""
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

    def on_frame_event(self, event: str, params: Message, frame: str) -> None:
        """Process a Page event of any frame."""
        before = self.frames.get(frame)
        after = before
        if event == "frameRequestedNavigation":
            after = _State.REQUESTED if params.get("disposition") == "currentTab" and params.get("reason") != _FIRST else None
        elif event == "frameScheduledNavigation":
            after = before or (_State.SCHEDULED if params.get("delay", 0) < _REDIRECT_DELAY else None)
        elif event == "frameClearedScheduledNavigation":
            after = None if before is _State.SCHEDULED else before
        elif event == "frameStartedNavigating" or (event == "frameNavigated" and before is not None):
            after = before and (None if "sameDocument" in params.get("navigationType", "") else _State.LOADING)
        elif event == "frameStoppedLoading" or (event == "frameDetached" and params.get("reason") != "swap"):
            after = None
        if after is not None:
            self.frames[frame] = after
        else:
            self.frames.pop(frame, None)
        if after is not before or event == "frameDetached":
            self.notify()


class Navigation(Part):
    """The navigations of all sessions, and the requests that wait for them."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._pages: dict[str, _Page] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests for navigations."""
        waits = {
            "wait_for_load": self._is_loaded,
            "wait_for_element": self._has_element,
            "wait_for_url": self._has_url,
            "wait_for_network_idle": self._is_idle,
        }
        return {**{verb: self._repeated(wait) for verb, wait in waits.items()}, "last_navigation": self._last_navigation}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Track navigations of frames, and requests. A main frame has the id of its target."""
        if method == "Target.detachedFromTarget":
            if (page := self._pages.pop(params["sessionId"], None)) is not None:
                self._wake(page)
        elif method == "Target.targetCrashed":
            for page in self._pages.values():
                page.frames.pop(params["targetId"], None)
            for crashed in self.app.sessions.of_target(params["targetId"]):
                self._wake(self._page(crashed))
        elif method == "Target.targetCreated":
            for page in self._pages.values():
                if params["targetInfo"]["targetId"] in page.frames:
                    page.notify()
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
        else:
            page.on_frame_event(event, params, frame)
            if frame == main_frame:
                page.on_event(event, params)
                if event == "frameNavigated":
                    # There may be no events for the end of its iframes.
                    page.frames.clear()

    @staticmethod
    def _wake(page: _Page) -> None:
        """Wake all waiting requests: the page can't answer."""
        page.notify()
        page.requests.notify()

    def on_connected(self, connection: Connection) -> None:
        """Wake all waiting requests when the connection is lost."""

        def wake() -> None:
            for page in self._pages.values():
                self._wake(page)

        connection.when_lost(wake)

    def on_lost(self) -> None:
        """Forget the sessions of the lost connection."""
        self._pages.clear()

    def _page(self, session: str) -> _Page:
        return self._pages.setdefault(session, _Page())

    def _repeated(self, wait: Callable[[Message, Connection, str], Awaitable[bool]]) -> Verb:
        """Return a verb that repeats `wait` until it is True. ``done`` in the reply is False after ``timeout`` seconds."""

        async def repeated(message: Message) -> Message:
            session = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_of(message)):
                    done = False
                    while not done:
                        # If the session has ended meanwhile, attach again, or raise `TabClosed`.
                        connection, session, _ = await self.app.sessions.page_of(message)
                        done = await wait(message, connection, session)
                    return {"done": True, "session_id": session}
            return {"done": False, "session_id": session}

        return repeated

    async def _is_loaded(self, message: Message, connection: Connection, session: str) -> bool:
        loaded = await self._ask(message, connection, session, scripts.LOADED)
        return bool(loaded) and await self._are_frames_loaded(message, connection, session)

    async def _are_frames_loaded(self, message: Message, connection: Connection, session: str) -> bool:
        """Return whether no iframe of the tab is navigating; wait for one that is."""
        frames, tab = self.app.frames, self.app.sessions.target_of(session)
        targets = await frames.targets_in(tab) if frames.sessions else []
        inside = [frames.sessions[one] for one in targets if one in frames.sessions]
        await asyncio.gather(*(self._run_queue(connection, one) for one in inside))
        pages = [self._page(one) for one in (session, *inside)]
        requested = {frame for page in pages for frame, state in page.frames.items() if state is _State.REQUESTED}
        if not any(page.frames.keys() - {tab} for page in pages):
            return True
        await self._catch_up(connection, session, timeout_of(message))
        changes = [page.changed for page in pages]
        targets = await frames.targets_in(tab)
        for page, changed in zip(pages, changes, strict=True):
            for frame in page.frames.keys() - {tab}:
                if frame in targets:
                    return await self._is_target_loaded(message, connection, frame, pages)
                if page.frames[frame] is not _State.REQUESTED:
                    await changed.wait()
                elif frame in requested:
                    # The browser has refused the navigation.
                    del page.frames[frame]
                return False
        return True

    @staticmethod
    async def _run_queue(connection: Connection, session: str) -> None:
        """Wait until an iframe has run its pending tasks, unless it is busy."""
        params = {"expression": scripts.ADDRESS, "awaitPromise": True}
        with contextlib.suppress(CDPError, TimeoutError):
            await connection.call("Runtime.evaluate", params, session=session, timeout=_BUSY_TIMEOUT)

    async def _is_target_loaded(self, message: Message, connection: Connection, frame: str, pages: list[_Page]) -> bool:
        """Wait until an out-of-process iframe has loaded, or ended. Return False, since there may be more."""
        with contextlib.suppress(CDPError):
            if await self._ask(message, connection, await self.app.frames.session_of(frame), scripts.LOADED):
                for page in pages:
                    page.frames.pop(frame, None)
        return False

    async def _has_element(self, message: Message, connection: Connection, session: str) -> bool:
        selector, visible = message.get("selector"), message.get("visible", False)
        if not isinstance(selector, str) or not isinstance(visible, bool):
            raise bad_request("wait_for_element needs selector, a text, and visible, true or false")
        milliseconds = min(timeout_of(message) * 1000, 2**31 - 1)
        expression = f"{scripts.ELEMENT}({json.dumps(selector)}, {json.dumps(visible)}, {milliseconds})"
        return bool(await self._ask(message, connection, session, expression))

    async def _has_url(self, message: Message, connection: Connection, session: str) -> bool:
        pattern = message.get("pattern")
        if not isinstance(pattern, str):
            raise bad_request("wait_for_url needs a pattern, a text")
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
            raise bad_request("wait_for_network_idle needs idle, a number of seconds from 0 on")
        # After its reply, all requests that were started before are known.
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
        """Return the ``value`` of a script, or None if its document is being replaced."""
        page, timeout = self._page(session), timeout_of(message)
        started, changed = page.started, page.changed
        params = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        try:
            reply = await connection.call("Runtime.evaluate", params, session=session, timeout=timeout)
        except CDPError as error:
            if error.code != SERVER_ERROR or error.data.get("crashed"):
                raise
            # The document was replaced.
            if session in self.app.sessions:
                await self._wait(changed)
            return None
        value = reply["result"].get("value") or {}
        if "invalid" in value:
            raise InvalidArgument(escape_control(value["invalid"]))
        if page.requested:
            # The browser starts or refuses the navigation before it answers.
            page.requested = False
            await self._catch_up(connection, session, timeout)
            return None
        if page.scheduled:
            await self._wait(page.changed)
            return None
        return value.get("value") if page.started == started else None

    @staticmethod
    async def _catch_up(connection: Connection, session: str, timeout: float) -> None:
        """Wait until all started navigations are known: the browser reports them before it answers."""
        try:
            await connection.call("Page.getNavigationHistory", session=session, timeout=timeout)
        except CDPError as error:
            # "Not attached to an active page": the document is being replaced, and the navigation is known.
            if error.code != SERVER_ERROR or error.data.get("crashed"):
                raise

    @staticmethod
    async def _wait(changed: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY):
                await changed.wait()

    async def _last_navigation(self, message: Message) -> Message:
        """Return ``loader_id`` and ``url`` of the last navigation."""
        connection, session, _ = await self.app.sessions.page_of(message)
        await self._catch_up(connection, session, timeout_of(message))
        page = self._page(session)
        return {"loader_id": page.loader, "url": page.url, "session_id": session}
