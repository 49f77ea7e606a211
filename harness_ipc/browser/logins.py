"""HTTP logins (401, or 407 from a proxy): the page gets the response at once, and the tab records the challenge.

Otherwise Chrome would show a login window, and block the request until it is answered. Chrome reports a challenge only if all
requests of the tab are intercepted: each one is continued at once. A separate session does that, independent of a client's
`Fetch.enable`. Challenges of cross-site iframes are not reported (Chrome shows no window for them either).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from .errors import BrowserTimeout, CDPError, LoginFailed
from .part import Changing, Part, bad_request, timeout_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .daemon import BrowserApp
    from .part import Message, Verb


class _Tab(Changing):
    """The logins of one tab. Notifies of a new document."""

    def __init__(self) -> None:
        super().__init__()
        # User and password, by origin.
        self.credentials: dict[str, tuple[str, str]] = {}
        # Requests answered with credentials: a second challenge means that they were refused.
        self.answered: set[str] = set()
        # The last challenge: origin, realm, scheme, source, and whether it is for the document.
        self.challenge: Message | None = None
        # The URL of the requested document, until it is committed.
        self.requested_url: str | None = None
        # The loader id of the document.
        self.loader: str | None = None


class Logins(Part):
    """Challenges of servers and proxies, and the answers."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._tabs: dict[str, _Tab] = {}
        # The tabs of the intercepting sessions.
        self._sessions: dict[str, str] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests for logins."""
        return {"pending_login": self._pending, "handle_login": self._handle}

    def owns(self, session: str | None) -> bool:
        """Return whether a session is an intercepting one, which clients must not see."""
        return session in self._sessions

    async def watch(self, target: str, timeout: float) -> None:
        """Intercept the challenges of a page."""
        if target in self._tabs:
            return
        self._tabs[target] = _Tab()
        connection = self.app.connection
        session = (await connection.call("Target.attachToTarget", {"targetId": target, "flatten": True}))["sessionId"]
        self._sessions[session] = target
        await connection.call("Fetch.enable", {"handleAuthRequests": True}, session=session, timeout=timeout)

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Continue requests, answer challenges, and forget those of an earlier document."""
        if method == "Fetch.requestPaused" and session in self._sessions:
            self._call("Fetch.continueRequest", {"requestId": params["requestId"]}, session)
        elif method == "Fetch.authRequired" and session in self._sessions:
            self._answer(self._sessions[session], params, session)
        elif method == "Page.frameNavigated":
            self._enter_document(params["frame"])
        elif method == "Target.targetDestroyed":
            self._tabs.pop(params["targetId"], None)
        elif method == "Target.detachedFromTarget":
            self._sessions.pop(params["sessionId"], None)

    def on_lost(self) -> None:
        """Forget all tabs: they are attached again when a request needs them."""
        self._sessions.clear()
        self._tabs.clear()

    def _enter_document(self, frame: Message) -> None:
        # The main frame's id is that of the target. Each session of a tab reports it.
        tab = self._tabs.get(frame["id"])
        if tab is None or tab.loader == frame["loaderId"]:
            return
        tab.loader = frame["loaderId"]
        if tab.requested_url != (frame.get("unreachableUrl") or frame["url"]):
            tab.challenge = None
        tab.requested_url = None
        tab.answered.clear()
        tab.notify()

    def _answer(self, target: str, params: Message, session: str) -> None:
        if (tab := self._tabs.get(target)) is None:
            return
        challenge, request = params["authChallenge"], params["requestId"]
        origin = challenge["origin"]
        known = tab.credentials.get(origin)
        answer: Message = {"response": "CancelAuth"}
        if known is not None and request not in tab.answered:
            tab.answered.add(request)
            answer = {"response": "ProvideCredentials", "username": known[0], "password": known[1]}
        else:
            tab.credentials.pop(origin, None)
            is_document = params["resourceType"] == "Document" and params["frameId"] == target
            tab.challenge = {key: challenge.get(key, "") for key in ("origin", "realm", "scheme", "source")}
            tab.challenge |= {"document": is_document, "refused": known is not None}
            if is_document:
                tab.requested_url = params["request"]["url"]
        self._call("Fetch.continueWithAuth", {"requestId": request, "authChallengeResponse": answer}, session)

    def _call(self, method: str, params: Message, session: str) -> None:
        async def call() -> None:
            # The request or its tab may be gone.
            with contextlib.suppress(CDPError, ConnectionError, TimeoutError):
                await self.app.connection.call(method, params, session=session)

        self.start(call())

    # Requests.

    async def _pending(self, message: Message) -> Message:
        _, session = await self.app.sessions.requested(message)
        tab = self._tabs.get(self.app.sessions.target_of(session))
        return {"login": tab.challenge if tab is not None else None, "session_id": session}

    async def _handle(self, message: Message) -> Message:
        """Log in with ``user`` and ``password``, at ``origin`` or that of the last challenge, and reload the document."""
        user, password, origin = message.get("user"), message.get("password"), message.get("origin")
        if not isinstance(user, str) or not isinstance(password, str) or not isinstance(origin, str | None):
            raise bad_request("handle_login needs user and password, and optionally origin, all texts")
        connection, session = await self.app.sessions.requested(message)
        tab = self._tabs.get(self.app.sessions.target_of(session))
        if tab is None:
            raise bad_request("this session does not belong to a tab: use a session of the page")
        challenge = tab.challenge
        if origin is None:
            if challenge is None:
                raise bad_request("nothing in this tab requires a login: pass origin=, such as 'https://example.org'")
            origin = str(challenge["origin"])
        tab.credentials[origin] = user, password
        if challenge is None or not challenge["document"] or challenge["origin"] != origin:
            return {"session_id": session}
        timeout = timeout_of(message)
        try:
            async with asyncio.timeout(timeout):
                changed = tab.changed
                await connection.call("Page.reload", session=session)
                await changed.wait()
                # Wait until the document is committed: before that, the page can't be reloaded.
                with contextlib.suppress(CDPError):
                    await connection.call("Runtime.evaluate", {"expression": "0"}, session=session)
        except TimeoutError:
            raise BrowserTimeout(f"the page was not reloaded within {timeout:g} s: it may still be loading") from None
        if tab.challenge is not None and tab.challenge["document"]:
            raise LoginFailed(f"{origin} refused the user and the password: pass others", login=tab.challenge)
        return {"session_id": session}
