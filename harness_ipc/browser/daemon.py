"""The daemon that holds one browser: sessions, events, dialogs, and calls that are forwarded. `python -m` runs it.

A request is ``{"method", "params", "session_id", "timeout"}`` for CDP, or ``{"meta": verb}``. All but the method may be left
out. The reply names the session that was used, so that a caller can stay with it whatever others switch to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import harness_ipc

from . import APP_VERSION, INTERNAL, LONGEST, MAX_MESSAGE, daemon_name, discovery
from .accessibility import Accessibility
from .cdp import CALL_TIMEOUT, SESSION_NOT_FOUND, Connection
from .errors import (
    SERVER_ERROR,
    BrowserError,
    BrowserLost,
    BrowserNotFound,
    BrowserTimeout,
    CDPError,
    DialogOpen,
    TabClosed,
)
from .events import EventStore, shorten

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Message = dict[str, Any]

logger = logging.getLogger("harness_ipc.browser.daemon")  # also where it is run by its name

IDLE_TIMEOUT = "HARNESS_BROWSER_IDLE_TIMEOUT"

# Sessions that have ended, whose tabs are remembered: enough for the clients that may still name one.
_REMEMBERED = 1000
# Seconds for each domain of a new session. A page that a dialog already holds does not answer.
_PREPARE_TIMEOUT = 3.0
# Seconds for a page to say where it is, before the browser is asked instead.
_WHERE_TIMEOUT = 3.0
# Seconds for a tab that closes, beyond the browser's word that it will.
_CLOSE_TIMEOUT = 5.0
# Seconds that the browser has to say that it is well: a status waits two.
_HEALTH_TIMEOUT = 1.5
_BLANK = "about:blank"
# Chrome leaves these unanswered while a dialog holds the page, and once it has crashed (tried on Chromium 156).
_NEEDS_PAGE = ("Accessibility.", "CSS.", "DOM.", "DOMSnapshot.", "Input.", "Runtime.")
_NEEDS_PAGE_TOO = {"Page.captureScreenshot", "Page.getFrameTree", "Page.getLayoutMetrics", "Page.printToPDF"}
# What a dialog or the tab's end does not keep from being answered: it is what was asked for.
_ANSWERED = {"Page.handleJavaScriptDialog", "Page.close"}


class _Session:
    """One attachment to a page, an iframe or a worker."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.prepared = False


