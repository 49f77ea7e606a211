"""References (``e1``, ``e2``, ...) to the nodes of a tab. No I/O."""

from __future__ import annotations

from typing import NamedTuple

# The limit of references per tab: a page that keeps changing has new nodes in each snapshot.
MAX_KEPT = 50_000


class Place(NamedTuple):
    """The key of a node: a backendNodeId is unique only in a renderer process, which may change with the document."""

    target: str
    frame: str
    loader: str
    node: int


class References:
    """The references of a tab. A node keeps its reference as long as its document exists; references are never reused."""

    def __init__(self) -> None:
        self._last = 0
        # The least recently used first.
        self._names: dict[Place, str] = {}
        self._places: dict[str, Place] = {}

    def of(self, place: Place) -> str:
        """Return the reference of the node at `place`."""
        if (name := self._names.pop(place, None)) is None:
            self._last += 1
            name = f"e{self._last}"
            self._places[name] = place
        self._names[place] = name
        if len(self._names) > MAX_KEPT:
            self._forget(next(iter(self._names)))
        return name

    def place(self, name: str) -> Place | None:
        """Return the place of a reference, or None if it does not exist any more."""
        return self._places.get(name)

    def was_given(self, name: str) -> bool:
        """Return whether the reference existed at some time."""
        return name[:1] == "e" and name[1:].isdecimal() and 0 < int(name[1:]) <= self._last

    def keep(self, documents: set[tuple[str, str, str]]) -> None:
        """In the targets of `documents` (target, frame, loader), forget the nodes of all other documents."""
        targets = {document[0] for document in documents}
        for place in [place for place in self._names if place.target in targets and place[:3] not in documents]:
            self._forget(place)

    def _forget(self, place: Place) -> None:
        del self._places[self._names.pop(place)]
