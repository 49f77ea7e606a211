"""Formats the accessibility nodes of a page as lines of text. No I/O.

The format is that of Playwright's and agent-browser's snapshots, one node per line::

    - heading "Sign in" [level=1] [ref=e1]
    - textbox "Name" [required] [ref=e2]: Ada
    - text: or continue with
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness_ipc import escape_control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .dom import Dom

    Nodes = dict[str, Any]

# The limit of a name or a value in characters.
MAX_NAME = 200
MAX_TEXT = 1000

# fmt: off
INTERACTIVE = frozenset((
    "button", "checkbox", "combobox", "link", "listbox", "menuitem", "menuitemcheckbox", "menuitemradio", "option", "radio",
    "searchbox", "slider", "spinbutton", "switch", "tab", "textbox", "treeitem",
    "ColorWell", "Date", "DateTime", "DisclosureTriangle", "InputTime",
))
# Generic roles: shown only with a name, or if they can be clicked or focused.
_PLAIN = frozenset((
    "generic", "none", "presentation", "rowgroup",
    "Abbr", "LabelText", "Legend", "MenuListPopup", "Ruby", "RubyAnnotation", "Section",
))
# fmt: on
# Parts of a text, which is shown by their parent.
_PARTS = frozenset(("InlineTextBox", "LineBreak", "ListMarker"))
# List markers of elements with another role.
_MARKERS = "•◦▪"
_FRAMES = frozenset(("Iframe", "IframePresentational"))
# Roles whose value is repeated by their children.
_EDITED = frozenset(("textbox", "searchbox", "spinbutton", "Date", "DateTime", "InputTime", "ColorWell"))
# Chrome's names for roles that ARIA does not have.
_NAMES = {"Iframe": "iframe", "IframePresentational": "iframe", "DisclosureTriangle": "button"}
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))


class Document:
    """The document of one frame: `nodes` as returned by `Accessibility.getFullAXTree`, and `dom`.

    `frames` has the documents of its iframes by the backendNodeId of the iframe element; `place` is the key of the document
    in references (target, frame, loader).
    """

    def __init__(self, nodes: list[Nodes], *, place: tuple[str, str, str], dom: Dom | None) -> None:
        self.nodes = {node["nodeId"]: node for node in nodes}
        self.root = nodes[0] if nodes else None
        self.place = place
        self.dom = dom
        self.frames: dict[int, Document] = {}

    @cached_property
    def clickable(self) -> frozenset[int]:
        """The backendNodeIds of clickable elements."""
        return frozenset(self.dom.clickable()) if self.dom is not None else frozenset()


class Element:
    """A node to show: the content of its line, and its children."""

    __slots__ = ("actionable", "children", "name", "node", "role", "states", "value")

    def __init__(self, role: str, name: str, node: int | None) -> None:
        self.role = role
        self.name = name
        self.node = node
        self.value = ""
        self.states: list[str] = []
        self.actionable = False
        self.children: list[Element] = []


def elements(document: Document) -> Element:
    """Return the elements of `document` as a tree, whose root represents the document."""
    top = Element("document", "", None)
    if document.root is None:
        return top
    created: list[tuple[Element, Nodes]] = [(top, document.root)]
    order: list[Element] = []
    while created:
        parent, node = created.pop()
        order.append(parent)
        if parent.role in _EDITED:
            continue
        for child in _shown(document, node):
            if isinstance(child, str):
                parent.children.append(Element("text", child, None))
            else:
                element = _element(document, child)
                parent.children.append(element)
                created.append((element, child))
    for element in reversed(order):
        _fold(element)
    return top


def render(document: Document, reference: Callable[[Document, int], str], *, interactive: bool = False) -> str:
    """Return the lines of `document` and of the documents in its iframes.

    `reference` returns the reference of a node; with `interactive`, only elements that can be acted on are included.
    """
    lines: list[str] = []
    # Depth first: the top of the stack is next.
    pending = [(document, element, 0) for element in reversed(elements(document).children)]
    while pending:
        inside, element, depth = pending.pop()
        framed = None if element.node is None else inside.frames.get(element.node)
        if not interactive or element.actionable or framed is not None:
            lines.append("  " * depth + _line(inside, element, reference, interactive))
            below = 1 if not interactive or framed is not None else 0
        else:
            below = 0
        children = [(inside, child, depth + below) for child in element.children]
        if framed is not None:
            children = [(framed, child, depth + 1) for child in elements(framed).children]
        pending += reversed(children)
    return "\n".join(lines)


def plain(text: Any, limit: int = MAX_NAME) -> str:
    """Return a text as one line, with control characters escaped, and truncated to `limit` characters."""
    words = " ".join(str(text).translate(_INVISIBLE).split())
    if len(words) > limit:
        words = words[:limit].rstrip() + "…"
    return words if words.isprintable() else escape_control(words)


def role_of(node: Nodes) -> str:
    """Return the role of a node for its line, or "" if the node is hidden."""
    if node["ignored"]:
        return ""
    role = str(node["role"]["value"])
    if role == "generic" and _property(node, "editable") == "richtext" and _property(node, "focusable"):
        return "textbox"
    return _NAMES.get(role, role)


def _shown(document: Document, node: Nodes) -> Iterator[Nodes | str]:
    """Yield the descendants of `node` to show, and the text between them."""
    text = ""
    # Node ids; None marks the end of a box, which separates texts.
    pending: list[str | None] = list(reversed(node.get("childIds", ())))
    while pending:
        number = pending.pop()
        child = document.nodes.get(number) if number is not None else None
        role = "" if child is None else child["role"]["value"]
        if child is not None and role == "StaticText" and not child["ignored"]:
            text += child["name"]["value"]
            continue
        if role in _PARTS:
            text += " "
            continue
        if words := _text(text):
            yield words
        text = ""
        if child is None:
            continue
        if _is_shown(document, child):
            yield child
        else:
            pending += [None, *reversed(child.get("childIds", ()))]
    if words := _text(text):
        yield words


def _text(text: str) -> str:
    words = plain(text, MAX_TEXT)
    return "" if words in _MARKERS else words


def _is_shown(document: Document, node: Nodes) -> bool:
    role = node["role"]["value"]
    if node.get("backendDOMNodeId") in document.clickable:
        return True
    if node["ignored"]:
        return False
    if role not in _PLAIN:
        return True
    if role == "generic" and _property(node, "editable"):
        return _property(node, "focusable") is True
    return bool(node.get("name", {}).get("value")) or _property(node, "focusable") is True


def _property(node: Nodes, name: str) -> Any:
    for one in node.get("properties", ()):
        if one["name"] == name:
            return one["value"].get("value")
    return None


def _element(document: Document, node: Nodes) -> Element:
    role, number = node["role"]["value"], node.get("backendDOMNodeId")
    properties = {one["name"]: one["value"].get("value") for one in node.get("properties", ())}
    element = Element(role_of(node) or "generic", plain(node.get("name", {}).get("value", "")), number)
    element.value = plain(node.get("value", {}).get("value", ""))
    clickable = number in document.clickable and role not in INTERACTIVE
    focusable = properties.get("focusable") is True
    element.actionable = role in INTERACTIVE or element.role == "textbox" or clickable or (focusable and role not in _FRAMES)
    element.states = list(_states(role, properties))
    if clickable:
        element.states.append("clickable")
    return element


def _states(role: str, properties: Nodes) -> Iterator[str]:
    if role == "heading":
        yield f"level={properties.get('level')}"
    for name in ("checked", "pressed"):
        if (value := properties.get(name)) not in (None, "false", False):
            yield name if value in ("true", True) else f"{name}={plain(value)}"
    for name in ("selected", "disabled", "required", "focused", "modal", "busy"):
        if properties.get(name) is True:
            yield name
    if (expanded := properties.get("expanded")) is not None:
        yield "expanded" if expanded else "collapsed"
    if properties.get("readonly") is True and role in (*_EDITED, "combobox"):
        yield "readonly"
    if (invalid := properties.get("invalid")) not in (None, "false"):
        yield "invalid" if invalid == "true" else f"invalid={plain(invalid)}"


def _fold(element: Element) -> None:
    """Remove text children that repeat the name; move a text that is the only child into the line."""
    children = element.children
    texts = [child for child in children if child.role == "text"]
    if name := element.name:
        cut = name[:-1] if name.endswith("…") else None
        repeated = [child for child in texts if child.name in name or (cut and child.name.startswith(cut))]
        element.children = [child for child in children if child not in repeated]
    elif len(children) == len(texts) == 1 and not element.value:
        element.value, element.children = texts[0].name, []
    if element.actionable and not element.name and element.role == "generic":
        # Name a clickable element without a name by its text.
        element.name = plain(" ".join(_words(element))) if element.children else ""


def _words(element: Element) -> Iterator[str]:
    """Yield the text in `element`, as much as a name needs."""
    pending, length = list(reversed(element.children)), 0
    while pending and length < MAX_NAME:
        child = pending.pop()
        words = child.name or child.value
        if words:
            yield words
            length += len(words)
        else:
            pending += reversed(child.children)


def _line(document: Document, element: Element, reference: Callable[[Document, int], str], interactive: bool) -> str:
    if element.role == "text":
        return f"- text: {element.name}"
    name, value = element.name, element.value
    line = f"- {element.role}"
    if interactive and not name and element.role == "generic":
        name, value = value, ""
    if name:
        quoted = name.replace('"', '\\"')
        line += f' "{quoted}"'
    line += "".join(f" [{state}]" for state in element.states)
    if element.node is not None:
        line += f" [ref={reference(document, element.node)}]"
    return f"{line}: {value}" if value else line
