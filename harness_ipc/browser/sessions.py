"""Sessions attached to pages, replacements of ended ones, and dialogs and crashes that block a page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from . import INTERNAL
from .choosing import exclusive
from .errors import SERVER_ERROR, BrowserLost, CDPError, DialogOpen, TabClosed
from .part import Part, bad_request, named_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .connection import Connection
    from .daemon import BrowserApp
    from .errors import BrowserError
    from .part import Message, Verb

logger = logging.getLogger(__name__)

# Ended sessions whose tabs are remembered, for clients that still use them.
_REMEMBERED = 1000
# Seconds to enable each domain of a new session. A page blocked by a dialog does not answer.
_PREPARE_TIMEOUT = 3.0
_BLANK = "about:blank"
# Chrome does not answer these while a dialog blocks the page, or after a crash (tested with Chromium 156).
_NEEDS_PAGE = ("Accessibility.", "CSS.", "DOM.", "DOMSnapshot.", "Input.", "Runtime.")
_NEEDS_PAGE_TOO = {"Page.captureScreenshot", "Page.getFrameTree", "Page.getLayoutMetrics", "Page.printToPDF"}
# Calls that do not fail when a dialog opens or the tab closes: they cause it.
_ALLOWED_DURING_DIALOG = {"Page.handleJavaScriptDialog", "Page.close"}


class _Session:
    """One attachment to a page, an iframe or a worker."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.prepared = False


