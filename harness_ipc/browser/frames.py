"""The iframes of a tab, in the daemon: in the process of the page, or out-of-process iframes, which are CDP targets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .part import Changing, Part, bounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .daemon import BrowserApp
    from .part import Message, Verb


class Frames(Part, Changing):
    """Sessions of out-of-process iframes, and the execution context of each iframe. Notifies of each change."""

    def __init__(self, app: BrowserApp) -> None:
        Part.__init__(self, app)
        Changing.__init__(self)
        # By target.
        self._sessions: dict[str, str] = {}
        # The uniqueId of the default execution context, by session and frame.
        self._contexts: dict[tuple[str, str], str] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The request for the execution context of an iframe."""
        return {"frame": bounded(self._find)}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Record new execution contexts, and forget ended ones."""
        if method == "Runtime.executionContextCreated":
            context = params["context"]
            data = context.get("auxData") or {}
            if data.get("isDefault") and session is not None:
                self._contexts[session, data.get("frameId", "")] = context["uniqueId"]
        elif method == "Runtime.executionContextDestroyed":
            gone = params.get("executionContextUniqueId")
            self._contexts = {place: context for place, context in self._contexts.items() if context != gone}
        elif method == "Runtime.executionContextsCleared":
            self._forget(session)
        elif method == "Target.detachedFromTarget":
            ended = params["sessionId"]
            self._sessions = {target: one for target, one in self._sessions.items() if one != ended}
            self._forget(ended)
        elif method != "Page.frameDetached":
            return
        self.notify()

    def on_lost(self) -> None:
        """Forget sessions and contexts, which end with their connection."""
        self._sessions.clear()
        self._contexts.clear()

    @property
    def sessions(self) -> Mapping[str, str]:
        """The sessions, by target."""
        return self._sessions

    async def session_of(self, frame: str) -> str:
        """Return the daemon's session of an out-of-process iframe; attach if necessary."""
        if (session := self._sessions.get(frame)) is None:
            connection = self.app.connection
            attached = await connection.call("Target.attachToTarget", {"targetId": frame, "flatten": True})
            session = self._sessions[frame] = str(attached["sessionId"])
            await asyncio.gather(*(connection.call(f"{domain}.enable", session=session) for domain in ("Page", "Runtime")))
        return session

    async def owners(self, target: str, page: str, session: str) -> list[Message]:
        """Return the iframe elements from `target` up to the tab's `page`: ``{"session_id", "backendNodeId"}`` each."""
        owners = []
        while target != page:
            info = (await self.app.connection.call("Target.getTargetInfo", {"targetId": target}))["targetInfo"]
            parent = info.get("parentId") or page
            inside = await self._session_in(parent, page, session)
            owner = await self.app.connection.call("DOM.getFrameOwner", {"frameId": target}, session=inside)
            owners.append({"session_id": inside, "backendNodeId": owner["backendNodeId"]})
            target = parent
        return owners

    async def targets_in(self, page: str) -> list[str]:
        """Return the out-of-process iframes of a tab."""
        infos = {info["targetId"]: info for info in await self.app.sessions.targets()}
        return [target for target in infos if _is_iframe_in(page, target, infos)]

    async def _find(self, message: Message) -> Message:
        """Return the iframe of the tab with the id ``frame``, or else the first with ``frame`` in its URL.

        ``frame_id`` is None if there is none; ``node_session`` and ``context`` (None for the session's own document) are its
        execution context, ``owners`` as in `owners`.
        """
        _, session = await self.app.sessions.requested(message)
        page, wanted = self.app.sessions.target_of(session), str(message.get("frame"))
        while True:
            changed = self.changed
            if (found := await self._search(page, session, wanted)) is None:
                return {"frame_id": None, "session_id": session}
            frame, target = found
            inside = await self._session_in(target, page, session)
            context = None if frame == target else self._contexts.get((inside, frame))
            if context is not None or frame == target:
                owners = await self.owners(target, page, session)
                place = {"node_session": inside, "context": context, "owners": owners}
                return {"frame_id": frame, "session_id": session, **place}
            # Its document is being replaced.
            await changed.wait()

    async def _search(self, page: str, session: str, wanted: str) -> tuple[str, str] | None:
        """Return the iframe and its target."""
        infos = {info["targetId"]: info for info in await self.app.sessions.targets()}
        if wanted in infos:
            return (wanted, wanted) if _is_iframe_in(page, wanted, infos) else None
        self.app.sessions.check_page(session, "Page.getFrameTree")
        targets = [page, *(target for target in infos if _is_iframe_in(page, target, infos))]
        sessions = [await self._session_in(target, page, session) for target in targets]
        trees = await asyncio.gather(*(self.app.connection.call("Page.getFrameTree", session=one) for one in sessions))
        found = [
            (frame, target)
            for target, tree in zip(targets, trees, strict=True)
            for frame in frames_in(tree["frameTree"])
            if frame["id"] != page
        ]
        matches = [one for one in found if one[0]["id"] == wanted]
        matches += [one for one in found if wanted and wanted in one[0]["url"] + one[0].get("urlFragment", "")]
        return next(((frame["id"], target) for frame, target in matches), None)

    async def _session_in(self, target: str, page: str, session: str) -> str:
        return session if target == page else await self.session_of(target)

    def _forget(self, session: str | None) -> None:
        self._contexts = {place: context for place, context in self._contexts.items() if place[0] != session}


def _is_iframe_in(page: str, target: str, infos: dict[str, Message]) -> bool:
    root = target
    while parent := infos.get(root, {}).get("parentId"):
        root = parent
    # Older browsers do not report the parent.
    return infos[target]["type"] == "iframe" and root in (page, target)


def frames_in(tree: Message) -> Iterator[Message]:
    """Yield the frames of a frame tree."""
    yield tree["frame"]
    for child in tree.get("childFrames", ()):
        yield from frames_in(child)
