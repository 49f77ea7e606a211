"""Resolves a target to an element: a selector, a reference of a snapshot, or a CDP node."""

from __future__ import annotations

import contextlib
import json
import os

from harness_ipc import escape_control

from . import TIMEOUT, scripts
from .errors import (
    SERVER_ERROR,
    BrowserTimeout,
    CDPError,
    ElementNotFound,
    ElementNotReady,
    InvalidArgument,
    JavaScriptError,
    node_gone,
)
from .javascript import exception_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from .tab import Tab

    # A selector (CSS or XPath), a reference, or a dict with an objectId, a backendNodeId or a nodeId.
    Target = str | dict[str, Any]

# Seconds to release the objects of a node.
_RELEASE = 1.0
_SEE = "see snapshot(), or find() for an element's text, label or role"


class Node:
    """An element of the page, as a CDP object: of the tab's session, or of an out-of-process iframe's. A context manager."""

    def __init__(self, tab: Tab, name: str, timeout: float) -> None:
        self.tab = tab
        # The target given by the caller.
        self.name = name
        self.timeout = timeout
        self.object_id = ""
        # The object group of this node.
        self.group = f"harness-{os.getpid()}-{id(self)}"
        self.session: str | None = None
        # The elements of its out-of-process iframes, innermost first.
        self.owners: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # During a navigation the page does not answer; it releases the objects by itself then.
        with contextlib.suppress(BrowserTimeout):
            self.tab.try_cdp("Runtime.releaseObjectGroup", self.session, objectGroup=self.group, timeout=_RELEASE)

    def cdp(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a CDP method for the object, in its session. Raises `ElementNotFound` if its document was replaced."""
        try:
            return self.tab.cdp(method, self.session, objectId=self.object_id, timeout=self.timeout, **params)
        except CDPError as error:
            if error.code != SERVER_ERROR or error.data.get("crashed") or "layout" in str(error):
                raise
            raise self.gone() from None

    def function(self, declaration: str, *arguments: Any, by_value: bool = True) -> dict[str, Any]:
        """Call a JavaScript function with the element as `this`, and return CDP's description of its value."""
        values = [{"value": argument} for argument in arguments]
        options = {"returnByValue": by_value, "awaitPromise": True, "userGesture": True, "objectGroup": self.group}
        reply = self.cdp("Runtime.callFunctionOn", functionDeclaration=declaration, arguments=values, **options)
        if (details := reply.get("exceptionDetails")) is not None:
            raise JavaScriptError(exception_text(details))
        result: dict[str, Any] = reply["result"]
        return result

    def call(self, script: str, *arguments: Any) -> dict[str, Any]:
        """Run one of `scripts`, and return its result. Raises the problem that it reports."""
        found: dict[str, Any] = self.function(script, *arguments)["value"]
        if found.get("gone"):
            raise self.gone()
        if (problem := found.get("problem")) is not None:
            raise self.not_ready(problem)
        if (invalid := found.get("invalid")) is not None:
            raise InvalidArgument(f"{self.name} {escape_control(invalid)}")
        return found

    def gone(self) -> ElementNotFound:
        """Return the error for an element that was removed from its document."""
        return node_gone(self.name)

    def not_ready(self, problem: str) -> ElementNotReady:
        """Return the error for an element that can't be acted on."""
        return ElementNotReady(f"{self.name} {escape_control(problem)}: nothing was done")


def resolve(tab: Tab, target: Target, frame: Target | None = None, *, timeout: float) -> Node:
    """Return the element for `target`; a selector is evaluated in the iframe `frame`, if given.

    A selector must match exactly one element, or exactly one visible element. Raises `ElementNotFound` and `InvalidArgument`.
    """
    if isinstance(target, dict):
        return _given(tab, target, timeout)
    if not isinstance(target, str):
        raise TypeError(f"a target must be a selector, a reference such as 'e5', or a CDP node as a dict, not {target!r}")
    if (name := as_reference(target)) is not None:
        node = Node(tab, name, timeout)
        _put(node, tab.request({"meta": "resolve_reference", "reference": name, "group": node.group}, timeout=timeout))
        return node
    node = Node(tab, repr(target), timeout)
    where: dict[str, Any] = {"objectGroup": node.group}
    if frame is not None:
        reply = frame_of(tab, frame, timeout=timeout)
        _put(node, reply)
        where |= {"uniqueContextId": reply["context"]} if reply.get("context") else {}
    expression = f"{scripts.SELECT}({json.dumps(target)})"
    result = tab.cdp("Runtime.evaluate", node.session, expression=expression, timeout=timeout, **where)["result"]
    if result.get("subtype") != "node":
        raise _not_one(target, json.loads(result["value"]))
    node.object_id = result["objectId"]
    return node


def as_reference(target: str) -> str | None:
    """Return the reference in a target of the form ``e5``, ``@e5`` or ``ref=e5``, or None."""
    name = target.removeprefix("@").removeprefix("ref=")
    return name if name[:1] == "e" and name[1:].isdecimal() else None


def frame_of(tab: Tab, frame: Target, *, timeout: float) -> dict[str, Any]:
    """Return the execution context of an iframe: ``node_session``, ``context`` (in that session) and ``owners``.

    `frame` is an id from `iframe_target`, a part of the iframe's URL, or a target. Raises `ElementNotFound`.
    """
    if (reply := _find_frame(tab, frame, timeout)) is None:
        raise ElementNotFound(f"no iframe has {frame!r} in its URL, or matches it as a selector: {_SEE}")
    return reply


def iframe_target(tab: Tab, frame: Target, *, timeout: float = TIMEOUT) -> str | None:
    """Return the id of the first iframe with `frame` in its URL, or of the iframe that `frame` selects as in `click`, or None.

    ```python
    js("document.title", iframe_target("example.org/embed"))
    js("document.title", iframe_target("#payment"))
    ```

    Pass it to `js`, or as `frame` to the functions for elements. In CDP it is a frameId, and for a cross-site iframe also a
    targetId. Raises `ElementNotFound` if `frame` selects another element, several, or one that was removed.
    """
    return None if (reply := _find_frame(tab, frame, timeout)) is None else str(reply["frame_id"])


def _find_frame(tab: Tab, frame: Target, timeout: float) -> dict[str, Any] | None:
    by_url = isinstance(frame, str) and as_reference(frame) is None
    if by_url:
        reply = tab.request({"meta": "frame", "frame": frame}, timeout=timeout)
        if reply["frame_id"]:
            return reply
    try:
        with resolve(tab, frame, timeout=timeout) as node:
            frame_id = node.cdp("DOM.describeNode")["node"].get("frameId")
    except (ElementNotFound, InvalidArgument) as error:
        if not by_url or error.data.get("count"):
            raise
        return None
    reply = tab.request({"meta": "frame", "frame": frame_id or ""}, timeout=timeout)
    if not reply["frame_id"]:
        raise ElementNotFound(f"{frame!r} is not an iframe")
    return reply


def _given(tab: Tab, target: dict[str, Any], timeout: float) -> Node:
    name = next((name for name in ("objectId", "backendNodeId", "backendDOMNodeId", "nodeId") if target.get(name)), None)
    if name is None:
        raise TypeError(f"a dict needs an objectId, a backendNodeId or a nodeId, not {', '.join(target) or 'nothing'}")
    node = Node(tab, f"the node {target[name]!a}", timeout)
    node.session = target.get("session_id")
    node.object_id = str(target[name])
    if name != "objectId":
        params = {"nodeId" if name == "nodeId" else "backendNodeId": target[name], "objectGroup": node.group}
        try:
            node.object_id = tab.cdp("DOM.resolveNode", node.session, timeout=timeout, **params)["object"]["objectId"]
        except CDPError as error:
            if error.data.get("crashed"):
                raise
            raise node.gone() from None
    return node


def _put(node: Node, reply: dict[str, Any]) -> None:
    node.object_id = reply.get("objectId", "")
    # None for the tab's own session: if that has ended, the session that replaces it is used.
    node.session = None if reply["node_session"] == reply["session_id"] else reply["node_session"]
    node.owners = reply["owners"]


def _not_one(selector: str, found: dict[str, Any]) -> Exception:
    if (invalid := found.get("invalid")) is not None:
        return InvalidArgument(escape_control(invalid))
    count, near = found["count"], escape_control(", ".join(found["near"]))
    if count:
        more = ", ..." if count > len(found["near"]) else ""
        text = f"{selector!r} matches {count} elements, and has to match one: {near}{more}"
    elif found["frames"]:
        inside = escape_control(found["frames"][0])
        text = (
            f"{selector!r} matches no element of the page, but one in the iframe {inside}: give frame= with a selector of that"
        )
    else:
        text = f"{selector!r} matches no element{f'; similar are {near}' if near else ''}: {_SEE}"
    return ElementNotFound(text, count=count)