class Sessions(Part):
    """The sessions of the connection, and ended ones of earlier connections."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        # The session of requests without one.
        self.default: str | None = None
        self._sessions: dict[str, _Session] = {}
        # Of ended sessions: their tab, and the session that replaced them.
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._successors: dict[str, str] = {}
        # By tab, since a dialog blocks all sessions of a tab.
        self._dialogs: dict[str, Message] = {}
        self._crashed: set[str] = set()

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests for sessions."""
        return {"session": self._get, "set_session": self._set_default, "pending_dialog": self._pending_dialog}

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    async def session_for(self, named: str | None) -> str:
        """Return a valid session: the one that is `named`, or the default. If it has ended, attach to its tab again.

        Raises `TabClosed` if the tab of a named session is closed. If the default's tab is closed, uses another page.
        """
        session = named or self.default
        if session in self._sessions:
            assert session is not None
            return session
        async with self.app.reconnect_lock:
            session = named or self.default
            while session in self._successors:
                session = self._successors[session]
            if session in self._sessions:
                assert session is not None
                return session
            target = self._ended.get(session) if session is not None else None
            if session is not None and target is not None and target in {info["targetId"] for info in await self.targets()}:
                logger.info("attaching to tab %s again", target)
                successor = await self.attach(target)
                self._successors[session] = successor
                if session == self.default:
                    self.default = successor
                return successor
            if named is not None:
                raise TabClosed(
                    "the tab of this session is gone, and nothing was done: choose another with list_tabs() and switch_tab(), "
                    "or open one with new_tab()"
                )
            return await self.attach_a_page()

    async def requested(self, message: Message) -> tuple[Connection, str]:
        """Return the connection, and the session of a request, or the default."""
        connection = await self.app.connected()
        return connection, await self.session_for(named_session(message))

    async def page_of(self, message: Message) -> tuple[Connection, str, str]:
        """Return the connection, the session of the request, and its tab. Raises at once if the page can't answer."""
        connection, session = await self.requested(message)
        self.check_page(session, "Accessibility.")
        return connection, session, self.target_of(session)

    def target_of(self, session: str | None) -> str:
        """Return the target of a session, also of an ended one, or an empty text."""
        if session is None:
            return ""
        state = self._sessions.get(session)
        return self._ended.get(session, "") if state is None else state.target

    def of_target(self, target: str) -> Iterator[str]:
        """Return the sessions of a target, without intercepting ones."""
        found = (session for session, state in self._sessions.items() if state.target == target)
        return (session for session in found if not self.app.logins.owns(session))

    async def targets(self) -> list[Message]:
        """Return the browser's targets."""
        infos = (await self.app.connection.call("Target.getTargets"))["targetInfos"]
        return [info for info in infos if isinstance(info, dict)]

    async def watch_tabs(self) -> None:
        """Enable events for new, closed and crashed tabs."""
        await self.app.connection.call("Target.setDiscoverTargets", {"discover": True})

    async def attach_a_page(self) -> str:
        """Set the default session to a free page: a real one, else an empty one, else a new one."""
        async with self._choosing():
            pages = [info for info in await self.targets() if info["type"] == "page" and self._is_free(info)]
            real = [info for info in pages if not info["url"].startswith(INTERNAL)]
            blank = [info for info in pages if info["url"] == _BLANK]
            if chosen := [*real, *blank][:1]:
                target = chosen[0]["targetId"]
            else:
                target = (await self.app.connection.call("Target.createTarget", {"url": _BLANK}))["targetId"]
            self.default = await self.attach(target)
        logger.info("attached to tab %s", target)
        return self.default

    async def open_tab(self, params: Message) -> str:
        """Open a tab, attach to it, and return its target. `params` are those of `Target.createTarget`."""
        async with self.app.reconnect_lock, self._choosing():
            target = str((await self.app.connection.call("Target.createTarget", params))["targetId"])
            await self.attach(target)
        return target

    def _choosing(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Return a lock, for a browser shared by several daemons, that is held while one chooses a page."""
        return exclusive() if self.app.own_browser is None else contextlib.nullcontext()

    def _is_free(self, page: Message) -> bool:
        """Return whether no client and no other program, such as another daemon, uses a page."""
        target = page["targetId"]
        foreign = page.get("attached") and self.app.own_browser is None and not any(self.of_target(target))
        return not foreign and self.app.tabs.is_free(target)

    async def session_in(self, target: str) -> str:
        """Return a session of a target. Raises `TabClosed` if there is none."""
        async with self.app.reconnect_lock:
            known = (number for number in self.of_target(target) if self._sessions[number].prepared)
            return next(known, None) or await self.attach(target)

    async def attach(self, target: str) -> str:
        """Return a new session of a target. Raises `TabClosed` if there is none."""
        try:
            reply = await self.app.connection.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        except CDPError as error:
            raise TabClosed(f"there is no tab {target}: {error}; see list_tabs()") from None
        session = str(reply["sessionId"])
        self._sessions.setdefault(session, _Session(target))
        await self.prepare(session)
        return session

    async def prepare(self, session: str) -> None:
        """Enable events of the page, and make it behave as if it had the focus."""
        state = self._sessions.get(session)
        if state is None or state.prepared:
            return
        state.prepared = True
        wanted: list[tuple[str, Message]] = [(f"{domain}.enable", {}) for domain in ("Page", "Runtime", "Network")]
        wanted.append(("Emulation.setFocusEmulationEnabled", {"enabled": True}))
        connection = self.app.connection
        calls = [connection.call(method, params, session=session, timeout=_PREPARE_TIMEOUT) for method, params in wanted]
        watching = self.app.logins.watch(state.target, _PREPARE_TIMEOUT)
        results = await asyncio.gather(*calls, watching, return_exceptions=True)
        for method, result in zip([*(method for method, _ in wanted), "logins"], results, strict=True):
            if isinstance(result, BrowserLost):
                raise result
            if isinstance(result, BaseException):
                logger.warning("session %s: %s: %s", session, method, result)

    def forget(self, session: str) -> None:
        """Record that a session has ended."""
        self.app.events.forget(session)
        if (state := self._sessions.pop(session, None)) is not None:
            self._ended[session] = state.target
            if len(self._ended) > _REMEMBERED:
                oldest, _ = self._ended.popitem(last=False)
                self._successors.pop(oldest, None)
            if not any(self.of_target(state.target)):
                self._forget_dialog(state.target)

    # Dialogs and crashes.

    def dialog_of(self, target: str) -> Message | None:
        """Return the parameters of the dialog that blocks a target, or None."""
        return self._dialogs.get(target)

    def check_page(self, session: str, method: str) -> None:
        """Raise if the browser would not answer `method`, because of a dialog or a crash."""
        if method.startswith(_NEEDS_PAGE) or method in _NEEDS_PAGE_TOO:
            target = self.target_of(session)
            if (dialog := self._dialogs.get(target)) is not None:
                raise _dialog_open(dialog, ran=False)
            if target in self._crashed:
                raise _page_crashed()

    async def answer_dialog(self, target: str, *, accept: bool) -> None:
        """Accept or cancel the dialog that blocks a target, if any."""
        session = next(self.of_target(target), None)
        if target in self._dialogs and session is not None:
            with contextlib.suppress(CDPError):
                await self.app.connection.call("Page.handleJavaScriptDialog", {"accept": accept}, session=session)

    def _forget_dialog(self, target: str) -> None:
        dialog = self._dialogs.pop(target, {})
        self._dialogs.pop(dialog.get("frameId", ""), None)

    # Events.

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Track sessions, dialogs and crashes."""
        target = self.target_of(session)
        if method == "Target.attachedToTarget":
            self._sessions.setdefault(params["sessionId"], _Session(params["targetInfo"]["targetId"]))
        elif method == "Target.detachedFromTarget":
            error = CDPError("the tab was closed meanwhile: this may have run", code=SERVER_ERROR)
            self._fail_calls(params["sessionId"], error)
            self.forget(params["sessionId"])
        elif method == "Target.targetDestroyed":
            self._crashed.discard(params["targetId"])
        elif method == "Target.targetCrashed":
            self._crashed.add(params["targetId"])
            self._fail_calls_of(params["targetId"], _page_crashed())
        elif method == "Inspector.targetReloadedAfterCrash":
            self._crashed.discard(target)
        elif method == "Page.javascriptDialogOpening":
            # The page's session reports dialogs of iframes too. A cross-site iframe is a target with the id of its frame.
            for held in {target, params.get("frameId", "")}:
                self._dialogs[held] = params
                self._fail_calls_of(held, _dialog_open(params, ran=True))
        elif method == "Page.javascriptDialogClosed":
            self._forget_dialog(target)

    def on_lost(self) -> None:
        """Forget the sessions, which end with their connection. Their tabs may still exist."""
        for session in list(self._sessions):
            self.forget(session)
        self._dialogs.clear()
        self._crashed.clear()

    def _fail_calls_of(self, target: str, error: BrowserError) -> None:
        for session in self.of_target(target):
            self._fail_calls(session, error)

    def _fail_calls(self, session: str, error: BrowserError) -> None:
        self.app.connection.fail_calls(session, error, but=_ALLOWED_DURING_DIALOG)

    # Requests.

    async def _get(self, message: Message) -> Message:
        _, session = await self.requested(message)
        return {"session_id": session, "target_id": self.target_of(session)}

    async def _set_default(self, message: Message) -> Message:
        """Set the default session: that of the request, or one of the tab `target_id`."""
        await self.app.connected()
        target = message.get("target_id")
        if isinstance(target, str) and not message.get("session_id"):
            session = await self.session_in(target)
        else:
            if (named := named_session(message)) is None:
                raise bad_request("set_session needs a session_id or a target_id")
            session = await self.session_for(named)
            await self.prepare(session)
        self.default = session
        return {"session_id": session, "target_id": self.target_of(session)}

    async def _pending_dialog(self, message: Message) -> Message:
        _, session = await self.requested(message)
        return {"dialog": self.dialog_of(self.target_of(session)), "session_id": session}


def _page_crashed() -> CDPError:
    return CDPError("the page has crashed: reload it with goto_url()", code=SERVER_ERROR, crashed=True)


def _dialog_open(dialog: Message, *, ran: bool) -> DialogOpen:
    kind, text = dialog.get("type", "dialog"), " ".join(str(dialog.get("message", "")).split())
    return DialogOpen(
        f"a dialog blocks the page ({kind}: {text[:200]!r}): answer it with handle_dialog()",
        dialog=dialog,
        ran=ran,
    )
