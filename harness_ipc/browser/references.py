"""References (``e1``, ``e2``, ...) to the nodes of a tab. Pure: it asks no browser."""

from __future__ import annotations

from typing import NamedTuple

# References of a tab that are kept. A page that changes all the time has new nodes in each snapshot.
MAX_KEPT = 50_000


class Place(NamedTuple):
    """Where a node is: a backendNodeId is unique in a renderer's process only, and that changes with the document."""

    target: str
    frame: str
    loader: str
    node: int


class References:
    """A tab's references. A node keeps its own as long as its document is there; no other node ever gets it."""

    def __init__(self) -> None:
        self._last = 0
        # The least recently shown first.
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
        """Return where the node of a reference is, or None if there is no such reference any more."""
        return self._places.get(name)

    def was_given(self, name: str) -> bool:
        """Return whether there was such a reference."""
        return name[:1] == "e" and name[1:].isdecimal() and 0 < int(name[1:]) <= self._last

    def keep(self, documents: set[tuple[str, str, str]]) -> None:
        """Forget the nodes of other documents (target, frame, loader) than these, in the targets of these."""
        targets = {document[0] for document in documents}
        for place in [place for place in self._names if place.target in targets and place[:3] not in documents]:
            self._forget(place)

    def _forget(self, place: Place) -> None:
        del self._places[self._names.pop(place)]
