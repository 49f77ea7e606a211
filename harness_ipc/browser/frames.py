"""The iframes of a tab, as the daemon knows them: those of the page's own process, and those that are targets of their own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from .part import Changing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .connection import Connection

    Message = dict[str, Any]


class Frames(Changing):
    """Sessions with iframes that are targets of their own, and where code runs in each iframe: it changes with that."""

    def __init__(self) -> None:
        super().__init__()
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
        elif method != "Page.frameDetached":
            return
        self.notify()

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
            inside = await self._session_in(connection, parent, page, session)
            owner = await connection.call("DOM.getFrameOwner", {"frameId": target}, session=inside)
            owners.append({"session_id": inside, "backendNodeId": owner["backendNodeId"]})
            target = parent
        return owners

    async def find(
        self, connection: Connection, page: str, session: str, wanted: str, check_page: Callable[[], None]
    ) -> Message:
        """Return the first iframe of the tab that has the id `wanted`, or else that has it in its URL.

        ``frame_id`` is None if there is none; ``node_session`` and ``context`` (None for the session's own document) are where
        code runs in it, ``owners`` as above. `check_page` raises if the page can't be read, which the id of a target needs not.
        """
        while True:
            changed = self.changed
            infos = {info["targetId"]: info for info in (await connection.call("Target.getTargets"))["targetInfos"]}
            targets = [target for target in infos if _is_iframe_in(page, target, infos)]
            if wanted in infos:
                matches = [(wanted, wanted)] if wanted in targets else []
            else:
                check_page()
                matches = await self._search([page, *targets], page, session, connection, wanted)
            if not matches:
                return {"frame_id": None}
            frame, target = matches[0]
            inside = await self._session_in(connection, target, page, session)
            context = None if frame == target else self._contexts.get((inside, frame))
            if context is not None or frame == target:
                owners = await self.owners(connection, target, page, session)
                return {"frame_id": frame, "node_session": inside, "context": context, "owners": owners}
            # Its document makes room for the next one.
            await changed.wait()

    async def _search(
        self, targets: list[str], page: str, session: str, connection: Connection, wanted: str
    ) -> list[tuple[str, str]]:
        """Return the iframes that fit, by their id first, each with the target that it is in."""
        sessions = [await self._session_in(connection, target, page, session) for target in targets]
        trees = await asyncio.gather(*(connection.call("Page.getFrameTree", session=one) for one in sessions))
        found = [
            (frame, target)
            for target, tree in zip(targets, trees, strict=True)
            for frame in frames_in(tree["frameTree"])
            if frame["id"] != page
        ]
        matches = [one for one in found if one[0]["id"] == wanted]
        matches += [one for one in found if wanted and wanted in one[0]["url"] + one[0].get("urlFragment", "")]
        return [(frame["id"], target) for frame, target in matches]

    async def _session_in(self, connection: Connection, target: str, page: str, session: str) -> str:
        return session if target == page else await self.session_of(connection, target)

    def _forget(self, session: str | None) -> None:
        self._contexts = {place: context for place, context in self._contexts.items() if place[0] != session}


def _is_iframe_in(page: str, target: str, infos: dict[str, Message]) -> bool:
    root = target
    while parent := infos.get(root, {}).get("parentId"):
        root = parent
    # Itself, where an older browser names no parent.
    return infos[target]["type"] == "iframe" and root in (page, target)


def frames_in(tree: Message) -> Iterator[Message]:
    """Yield the frames of a frame tree."""
    yield tree["frame"]
    for child in tree.get("childFrames", ()):
        yield from frames_in(child)
