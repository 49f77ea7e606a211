"""The browser's tabs: which client is in which, what they are called, where one is, opening and closing it.

A client is in a tab for as long as its stream is in flight, so that one which was killed has left, too.
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

# Seconds for a page to say where it is, before the browser is asked instead.
_WHERE_TIMEOUT = 3.0
# Seconds for a tab that closes, beyond the browser's word that it will.
_CLOSE_TIMEOUT = 5.0


class _Occupant:
    """A client in a tab, for as long as its stream is in flight."""

    def __init__(self, wanted: Message) -> None:
        self.pid = harness_ipc.current_request().peer.pid
        # Where its switches are remembered for later clients: the name of a tab, "" for no name; None for nowhere.
        self.remembered: str | None = None if wanted.get("alone") else str(wanted.get("name") or "")
        self.target = ""
        # Tabs that are closed when it leaves.
        self.own: set[str] = set()


class Tabs(Part):
    """The tabs of the browser, and the clients in them.

    A client asks for a tab by ``{"target_id"}``, ``{"tab": "current", an id or a part of a URL}``, ``{"new", "isolated",
    "background"}``, ``{"name"}`` or ``{"again": the target of before}``; without any of them it is the one that was switched to
    last, if no client is in it, or a new one. With "keep" a tab that is opened for it stays when it leaves, with "switch" later
    clients begin there, or those of its "name", unless it is "alone".
    """

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        # Tabs that somebody waits for to be closed.
        self._closing: dict[str, asyncio.Event] = {}
        self._occupants: dict[str, _Occupant] = {}
        # The tabs that have a name.
        self._named: dict[str, str] = {}
        # The tabs of each browser context that is disposed of with the last of them.
        self._contexts: dict[str, set[str]] = {}
        # One client at a time chooses its tab.
        self._choosing = asyncio.Lock()
        self._draining = asyncio.Event()

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests about tabs."""
        return {"current_tab": self.current_tab, "move_tab": self._move, "leave_tab": self._leave}

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The stream that is in flight for as long as its client is in a tab."""
        return {"enter_tab": self._enter}

    @property
    def methods(self) -> Mapping[str, Method]:
        """What opens and closes them."""
        return {"Target.closeTarget": self._close, "Target.createBrowserContext": self._create_context}

    def is_free(self, target: str) -> bool:
        """Return whether no client is in a tab, and it has no name and no cookies of its own."""
        pages = set().union(*self._contexts.values())
        return target not in {*self._named.values(), *pages} and not any(
            target == occupant.target or target in occupant.own for occupant in self._occupants.values()
        )

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Take note of a tab that was opened, that has closed, or asks its user whether it may be."""
        if method == "Target.targetCreated":
            self._add_opened(params["targetInfo"])
        elif method == "Target.targetDestroyed":
            self._end_closing(params["targetId"])
            self._forget(params["targetId"])
        elif method == "Page.javascriptDialogOpening" and session is not None:
            self._end_closing(self.app.sessions.target_of(session))

    def on_drain(self) -> None:
        """End the streams. Tabs stay: the next daemon's clients may be the same."""
        self._draining.set()

    def on_lost(self) -> None:
        """Forget the contexts, which end with the connection."""
        self._contexts.clear()

    # The clients.

    async def _enter(self, wanted: Message) -> AsyncIterator[Message]:
        """Yield the tab that a client is in from now on, and wait until the client leaves."""
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
        """Have a client go to another tab."""
        return await self._go(self._occupant(message), message)

    async def _leave(self, message: Message) -> Message:
        """Close the tabs of a client that is about to leave."""
        await self._close_own(self._occupant(message))
        return {}

    def _occupant(self, message: Message) -> _Occupant:
        occupant = self._occupants.get(str(message.get("place")))
        if occupant is None:
            raise TabClosed("this daemon knows no such place in a tab: it is another one than the one that gave it")
        return occupant

    async def _go(self, occupant: _Occupant, wanted: Message) -> Message:
        """Put a client into the tab that it asks for. Raises `TabClosed` if there is none, or `TabInUse`."""
        await self.app.connected()
        before = occupant.target
        # A tab that is opened for a client which leaves meanwhile is closed with the others.
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
        """Have the client be in the tab that it asks for, before another one may choose."""
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
        """Return the current tab, the one with that id, or the only one with `text` in its URL."""
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
        """Return the tab that the client was in when another daemon ran, or a new one: it has not chosen any other."""
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
        """Open a tab, which is the client's own if it asks for that."""
        params: Message = {"url": "about:blank", "background": not wanted.get("new") or bool(wanted.get("background"))}
        if wanted.get("isolated"):
            # It ends with our connection, if not before.
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
        """Count a new tab to its context, and to the client that owns the tab that has opened it."""
        if info["type"] != "page":
            return
        if (pages := self._contexts.get(info.get("browserContextId", ""))) is not None:
            pages.add(info["targetId"])
        for occupant in self._occupants.values():
            if info.get("openerId") in occupant.own:
                occupant.own.add(info["targetId"])

    def _forget(self, target: str) -> None:
        """Take note that a tab has closed."""
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
        """Close the tabs of a client that leaves, but for those that another one is in: they become its own."""
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
        """Say where the tab of a session is."""
        sessions = self.app.sessions
        connection, session = await sessions.requested(message)
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