class BrowserApp:
    """The application of a `harness_ipc` daemon that holds the browser of the daemon `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._source: discovery.Source | None = None
        self._connection: Connection | None = None
        # One at a time makes connections and attaches to tabs: whoever waited finds it done.
        self._mending = asyncio.Lock()
        self._default: str | None = None
        self._sessions: dict[str, _Session] = {}
        # Of sessions that have ended: their tab, and the session that took their place.
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._successors: dict[str, str] = {}
        # By tab, not by session: all sessions of a tab are held.
        self._dialogs: dict[str, Message] = {}
        self._crashed: set[str] = set()
        # Tabs that somebody waits for to be closed.
        self._closing: dict[str, asyncio.Event] = {}
        self._events = EventStore()
        self._accessibility = Accessibility(self)
        self._verbs: dict[str, Callable[[Message], Awaitable[Message]]] = {
            "session": self._get_session,
            "set_session": self._set_session,
            "drain_events": self._drain_events,
            "pending_dialog": self._pending_dialog,
            "current_tab": self._current_tab,
            "connection_status": self._connection_status,
            **self._accessibility.verbs,
        }

    async def start(self) -> None:
        """Find or start the browser and attach to a page. Raises `BrowserNotFound`."""
        self._source, self._connection = await discovery.find(self._name, self._on_event)
        try:
            await self._watch_tabs()
            await self._attach_a_page()
        except BrowserError as error:
            raise BrowserNotFound(f"{self._source.how} has no page to attach to: {error}") from None

    async def stop(self) -> None:
        """Let go of the browser; an own one ends."""
        if self._connection is not None:
            if self._source is not None and self._source.own is not None:
                await self._source.own.close(self._connection)
            await self._connection.close()

    async def health(self) -> Message:
        """Ask the browser. Raises `BrowserLost` or `BrowserTimeout` if it does not answer."""
        begun = time.perf_counter()
        version = await self._browser.call("Browser.getVersion", timeout=_HEALTH_TIMEOUT)
        milliseconds = round((time.perf_counter() - begun) * 1000, 3)
        return {"browser": version.get("product"), "found": self._how, "round_trip_ms": milliseconds}

    async def handle(self, message: Message) -> Message:
        """Answer one request. Raises `BrowserError`."""
        verb = message.get("meta")
        if verb is None:
            return await self._forward(message)
        if not isinstance(verb, str) or verb not in self._verbs:
            raise _bad_request(f"there is no meta request {verb!a}: use {', '.join(self._verbs)}, health, ping or shutdown")
        return await self._verbs[verb](message)

    # Calls.

    async def _forward(self, message: Message) -> Message:
        method = message.get("method")
        params = message.get("params") or {}
        timeout = message.get("timeout")
        timeout = CALL_TIMEOUT if timeout is None else timeout
        well = isinstance(method, str) and isinstance(params, dict)
        if not well or isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= LONGEST:
            raise _bad_request('a request is {"method": text, "params": object, "session_id": text, "timeout": seconds}')
        assert isinstance(method, str)
        connection = await self._connected()
        if method == "Target.closeTarget":
            return {"result": await self._close_tab(params, timeout), "session_id": None}
        if method.startswith("Target."):
            result = await connection.call(method, params, timeout=timeout)
            if method == "Target.createBrowserContext" and self._source is not None and self._source.own is not None:
                await self._source.own.set_downloads(connection, result["browserContextId"])
            return {"result": result, "session_id": None}
        session = await self._session_for(self._named(message))
        self._check_page(session, method)
        try:
            result = await connection.call(method, params, session=session, timeout=timeout)
        except CDPError as error:
            if error.code != SESSION_NOT_FOUND:
                raise
            # It reached no page, so it may be repeated, once.
            self._forget(session)
            session = await self._session_for(session if message.get("session_id") else None)
            result = await (await self._connected()).call(method, params, session=session, timeout=timeout)
        return {"result": result, "session_id": session}

    async def _close_tab(self, params: Message, timeout: float) -> Message:
        """Close a tab, and return when it is closed, or asks its user whether it may be."""
        target = params.get("targetId")
        if not isinstance(target, str) or target in self._closing:
            return await self._browser.call("Target.closeTarget", params, timeout=timeout)
        closed = self._closing[target] = asyncio.Event()
        try:
            if target in self._dialogs:
                # Chromium 156 itself ends when it closes a tab that an iframe's dialog holds.
                await self._dismiss_dialog(target)
            result = await self._browser.call("Target.closeTarget", params, timeout=timeout)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closed.wait(), min(timeout, _CLOSE_TIMEOUT))
            return result
        finally:
            del self._closing[target]

    async def _dismiss_dialog(self, target: str) -> None:
        session = next(self._sessions_of(target), None)
        if session is not None:
            with contextlib.suppress(CDPError):
                await self._browser.call("Page.handleJavaScriptDialog", {"accept": False}, session=session)

    def _end_closing(self, target: str) -> None:
        if (closed := self._closing.get(target)) is not None:
            closed.set()

    @staticmethod
    def _named(message: Message) -> str | None:
        session = message.get("session_id")
        if session is not None and not isinstance(session, str):
            raise _bad_request(f"a session_id is a text, not {type(session).__name__}")
        return session or None

    def _check_page(self, session: str, method: str) -> None:
        """Raise at once what only a timeout would tell, if the browser leaves `method` unanswered."""
        if method.startswith(_NEEDS_PAGE) or method in _NEEDS_PAGE_TOO:
            target = self._target_of(session)
            if (dialog := self._dialogs.get(target)) is not None:
                raise _dialog_open(dialog, ran=False)
            if target in self._crashed:
                raise _page_crashed()

    # Sessions.

    async def _session_for(self, named: str | None) -> str:
        """Return a session that is there: the one that was named, or the default; attached again if it has ended.

        Raises `TabClosed` if the tab of a named session is gone. Without a name, another page takes the default's place.
        """
        session = named or self._default
        if session in self._sessions:
            return session
        async with self._mending:
            session = named or self._default
            while session in self._successors:
                session = self._successors[session]
            if session in self._sessions:
                return session
            target = self._ended.get(session) if session is not None else None
            if session is not None and target is not None and target in {info["targetId"] for info in await self._targets()}:
                logger.info("attaching to tab %s again", target)
                successor = await self._attach(target)
                self._successors[session] = successor
                if session == self._default:
                    self._default = successor
                return successor
            if named is not None:
                raise TabClosed(
                    "the tab of this session is gone, and nothing was done: choose another with list_tabs() and switch_tab(), "
                    "or open one with new_tab()"
                )
            return await self._attach_a_page()

    async def page_of(self, message: Message) -> tuple[Connection, str, str]:
        """Return the connection, the session that the request is for, and its tab. Raises at once if the page can't answer."""
        connection = await self._connected()
        session = await self._session_for(self._named(message))
        self._check_page(session, "Accessibility.")
        return connection, session, self._target_of(session)

    def _sessions_of(self, target: str) -> Iterator[str]:
        return (session for session, state in self._sessions.items() if state.target == target)

    def _target_of(self, session: str) -> str:
        state = self._sessions.get(session)
        return self._ended.get(session, "") if state is None else state.target

    async def _targets(self) -> list[Message]:
        infos = (await self._browser.call("Target.getTargets"))["targetInfos"]
        return [info for info in infos if isinstance(info, dict)]

    async def _watch_tabs(self) -> None:
        """Have the browser say which tabs there are, which end and which crash."""
        await self._browser.call("Target.setDiscoverTargets", {"discover": True})

    async def _attach_a_page(self) -> str:
        """Make a session of a real page the default: of an empty one, or of a new one, if there is no other."""
        pages = [info for info in await self._targets() if info["type"] == "page"]
        real = [info for info in pages if not info["url"].startswith(INTERNAL)]
        blank = [info for info in pages if info["url"] == _BLANK]
        if chosen := [*real, *blank][:1]:
            target = chosen[0]["targetId"]
        else:
            target = (await self._browser.call("Target.createTarget", {"url": _BLANK}))["targetId"]
        self._default = await self._attach(target)
        logger.info("attached to tab %s", target)
        return self._default

    async def _attach(self, target: str) -> str:
        try:
            reply = await self._browser.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        except CDPError as error:
            raise TabClosed(f"there is no tab {target}: {error}; see list_tabs()") from None
        session = str(reply["sessionId"])
        self._sessions.setdefault(session, _Session(target))
        await self._prepare(session)
        return session

    async def _prepare(self, session: str) -> None:
        """Have the page report its events, and behave as the one that its user looks at, though many are driven at once."""
        state = self._sessions.get(session)
        if state is None or state.prepared:
            return
        state.prepared = True
        wanted: list[tuple[str, Message]] = [(f"{domain}.enable", {}) for domain in ("Page", "Runtime", "Network")]
        wanted.append(("Emulation.setFocusEmulationEnabled", {"enabled": True}))
        connection = self._browser
        calls = (connection.call(method, params, session=session, timeout=_PREPARE_TIMEOUT) for method, params in wanted)
        for (method, _), result in zip(wanted, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(result, BrowserLost):
                raise result
            if isinstance(result, BaseException):
                logger.warning("session %s: %s: %s", session, method, result)

    def _forget(self, session: str) -> None:
        self._events.forget(session)
        if (state := self._sessions.pop(session, None)) is not None:
            self._ended[session] = state.target
            if len(self._ended) > _REMEMBERED:
                oldest, _ = self._ended.popitem(last=False)
                self._successors.pop(oldest, None)
            if not any(self._sessions_of(state.target)):
                self._forget_dialog(state.target)

    def _forget_dialog(self, target: str) -> None:
        dialog = self._dialogs.pop(target, {})
        self._dialogs.pop(dialog.get("frameId", ""), None)

    # The connection.

    @property
    def _how(self) -> str | None:
        return None if self._source is None else self._source.how

    @property
    def _browser(self) -> Connection:
        """The connection, which each call finds out about if it is lost."""
        assert self._connection is not None, "nobody asks before `start` is done"
        return self._connection

    async def _connected(self) -> Connection:
        """Return the connection, made again if it was lost. Raises `BrowserLost` if it can't be."""
        if self._browser.lost is not None:
            async with self._mending:
                if self._browser.lost is not None:
                    await self._reconnect()
        return self._browser

    async def _reconnect(self) -> None:
        assert self._source is not None
        for session in list(self._sessions):
            self._forget(session)
        self._dialogs.clear()
        self._crashed.clear()
        # No page of the new connection is the default's successor, unless the tab is still there.
        tab = self._ended.get(self._default or "")
        logger.warning("the connection to the browser was lost: connecting again to %s", self._source.how)
        try:
            self._connection = await self._source.connect(self._on_event)
            await self._watch_tabs()
            # Sessions are of a connection: those of a tab that is still there are attached again when somebody names them.
            if tab is None or tab not in {info["targetId"] for info in await self._targets()}:
                await self._attach_a_page()
        except BrowserError as error:
            raise BrowserLost(
                f"the browser is gone, and can't be had again: {error}; start it again, or run harness-browser --reload to use "
                "another"
            ) from None

    # Events, in the order in which the browser sends them.

    def _on_event(self, method: str, params: Message, session: str | None, frame: str | bytes) -> None:
        state = self._sessions.get(session) if session is not None else None
        if session is not None and state is None:
            # Of a session that has ended. Each is announced by its parent before it has events.
            return
        # First: it cuts long texts, of a dialog as well.
        self._events.add(session, method, params, session, frame)
        self._accessibility.on_event(method, params, session)
        if method == "Target.attachedToTarget":
            self._sessions.setdefault(params["sessionId"], _Session(params["targetInfo"]["targetId"]))
        elif method == "Target.detachedFromTarget":
            self._fail_calls(
                params["sessionId"], CDPError("the tab was closed meanwhile: this may have run", code=SERVER_ERROR)
            )
            self._forget(params["sessionId"])
        elif method == "Target.targetDestroyed":
            self._crashed.discard(params["targetId"])
            self._end_closing(params["targetId"])
        elif method == "Target.targetCrashed":
            self._crashed.add(params["targetId"])
            self._end_calls_of(params["targetId"], _page_crashed())
        elif method == "Inspector.targetReloadedAfterCrash" and state is not None:
            self._crashed.discard(state.target)
        elif method == "Page.javascriptDialogOpening" and state is not None:
            # The page's session tells it for its iframes, too: one of another site is a target, with the id of its frame.
            for target in {state.target, params.get("frameId", "")}:
                self._dialogs[target] = params
                self._end_calls_of(target, _dialog_open(params, ran=True))
            self._end_closing(state.target)
        elif method == "Page.javascriptDialogClosed" and state is not None:
            self._forget_dialog(state.target)

    def _end_calls_of(self, target: str, error: BrowserError) -> None:
        for session in self._sessions_of(target):
            self._fail_calls(session, error)

    def _fail_calls(self, session: str, error: BrowserError) -> None:
        if self._connection is not None:
            self._connection.fail_calls(session, error, but=_ANSWERED)

    # The requests of {"meta": verb}.

    async def _get_session(self, message: Message) -> Message:
        await self._connected()
        session = await self._session_for(self._named(message))
        return {"session_id": session, "target_id": self._target_of(session)}

    async def _set_session(self, message: Message) -> Message:
        """Make a session the default: the one that is named, or one of the tab `target_id`."""
        await self._connected()
        target = message.get("target_id")
        if isinstance(target, str) and not message.get("session_id"):
            async with self._mending:
                known = (number for number in self._sessions_of(target) if self._sessions[number].prepared)
                session = next(known, None) or await self._attach(target)
        else:
            if (named := self._named(message)) is None:
                raise _bad_request("set_session wants a session_id or a target_id")
            session = await self._session_for(named)
            await self._prepare(session)
        self._default = session
        return {"session_id": session, "target_id": self._target_of(session)}

    async def _drain_events(self, message: Message) -> Message:
        """Return the last events and forget them: of the session that is named, or of all sessions and the browser."""
        named = self._named(message)
        if named is None:
            return {"events": self._events.drain_all()}
        return {"events": self._events.drain(await self._session_for(named))}

    async def _pending_dialog(self, message: Message) -> Message:
        await self._connected()
        session = await self._session_for(self._named(message))
        return {"dialog": self._dialogs.get(self._target_of(session)), "session_id": session}

    async def _current_tab(self, message: Message) -> Message:
        connection = await self._connected()
        session = await self._session_for(self._named(message))
        target = self._target_of(session)
        try:
            # The browser itself learns of a navigation later than its page.
            self._check_page(session, "Runtime.evaluate")
            params = {"expression": "[location.href, document.title]", "returnByValue": True}
            result = await connection.call("Runtime.evaluate", params, session=session, timeout=_WHERE_TIMEOUT)
            url, title = result["result"]["value"]
        except (CDPError, DialogOpen, BrowserTimeout, LookupError, TypeError):
            # A page that is held can't say it.
            info = (await connection.call("Target.getTargetInfo", {"targetId": target}))["targetInfo"]
            url, title = info.get("url", ""), info.get("title", "")
        return {"targetId": target, "url": url, "title": title, "session_id": session}

    async def _connection_status(self, _message: Message) -> Message:
        """Say how the browser is, without mending anything."""
        own = None if self._source is None else self._source.own
        status: Message = {"connected": False, "found": self._how, "own": own is not None, "pid": own.pid() if own else None}
        status |= {"browser": None, "round_trip_ms": None, "session_id": None, "tab": None, "dialog": None, "problem": None}
        try:
            health = await self.health()
            status |= {"connected": True, "browser": health["browser"], "round_trip_ms": health["round_trip_ms"]}
            status["session_id"] = self._default
            if self._default in self._sessions:
                tab = await self._current_tab({})
                status["tab"] = {key: tab[key] for key in ("targetId", "url", "title")}
                shorten(status["tab"])
                status["dialog"] = self._dialogs.get(tab["targetId"])
        except BrowserError as error:
            status["problem"] = str(error)
        return status


def _bad_request(text: str) -> CDPError:
    # JSON-RPC's "Invalid Request".
    return CDPError(text, code=-32600)


def _page_crashed() -> CDPError:
    return CDPError("the page has crashed: load it again with goto_url()", code=SERVER_ERROR, crashed=True)


def _dialog_open(dialog: Message, *, ran: bool) -> DialogOpen:
    kind, text = dialog.get("type", "dialog"), " ".join(str(dialog.get("message", "")).split())
    return DialogOpen(
        f"a dialog of the page holds it ({kind}: {text[:200]!r}): answer it with handle_dialog(), then go on",
        dialog=dialog,
        ran=ran,
    )


def main() -> None:
    """Be the daemon of the name in the first argument, or in `BU_NAME`. Raises what `harness_ipc.run_daemon` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else daemon_name()
    idle = os.environ.get(IDLE_TIMEOUT)
    try:
        idle_timeout = float(idle) if idle else None
    except ValueError:
        raise harness_ipc.StartFailed(f"{IDLE_TIMEOUT}={idle!a} is no number of seconds") from None
    harness_ipc.run_daemon(BrowserApp(name), name, app_version=APP_VERSION, idle_timeout=idle_timeout, max_message=MAX_MESSAGE)


if __name__ == "__main__":
    try:
        main()
    except harness_ipc.HarnessIPCError as error:
        # Its text is in the log, and the process that started us has it. A traceback would say no more.
        sys.exit(harness_ipc.escape_control(str(error)))
