"""The iframes of a tab, as the daemon knows them: those of the page's own process, and those that are targets of their own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .connection import Connection

    Message = dict[str, Any]


class Frames:
    """Sessions with iframes that are targets of their own, and where code runs in each iframe."""

    def __init__(self) -> None:
        # By target.
        self._sessions: dict[str, str] = {}
        # The uniqueId of the page's own execution context, by session and frame.
        self._contexts: dict[tuple[str, str], str] = {}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Note the contexts that there are, and forget what has ended."""
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

    async def session_of(self, connection: Connection, frame: str) -> str:
        """Return our session with an iframe that is a target of its own."""
        if (session := self._sessions.get(frame)) is None:
            attached = await connection.call("Target.attachToTarget", {"targetId": frame, "flatten": True})
            session = self._sessions[frame] = str(attached["sessionId"])
            await connection.call("Runtime.enable", session=session)
        return session

    async def owners(self, connection: Connection, target: str, page: str, session: str) -> list[Message]:
        """Return the elements of the iframes from `target` up to the tab's `page`: ``{"session_id", "backendNodeId"}`` each."""
        owners = []
        while target != page:
            info = (await connection.call("Target.getTargetInfo", {"targetId": target}))["targetInfo"]
            parent = info.get("parentId") or page
            inside = session if parent == page else await self.session_of(connection, parent)
            owner = await connection.call("DOM.getFrameOwner", {"frameId": target}, session=inside)
            owners.append({"session_id": inside, "backendNodeId": owner["backendNodeId"]})
            target = parent
        return owners

    async def find(self, connection: Connection, page: str, session: str, wanted: str) -> Message:
        """Return the first iframe of the tab that has the id `wanted`, or else that has it in its URL.

        ``frame_id`` is None if there is none; ``node_session`` and ``context`` are where code runs in it, ``owners`` as above.
        """
        targets = [page, *(await self._targets_in(connection, page))]
        sessions = [session, *[await self.session_of(connection, target) for target in targets[1:]]]
        trees = await asyncio.gather(*(connection.call("Page.getFrameTree", session=one) for one in sessions))
        found = [
            (frame, target, inside)
            for target, inside, tree in zip(targets, sessions, trees, strict=True)
            for frame in frames_in(tree["frameTree"])
            if frame["id"] != page
        ]
        matches = [one for one in found if one[0]["id"] == wanted]
        matches += [one for one in found if wanted and wanted in one[0]["url"] + one[0].get("urlFragment", "")]
        if not matches:
            return {"frame_id": None}
        frame, target, inside = matches[0]
        owners = await self.owners(connection, target, page, session)
        context = self._contexts.get((inside, frame["id"]))
        return {"frame_id": frame["id"], "node_session": inside, "context": context, "owners": owners}

    async def _targets_in(self, connection: Connection, page: str) -> list[str]:
        infos = {info["targetId"]: info for info in (await connection.call("Target.getTargets"))["targetInfos"]}

        def root(target: str) -> str:
            while parent := infos.get(target, {}).get("parentId"):
                target = parent
            return target

        # An older browser names no parent.
        return [target for target, info in infos.items() if info["type"] == "iframe" and root(target) in (page, target)]

    def _forget(self, session: str | None) -> None:
        self._contexts = {place: context for place, context in self._contexts.items() if place[0] != session}


def frames_in(tree: Message) -> Iterator[Message]:
    """Yield the frames of a frame tree."""
    yield tree["frame"]
    for child in tree.get("childFrames", ()):
        yield from frames_in(child)
