"""Finds nodes by role, name, text, label, placeholder or test id, like Playwright's locators. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .tree import role_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .dom import Dom
    from .tree import Document

    # Whether a text of the page matches.
    Fits = Callable[[str], bool]

_LABELABLE = {"BUTTON", "INPUT", "METER", "OUTPUT", "PROGRESS", "SELECT", "TEXTAREA"}
_BUTTONS = {"button", "reset", "submit"}
# The current name of an ARIA role, and its earlier name.
_SYNONYMS = {"img": "image", "none": "presentation"}


def find(document: Document, criteria: dict[str, str], *, exact: bool = False) -> list[tuple[Document, int]]:
    """Return the nodes of `document` and its iframes that match all `criteria`, in document order: document, backendNodeId.

    The criteria are role, name, text, label, placeholder and test_id. A text matches if it contains the criterion, ignoring
    case, or with `exact` if it is equal.
    """
    found: list[tuple[Document, int]] = []
    pending = [document]
    while pending:
        inside = pending.pop()
        if inside.dom is not None:
            sets = [set(_FINDERS[kind](inside, inside.dom, wanted, _fits(wanted, exact))) for kind, wanted in criteria.items()]
            matching = set.intersection(*sets) if sets else set()
            found += [(inside, number) for number in inside.dom.numbers if number in matching]
        pending += reversed(inside.frames.values())
    return found


def _fits(wanted: str, exact: bool) -> Fits:
    if exact:
        same = _normal(wanted)
        return lambda text: _normal(text) == same
    part = _normal(wanted).casefold()
    return lambda text: part in _normal(text).casefold()


def _normal(text: str) -> str:
    return " ".join(text.split())


def _by_role(document: Document, _dom: Dom, wanted: str, _fits: Fits) -> Iterator[int]:
    role = wanted.casefold()
    for node in document.nodes.values():
        if role_of(node).casefold() in (role, _SYNONYMS.get(role)) and "backendDOMNodeId" in node:
            yield node["backendDOMNodeId"]


def _names(document: Document) -> dict[int, str]:
    """Return the accessible names of elements."""
    return {
        node["backendDOMNodeId"]: node["name"]["value"]
        for node in document.nodes.values()
        if not node["ignored"] and "backendDOMNodeId" in node and node.get("name", {}).get("value")
    }


def _by_name(document: Document, dom: Dom, _wanted: str, fits: Fits) -> Iterator[int]:
    elements = {number for node, number in enumerate(dom.numbers) if dom.is_element(node)}
    return (number for number, name in _names(document).items() if number in elements and fits(name))


def _by_text(_document: Document, dom: Dom, _wanted: str, fits: Fits) -> Iterator[int]:
    """Yield the smallest rendered elements that contain the text."""
    around: set[int] = set()
    for node in reversed(range(len(dom.parents))):
        if not dom.is_element(node):
            continue
        text = dom.texts[node]
        if dom.tags[node] == "INPUT":
            attributes = dom.attributes(node)
            text = attributes.get("value", "") if attributes.get("type", "").lower() in _BUTTONS else ""
        if node in around or (node in dom.rendered and fits(text)):
            parent = dom.parents[node]
            # Skip shadow roots.
            while parent >= 0 and not dom.is_element(parent):
                parent = dom.parents[parent]
            around.add(parent)
            if node not in around:
                yield dom.numbers[node]


def _by_label(document: Document, dom: Dom, _wanted: str, fits: Fits) -> Iterator[int]:
    names = _names(document)
    labels: dict[int, str] = {}
    ids: dict[str, int] = {}
    for node in range(len(dom.parents)):
        if dom.is_element(node):
            attributes = dom.attributes(node)
            ids.setdefault(attributes.get("id", ""), node)
            if "aria-label" in attributes or "aria-labelledby" in attributes:
                labels[node] = attributes.get("aria-label", "")
    for node, tag in enumerate(dom.tags):
        if tag == "LABEL":
            target = dom.attributes(node).get("for")
            labelled = ids.get(target) if target else _first_labelable(dom, node)
            if labelled is not None:
                labels[labelled] = labels.get(labelled, "") + " " + dom.texts[node]
    for node, label in labels.items():
        number = dom.numbers[node]
        if fits(label) or (number in names and fits(names[number])):
            yield number


def _first_labelable(dom: Dom, label: int) -> int | None:
    within = {label}
    for node in range(label + 1, len(dom.parents)):
        if dom.parents[node] not in within:
            return None
        within.add(node)
        if dom.tags[node] in _LABELABLE and dom.attributes(node).get("type") != "hidden":
            return node
    return None


def _by_placeholder(_document: Document, dom: Dom, _wanted: str, fits: Fits) -> Iterator[int]:
    for node in range(len(dom.parents)):
        attributes = dom.attributes(node)
        text = attributes.get("placeholder") or attributes.get("aria-placeholder")
        if text is not None and fits(text):
            yield dom.numbers[node]


def _by_test_id(_document: Document, dom: Dom, wanted: str, _fits: Fits) -> Iterator[int]:
    return (number for node, number in enumerate(dom.numbers) if dom.attributes(node).get("data-testid") == wanted)


_FINDERS = {
    "role": _by_role,
    "name": _by_name,
    "text": _by_text,
    "label": _by_label,
    "placeholder": _by_placeholder,
    "test_id": _by_test_id,
}
