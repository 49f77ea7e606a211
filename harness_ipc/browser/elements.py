"""Acting on elements: each function takes a selector, a reference of `snapshot` or `find`, or a node as CDP gives it.

A selector is CSS, or XPath where it begins with ``//`` or ``xpath=``. It has to mean one element, or one that is visible; open
shadow roots are searched where the page itself has none. `frame` is the iframe that a selector is for: an id that
`iframe_target` gave, a part of the iframe's URL, or what means its element. Before anything is done, `ElementNotFound`,
`ElementNotReady` (covered, disabled, hidden) or `InvalidArgument` is raised.
"""

from __future__ import annotations

import contextlib
import errno
import os

from . import TIMEOUT, mouse, scripts
from .dialogs import may_open_dialog
from .errors import CDPError, ElementNotReady
from .nodes import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .nodes import Node, Target
    from .tab import Tab

# Seconds for an element to stand still.
_PATIENCE = 2.0
# Looks at the place of an element in an iframe, until it has not changed.
_LOOKS = 20


def click(
    tab: Tab,
    target: Target,
    button: str = "left",
    clicks: int = 1,
    *,
    frame: Target | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Click an element: scroll it into view, wait until it stands still, and make sure that nothing covers it.

    ```python
    click("e5")
    click("#save", clicks=2)
    click("button", frame="#payment")
    ```

    `button` is left, middle or right; two `clicks` are a double click. Where an input is hidden behind its label, the label
    is clicked. Raises `ElementNotReady` that names what covers the element; `click_at_xy` asks nothing.
    """
    with resolve(tab, target, frame, timeout=timeout) as node:
        x, y = _place(node, acting=True)
    mouse.click_at_xy(tab, x, y, button, clicks, timeout=timeout)


def hover(tab: Tab, target: Target, *, frame: Target | None = None, timeout: float = TIMEOUT) -> None:
    """Move the mouse over an element, as `click` does before it presses."""
    with resolve(tab, target, frame, timeout=timeout) as node:
        x, y = _place(node, acting=False)
    with may_open_dialog():
        mouse.move(tab, x, y, timeout)


def scroll_into_view(tab: Tab, target: Target, *, frame: Target | None = None, timeout: float = TIMEOUT) -> None:
    """Scroll the page, and what scrolls in it, so that the element is in view."""
    with resolve(tab, target, frame, timeout=timeout) as node:
        _scroll(node)


def fill_input(
    tab: Tab, target: Target, text: str, clear_first: bool = True, *, frame: Target | None = None, timeout: float = TIMEOUT
) -> None:
    """Put `text` into a field in the place of what is there, or behind it without `clear_first`, and fire input and change.

    A framework such as React notices. The field is an input, a textarea, something contenteditable, or a label of one; a date
    is "2025-12-31", as the input's value has it. Raises `ElementNotReady` if it is disabled or read-only, and `InvalidArgument`
    if it does not take the text: it is too long for its maxlength, or no date.
    """
    if not isinstance(text, str):
        raise TypeError(f"fill_input() takes the text as str, not {type(text).__name__}")
    with resolve(tab, target, frame, timeout=timeout) as node, may_open_dialog():
        node.call(scripts.FILL, text, clear_first)


def select_option(
    tab: Tab,
    target: Target,
    *choices: str | int | list[str | int],
    frame: Target | None = None,
    timeout: float = TIMEOUT,
) -> list[str]:
    """Select the option of a select that has this value, this label or, if it is an int, this index; fire input and change.

    ```python
    select_option("#size", "Large")
    select_option("e7", "de", "fr")
    ```

    Several `choices`, or a list, are for a select with ``multiple``; they take the place of what is selected. Return the labels
    of the selected options. Raises `InvalidArgument` that names the options if there is no such one.
    """
    wanted = [one for choice in choices for one in (choice if isinstance(choice, list | tuple) else [choice])]
    if not choices or not all(isinstance(one, str | int) for one in wanted):
        raise TypeError("select_option() takes a value or a label as str, or an index as int, or several")
    found: dict[str, Any] = {}
    with resolve(tab, target, frame, timeout=timeout) as node, may_open_dialog():
        found = node.call(scripts.CHOOSE, wanted)
    return list(found.get("selected", ()))


def upload_file(
    tab: Tab,
    target: Target,
    *paths: str | os.PathLike[str] | list[str | os.PathLike[str]],
    frame: Target | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Choose files for a file input, for its label, or for what has one inside. Paths are relative to this process's directory.

    The input may be hidden. Its input and change events are fired. Raises `FileNotFoundError` for a file that is not there.
    """
    files = [os.path.abspath(os.fspath(one)) for path in paths for one in (path if isinstance(path, list | tuple) else [path])]
    if not files:
        raise TypeError("upload_file() takes the path of a file, or several")
    for file in files:
        if not os.path.exists(file):
            raise FileNotFoundError(errno.ENOENT, "there is no such file to upload", file)
    directories = any(os.path.isdir(file) for file in files)
    with resolve(tab, target, frame, timeout=timeout) as node:
        found = node.function(scripts.FILE_INPUT, len(files), directories, by_value=False)
        if "objectId" not in found:
            raise node.gone() if found["value"] == "gone" else node.not_ready(found["value"])
        node.object_id = found["objectId"]
        with may_open_dialog():
            node.cdp("DOM.setFileInputFiles", files=files)


def _scroll(node: Node) -> None:
    for owner in reversed(node.owners):
        session, number = owner["session_id"], owner["backendNodeId"]
        node.tab.try_cdp("DOM.scrollIntoViewIfNeeded", session, backendNodeId=number, timeout=node.timeout)
    try:
        node.cdp("DOM.scrollIntoViewIfNeeded")
    except CDPError as error:
        if "layout" not in str(error):
            raise
        raise node.not_ready("is not visible") from None


def _place(node: Node, *, acting: bool) -> tuple[float, float]:
    """Return where the element is in the viewport of the page, once it is in view, stands still and is not covered."""
    # A label may stand for what is not visible: the script tells.
    with contextlib.suppress(ElementNotReady):
        _scroll(node)
    patience = min(_PATIENCE, node.timeout) * 1000
    at = node.call(scripts.PLACE, patience, acting)
    if not at["framed"]:
        return at["x"], at["y"]
    spot = _in_page(node, at)
    for _ in range(_LOOKS):
        expression = f"{scripts.COVER}({spot[0]}, {spot[1]})"
        options: dict[str, Any] = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        cover = node.tab.cdp("Runtime.evaluate", timeout=node.timeout, **options)["result"].get("value")
        if (now := _in_page(node, at)) == spot:
            if cover is not None:
                raise node.not_ready(f"is covered by {cover}")
            return spot
        spot = now
    raise node.not_ready("does not stand still")


def _in_page(node: Node, at: dict[str, Any]) -> tuple[float, float]:
    """Return the place in the page of one in an iframe."""
    tab, timeout = node.tab, node.timeout
    left, top, width, height = at["page"]
    root = node.function(scripts.ROOT, by_value=False)["objectId"]
    # Relative to the viewport of the session's own root, whatever iframes of its process are between.
    quad = tab.cdp("DOM.getBoxModel", node.session, objectId=root, timeout=timeout)["model"]["border"]
    x = quad[0] + (at["x"] - left) * ((quad[2] - quad[0]) / width if width else 1)
    y = quad[1] + (at["y"] - top) * ((quad[5] - quad[1]) / height if height else 1)
    for owner in node.owners:
        number, session = owner["backendNodeId"], owner["session_id"]
        quad = tab.cdp("DOM.getBoxModel", session, backendNodeId=number, timeout=timeout)["model"]["content"]
        x, y = x + quad[0], y + quad[1]
    return x, y
