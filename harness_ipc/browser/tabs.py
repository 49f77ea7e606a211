"""The browser's tabs: where one is, and closing it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from .errors import BrowserTimeout, CDPError, DialogOpen
from .part import Part, named_session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .daemon import BrowserApp
    from .part import Message, Method, Verb

# Seconds for a page to say where it is, before the browser is asked instead.
_WHERE_TIMEOUT = 3.0
# Seconds for a tab that closes, beyond the browser's word that it will.
_CLOSE_TIMEOUT = 5.0


class Tabs(Part):
    """The tabs of the browser."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        # Tabs that somebody waits for to be closed.
        self._closing: dict[str, asyncio.Event] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests about tabs."""
        return {"current_tab": self.current_tab}

    @property
    def methods(self) -> Mapping[str, Method]:
        """What opens and closes them."""
        return {"Target.closeTarget": self._close, "Target.createBrowserContext": self._create_context}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Take note of a tab that has closed, or asks its user whether it may be."""
        if method == "Target.targetDestroyed":
            self._end_closing(params["targetId"])
        elif method == "Page.javascriptDialogOpening" and session is not None:
            self._end_closing(self.app.sessions.target_of(session))

    async def current_tab(self, message: Message) -> Message:
        """Say where the tab of a session is."""
        connection = await self.app.connected()
        sessions = self.app.sessions
        session = await sessions.session_for(named_session(message))
        target = sessions.target_of(session)
        try:
            # The browser itself learns of a navigation later than its page.
            sessions.check_page(session, "Runtime.evaluate")
            params = {"expression": "[location.href, document.title]", "returnByValue": True}
            result = await connection.call("Runtime.evaluate", params, session=session, timeout=_WHERE_TIMEOUT)
            url, title = result["result"]["value"]
        except (CDPError, DialogOpen, BrowserTimeout, LookupError, TypeError):
            # A page that is held can't say it.
            info = (await connection.call("Target.getTargetInfo", {"targetId": target}))["targetInfo"]
            url, title = info.get("url", ""), info.get("title", "")
        return {"targetId": target, "url": url, "title": title, "session_id": session}

    async def _create_context(self, params: Message, timeout: float) -> Message:
        result = await self.app.connection.call("Target.createBrowserContext", params, timeout=timeout)
        if (own := self.app.own_browser) is not None:
            await own.set_downloads(self.app.connection, result["browserContextId"])
        return result

    async def _close(self, params: Message, timeout: float) -> Message:
        """Close a tab, and return when it is closed, or asks its user whether it may be."""
        connection = self.app.connection
        target = params.get("targetId")
        if not isinstance(target, str) or target in self._closing:
            return await connection.call("Target.closeTarget", params, timeout=timeout)
        closed = self._closing[target] = asyncio.Event()
        try:
            # Chromium 156 itself ends when it closes a tab that an iframe's dialog holds.
            await self.app.sessions.dismiss_dialog(target)
            result = await connection.call("Target.closeTarget", params, timeout=timeout)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closed.wait(), min(timeout, _CLOSE_TIMEOUT))
            return result
        finally:
            del self._closing[target]

    def _end_closing(self, target: str) -> None:
        if (closed := self._closing.get(target)) is not None:
            closed.set()
