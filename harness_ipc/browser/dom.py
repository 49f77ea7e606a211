"""The nodes of a document, as returned by `DOMSnapshot.captureSnapshot`. No I/O."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Elements whose listeners do not show that they are clickable: React and others listen at the root for all descendants.
_NOT_CLICKABLE = {"HTML", "BODY", "LABEL"}
_ACTS_ITSELF = {"A", "BUTTON", "INPUT", "LABEL", "OPTION", "SELECT", "SUMMARY", "TEXTAREA"}
_NO_TEXT = {"HEAD", "NOSCRIPT", "SCRIPT", "STYLE", "TEMPLATE"}
_ELEMENT, _TEXT = 1, 3


class Dom:
    """The nodes of a document by index: `parents` (-1 for none), `tags`, `numbers` (backendNodeIds)."""

    def __init__(self, captured: dict[str, Any], strings: list[str]) -> None:
        self._nodes = captured["nodes"]
        self._layout = captured["layout"]
        self._strings = strings
        self.parents: list[int] = self._nodes["parentIndex"]
        self.numbers: list[int] = self._nodes["backendNodeId"]
        self.tags = [strings[name].upper() for name in self._nodes["nodeName"]]

    def attributes(self, node: int) -> dict[str, str]:
        """Return the attributes of a node."""
        words = [self._strings[word] if word >= 0 else "" for word in self._nodes["attributes"][node]]
        return dict(zip(words[::2], words[1::2], strict=False))

    def is_element(self, node: int) -> bool:
        """Return whether a node is an element."""
        return bool(self._nodes["nodeType"][node] == _ELEMENT)

    @cached_property
    def rendered(self) -> set[int]:
        """The nodes that have a layout box."""
        return set(self._layout["nodeIndex"])

    @cached_property
    def texts(self) -> list[str]:
        """The text content of each node."""
        texts = [""] * len(self.parents)
        values, kinds = self._nodes["nodeValue"], self._nodes["nodeType"]
        for node in reversed(range(len(texts))):
            if kinds[node] == _TEXT:
                texts[node] = self._strings[values[node]] if values[node] >= 0 else ""
            parent = self.parents[node]
            if parent >= 0 and self.tags[node] not in _NO_TEXT:
                texts[parent] = texts[node] + texts[parent]
        return texts

    def clickable(self) -> Iterator[int]:
        """Yield the backendNodeIds of elements with a pointer cursor, and of those with a click listener."""
        listening = set(self._nodes["isClickable"]["index"])
        pointing = {
            node
            for node, styles in zip(self._layout["nodeIndex"], self._layout["styles"], strict=False)
            if styles and self._strings[styles[0]] == "pointer" and self.is_element(node)
        }
        # Nodes inside a clickable element, such as a button's icon.
        within: set[int] = set()
        for node, parent in enumerate(self.parents):
            if parent in within or self.tags[node] in _ACTS_ITSELF:
                within.add(node)
        around: set[int] = set()
        for node in reversed(range(len(self.parents))):
            parent = self.parents[node]
            hand = node in pointing and parent not in pointing
            if node in around or node in within or node in listening or node in pointing:
                around.add(parent)
            if node in within or self.tags[node] in _NOT_CLICKABLE:
                continue
            if hand or (node in listening and node not in around):
                yield self.numbers[node]
