"""The tabs of the browser: their clients and names, opening and closing them.

A client is in a tab for as long as its stream is in flight, so a killed client leaves too.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING

import harness_ipc

from . import CALL_TIMEOUT
from .errors import BrowserError, BrowserTimeout, CDPError, DialogOpen, TabClosed, TabInUse
from .part import Part, bad_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from .daemon import BrowserApp
    from .part import Message, Method, Stream, Verb

# Seconds for a page to report its URL, before the browser is asked instead.
_WHERE_TIMEOUT = 3.0
# Seconds for a tab to close after the browser has accepted that.
_CLOSE_TIMEOUT = 5.0


class _Occupant:
    """A client in a tab, for as long as its stream is in flight."""

    def __init__(self, wanted: Message) -> None:
        self.pid = harness_ipc.current_request().peer.pid
        # The tab name under which its switches are remembered for later clients; "" without a name, None for not at all.
        self.remembered: str | None = None if wanted.get("alone") else str(wanted.get("name") or "")
        self.target = ""
        # Tabs that are closed when it leaves.
        self.own: set[str] = set()


class Tabs(Part):
    """The tabs of the browser, and the clients in them.

    A client requests a tab by ``{"target_id"}``, ``{"tab": "current", an id or a part of a URL}``, ``{"new", "isolated",
    "background"}``, ``{"name"}`` or ``{"again": the previous target}``. Without any of these, it gets the tab that was switched
    to last, if no client is in it, or a new one. With "keep", a tab opened for it stays open when it leaves. With "switch",
    later clients (with the same "name") start in the tab, unless the client is "alone".
    """

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        # Tabs that are being closed.
        self._closing: dict[str, asyncio.Event] = {}
        self._occupants: dict[str, _Occupant] = {}
        # Target by name.
        self._named: dict[str, str] = {}
        # The tabs of each browser context, which is disposed with the last of them.
        self._contexts: dict[str, set[str]] = {}
        # Held while a client chooses its tab.
        self._choosing = asyncio.Lock()
        self._draining = asyncio.Event()

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests for tabs."""
        return {"current_tab": self.current_tab, "move_tab": self._move, "leave_tab": self._leave}

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The stream of a client in a tab."""
        return {"enter_tab": self._enter}

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods that open and close tabs."""
        return {"Target.closeTarget": self._close, "Target.createBrowserContext": self._create_context}

    def is_free(self, target: str) -> bool:
        """Return whether no client is in a tab, and it is neither named nor isolated."""
        pages = set().union(*self._contexts.values())
        return target not in {*self._named.values(), *pages} and not any(
            target == occupant.target or target in occupant.own for occupant in self._occupants.values()
        )

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Track new and closed tabs, and dialogs of closing ones."""
        if method == "Target.targetCreated":
            self._add_opened(params["targetInfo"])
        elif method == "Target.targetDestroyed":
            self._end_closing(params["targetId"])
            self._forget(params["targetId"])
        elif method == "Page.javascriptDialogOpening" and session is not None:
            self._end_closing(self.app.sessions.target_of(session))

    def on_drain(self) -> None:
        """End the streams. Tabs stay open for the clients' next daemon."""
        self._draining.set()

    def on_lost(self) -> None:
        """Forget browser contexts, which end with the connection."""
        self._contexts.clear()

    # The clients.

    async def _enter(self, wanted: Message) -> AsyncIterator[Message]:
        """Enter a tab and yield it, then wait until the client leaves."""
        occupant, number = _Occupant(wanted), uuid.uuid4().hex
        self._occupants[number] = occupant
        try:
            yield {"place": number, **await self._go(occupant, {"own": not wanted.get("keep"), **wanted})}
            await self._draining.wait()
        finally:
            del self._occupants[number]
            if not self._draining.is_set():
                self.start(self._close_own(occupant))

    async def _move(self, message: Message) -> Message:
        """Move a client to another tab."""
        return await self._go(self._occupant(message), message)

    async def _leave(self, message: Message) -> Message:
        """Close the tabs of a client that leaves."""
        await self._close_own(self._occupant(message))
        return {}

    def _occupant(self, message: Message) -> _Occupant:
        occupant = self._occupants.get(str(message.get("place")))
        if occupant is None:
            raise TabClosed("this place belongs to another daemon: enter a tab again")
        return occupant

    async def _go(self, occupant: _Occupant, wanted: Message) -> Message:
        """Move a client to the tab that it requests. Raises `TabClosed` if there is none, or `TabInUse`."""
        await self.app.connected()
        before = occupant.target
        # In a task: if the client leaves meanwhile, the new tab is closed with its others.
        choosing = self.start(self._choose(occupant, wanted))
        try:
            await asyncio.shield(choosing)
            target = occupant.target
            session = await self.app.sessions.session_in(target)
            if wanted.get("activate"):
                await self.app.connection.call("Target.activateTarget", {"targetId": target})
        except BaseException:
            occupant.target = before
            raise
        if occupant.remembered:
            self._named[occupant.remembered] = target
        elif occupant.remembered is not None and (wanted.get("switch") or wanted.get("keep")):
            self.app.sessions.default = session
        return {"session_id": session, "target_id": target, "own": bool(occupant.own)}

    async def _choose(self, occupant: _Occupant, wanted: Message) -> None:
        """Choose the tab that a client requests, one client at a time."""
        async with self._choosing:
            if "again" in wanted:
                occupant.target = await self._find_again(occupant, wanted)
            elif isinstance(wanted.get("target_id"), str):
                occupant.target = wanted["target_id"]
            elif wanted.get("tab"):
                occupant.target = await self._find(str(wanted["tab"]))
            elif wanted.get("new"):
                occupant.target = await self._open(occupant, wanted)
            elif wanted.get("name"):
                occupant.target = await self._find_named(occupant, wanted)
            else:
                current = self.app.sessions.target_of(await self.app.sessions.session_for(None))
                others = (other.target for other in self._occupants.values() if other is not occupant)
                occupant.target = await self._open(occupant, wanted) if current in others else current

    async def _find(self, text: str) -> str:
        """Return the current tab, the tab with the id `text`, or the only one with `text` in its URL."""
        if text == "current":
            return self.app.sessions.target_of(await self.app.sessions.session_for(None))
        pages = {info["targetId"]: info["url"] for info in await self.app.sessions.targets() if info["type"] == "page"}
        found = [text] if text in pages else [target for target, url in pages.items() if text in url]
        if not found:
            raise TabClosed(f"no tab has the id {text!r}, or that in its URL: see list_tabs()")
        if len(found) > 1:
            raise bad_request(f"{len(found)} tabs have {text!r} in their URL ({', '.join(found)}): give more of it, or one id")
        return found[0]

    async def _find_named(self, occupant: _Occupant, wanted: Message) -> str:
        name = wanted["name"]
        for other in self._occupants.values():
            if other is not occupant and other.remembered == name:
                whose = "another client" if other.pid is None else f"the process {other.pid}"
                text = f"{whose} is in the tab {name!r}: wait until it has ended, or use --tab {other.target} to share the tab"
                raise TabInUse(text, pid=other.pid)
        if self._named.get(name) in {info["targetId"] for info in await self.app.sessions.targets()}:
            return self._named[name]
        return await self._open(occupant, {**wanted, "own": False})

    async def _find_again(self, occupant: _Occupant, wanted: Message) -> str:
        """Return the tab of the client under an earlier daemon, or a new one."""
        target = str(wanted["again"])
        if target in {info["targetId"] for info in await self.app.sessions.targets()}:
            if wanted.get("own"):
                occupant.own.add(target)
            return target
        if wanted.get("name"):
            return await self._find_named(occupant, wanted)
        return await self._open(occupant, {**wanted, "own": True})

    # Opening and closing.

    async def _open(self, occupant: _Occupant, wanted: Message) -> str:
        """Open a tab; unless "keep" is set, it is closed when the client leaves."""
        params: Message = {"url": "about:blank", "background": not wanted.get("new") or bool(wanted.get("background"))}
        if wanted.get("isolated"):
            # Disposed with the connection at the latest.
            result = await self._create_context({"disposeOnDetach": True}, CALL_TIMEOUT)
            params["browserContextId"] = result["browserContextId"]
            self._contexts[result["browserContextId"]] = set()
        target = await self.app.sessions.open_tab(params)
        if wanted.get("own"):
            occupant.own.add(target)
            if occupant not in self._occupants.values():
                await self._close_own(occupant)
        return target

    def _add_opened(self, info: Message) -> None:
        """Add a new tab to its browser context, and to the client that owns its opener."""
        if info["type"] != "page":
            return
        if (pages := self._contexts.get(info.get("browserContextId", ""))) is not None:
            pages.add(info["targetId"])
        for occupant in self._occupants.values():
            if info.get("openerId") in occupant.own:
                occupant.own.add(info["targetId"])

    def _forget(self, target: str) -> None:
        """Record that a tab was closed."""
        for occupant in self._occupants.values():
            occupant.own.discard(target)
        for name in [name for name, named in self._named.items() if named == target]:
            del self._named[name]
        for context, pages in list(self._contexts.items()):
            if pages == {target}:
                del self._contexts[context]
                self.start(self._dispose(context))
            pages.discard(target)

    async def _dispose(self, context: str) -> None:
        with contextlib.suppress(BrowserError):
            await self.app.connection.call("Target.disposeBrowserContext", {"browserContextId": context})

    async def _close_own(self, occupant: _Occupant) -> None:
        """Close the tabs of a client that leaves. Those that another client is in become its own."""
        others = [other for other in self._occupants.values() if other is not occupant]
        while occupant.own:
            target = occupant.own.pop()
            if (heir := next((other for other in others if other.target == target), None)) is not None:
                heir.own.add(target)
                continue
            with contextlib.suppress(BrowserError):
                await self._close({"targetId": target}, CALL_TIMEOUT)
                await self.app.sessions.answer_dialog(target, accept=True)

    async def current_tab(self, message: Message) -> Message:
        """Return targetId, url and title of the tab of a session."""
        sessions = self.app.sessions
        connection, session = await sessions.requested(message)
        target = sessions.target_of(session)
        try:
            # The browser learns of a navigation later than the page.
            sessions.check_page(session, "Runtime.evaluate")
            params = {"expression": "[location.href, document.title]", "returnByValue": True}
            result = await connection.call("Runtime.evaluate", params, session=session, timeout=_WHERE_TIMEOUT)
            url, title = result["result"]["value"]
        except (CDPError, DialogOpen, BrowserTimeout, LookupError, TypeError):
            # The page is blocked.
            info = (await connection.call("Target.getTargetInfo", {"targetId": target}))["targetInfo"]
            url, title = info.get("url", ""), info.get("title", "")
        return {"targetId": target, "url": url, "title": title, "session_id": session}

    async def _create_context(self, params: Message, timeout: float) -> Message:
        result = await self.app.connection.call("Target.createBrowserContext", params, timeout=timeout)
        if (own := self.app.own_browser) is not None:
            await own.set_downloads(self.app.connection, result["browserContextId"])
        return result

    async def _close(self, params: Message, timeout: float) -> Message:
        """Close a tab. Return when it is closed, or shows a beforeunload dialog."""
        connection = self.app.connection
        target = params.get("targetId")
        if not isinstance(target, str) or target in self._closing:
            return await connection.call("Target.closeTarget", params, timeout=timeout)
        closed = self._closing[target] = asyncio.Event()
        try:
            # Chromium 156 exits when it closes a tab with a dialog of an iframe.
            await self.app.sessions.answer_dialog(target, accept=False)
            result = await connection.call("Target.closeTarget", params, timeout=timeout)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closed.wait(), min(timeout, _CLOSE_TIMEOUT))
            return result
        finally:
            del self._closing[target]

    def _end_closing(self, target: str) -> None:
        if (closed := self._closing.get(target)) is not None:
            closed.set()
