"""Reads pages in the daemon: the documents of a page and all its iframes, and references to their nodes.

The tree of a page may have megabytes, its text a few kilobytes: so the daemon formats it, not the client.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .dom import Dom
from .errors import CDPError, ElementNotFound, node_gone
from .frames import frames_in
from .matching import find
from .part import Part, bounded
from .references import Place, References
from .tree import Document, render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .connection import Connection
    from .daemon import BrowserApp
    from .part import Message, Verb

# The limit of nested iframes: a page may embed itself.
_MAX_DEPTH = 10


class Accessibility(Part):
    """The requests that read pages, and the references to their nodes."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        # By the tab's target. They are of targets and documents, which outlast a connection.
        self._references: dict[str, References] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests that read pages."""
        verbs = {"snapshot": self.snapshot, "find": self.find, "resolve_reference": self.resolve}
        return {verb: bounded(function) for verb, function in verbs.items()}

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Forget closed tabs and ended contexts."""
        if method == "Target.targetDestroyed":
            self._references.pop(params["targetId"], None)

    async def snapshot(self, message: Message) -> Message:
        """Return the page as ``text``; with ``interactive``, only elements that can be acted on."""
        connection, session, target = await self.app.sessions.page_of(message)
        document, references = await self._read_page(connection, session, target)

        def reference(inside: Document, node: int) -> str:
            return references.of(Place(*inside.place, node))

        return {"text": render(document, reference, interactive=bool(message.get("interactive"))), "session_id": session}

    async def find(self, message: Message) -> Message:
        """Return the ``references`` of the nodes that match the ``criteria`` of `matching.find`."""
        connection, session, target = await self.app.sessions.page_of(message)
        document, references = await self._read_page(connection, session, target)
        found = find(document, message.get("criteria") or {}, exact=bool(message.get("exact")))
        return {"references": [references.of(Place(*inside.place, node)) for inside, node in found], "session_id": session}

    async def resolve(self, message: Message) -> Message:
        """Return the node of ``reference`` as an ``objectId`` in the session ``node_session``.

        ``owners`` are the nodes of its out-of-process iframes, innermost first: `session_id` and `backendNodeId`. Raises
        `ElementNotFound`.
        """
        connection, session, target = await self.app.sessions.page_of(message)
        name = str(message.get("reference"))
        references = self._references.get(target)
        if references is None or (place := references.place(name)) is None:
            if references is not None and references.was_given(name):
                raise node_gone(name, reference=name)
            raise ElementNotFound(f"there is no {name} in this tab: call snapshot() for valid references")
        with contextlib.suppress(CDPError):
            inside = session if place.target == target else await self.app.frames.session_of(place.target)
            resolved, tree = await asyncio.gather(
                connection.call(
                    "DOM.resolveNode", {"backendNodeId": place.node, "objectGroup": str(message.get("group"))}, session=inside
                ),
                # Last: a node of a later document may have the same number.
                connection.call("Page.getFrameTree", session=inside),
            )
            if _loaders(tree["frameTree"]).get(place.frame) == place.loader:
                reply: Message = {"objectId": resolved["object"]["objectId"], "node_session": inside, "session_id": session}
                return reply | {"owners": await self.app.frames.owners(place.target, target, session)}
        raise node_gone(name, reference=name)

    # Reading.

    async def _read_page(self, connection: Connection, session: str, target: str) -> tuple[Document, References]:
        there: set[tuple[str, str, str]] = set()
        document = await self._read(connection, session, target, there, 0)
        references = self._references.setdefault(target, References())
        references.keep(there)
        return document, references

    async def _read(
        self, connection: Connection, session: str, target: str, there: set[tuple[str, str, str]], depth: int
    ) -> Document:
        """Return the document of a target, including its iframes. Adds the keys of all documents to `there`."""

        async def call(method: str, **params: Any) -> Message:
            return await connection.call(method, params, session=session)

        tree, captured, main = await asyncio.gather(
            call("Page.getFrameTree"),
            call("DOMSnapshot.captureSnapshot", computedStyles=["cursor"]),
            call("Accessibility.getFullAXTree"),
        )
        loaders = _loaders(tree["frameTree"])
        there |= {(target, frame, loader) for frame, loader in loaders.items()}
        strings = captured["strings"]
        doms = {strings[one["frameId"]]: Dom(one, strings) for one in captured["documents"]}

        async def read(frame: str, nodes: list[Message], depth: int) -> Document:
            document = Document(nodes, place=(target, frame, loaders.get(frame, "")), dom=doms.get(frame))
            if depth < _MAX_DEPTH:
                owners = [node["backendDOMNodeId"] for node in nodes if node["role"]["value"].startswith("Iframe")]
                await asyncio.gather(*(read_frame(document, owner, depth + 1) for owner in owners))
            return document

        async def read_frame(document: Document, owner: int, depth: int) -> None:
            # An iframe that is removed meanwhile is omitted.
            with contextlib.suppress(CDPError):
                frame = (await call("DOM.describeNode", backendNodeId=owner))["node"].get("frameId", "")
                if frame in loaders:
                    nodes = (await call("Accessibility.getFullAXTree", frameId=frame))["nodes"]
                    document.frames[owner] = await read(frame, nodes, depth)
                elif frame:
                    inside = await self.app.frames.session_of(frame)
                    document.frames[owner] = await self._read(connection, inside, frame, there, depth)

        return await read(tree["frameTree"]["frame"]["id"], main["nodes"], depth)


def _loaders(tree: Message) -> dict[str, str]:
    """Return the loader id of each frame in a frame tree, which changes with the document."""
    return {frame["id"]: frame["loaderId"] for frame in frames_in(tree)}
