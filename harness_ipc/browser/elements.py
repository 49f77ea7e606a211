"""Acting on elements. A target is a selector, a reference from `snapshot` or `find`, or a CDP node.

A selector is CSS, or XPath if it begins with ``//`` or ``xpath=``. It must match exactly one element, or exactly one that is
visible. If the document has no match, its open shadow roots are searched. `frame` is the iframe of a selector: an id from
`iframe_target`, a part of the iframe's URL, or a target. `ElementNotFound`, `ElementNotReady` (covered, disabled, hidden) and
`InvalidArgument` are raised before anything is done.
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

# Seconds for an element to stop moving.
_STILL_TIMEOUT = 2.0
# The number of checks until the position of an element in an iframe is stable.
_MAX_CHECKS = 20


def click(
    tab: Tab,
    target: Target,
    button: str = "left",
    clicks: int = 1,
    *,
    frame: Target | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Click an element: scroll it into view, wait until it stops moving, and check that nothing covers it.

    ```python
    click("e5")
    click("#save", clicks=2)
    click("button", frame="#payment")
    ```

    `button` is left, middle or right; two `clicks` are a double click. If an input is hidden, its label is clicked. If another
    element covers it, raises `ElementNotReady` with that; `click_at_xy` clicks without a check.
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
    """Scroll the element into view, in the page and in scrollable elements."""
    with resolve(tab, target, frame, timeout=timeout) as node:
        _scroll(node)


def fill_input(
    tab: Tab, target: Target, text: str, clear_first: bool = True, *, frame: Target | None = None, timeout: float = TIMEOUT
) -> None:
    """Replace the content of a field with `text`, or append it if `clear_first` is False, and fire input and change events.

    Frameworks such as React notice. The field is an input, a textarea, a contenteditable element, or the label of one. A date
    has the form of the input's value, "2025-12-31". Raises `ElementNotReady` if the field is disabled or read-only, and
    `InvalidArgument` if it does not accept the text, for example because of its maxlength.
    """
    if not isinstance(text, str):
        raise TypeError(f"fill_input(): text must be a str, not {type(text).__name__}")
    with resolve(tab, target, frame, timeout=timeout) as node, may_open_dialog():
        node.call(scripts.FILL, text, clear_first)


def select_option(
    tab: Tab,
    target: Target,
    *choices: str | int | list[str | int],
    frame: Target | None = None,
    timeout: float = TIMEOUT,
) -> list[str]:
    """Select an option by its value, label or index (an int), and fire input and change events.

    ```python
    select_option("#size", "Large")
    select_option("e7", "de", "fr")
    ```

    Several `choices`, or a list, are for a select with ``multiple``, and replace its selection. Returns the labels of the
    selected options. Raises `InvalidArgument`, which lists the options, if there is no match.
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
    """Choose files for a file input. The target is the input, its label, or an element that contains it.

    The input may be hidden. Its input and change events are fired. Paths are relative to the current directory of this process.
    Raises `FileNotFoundError` for a missing file.
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
    """Return the position of the element in the page's viewport, once it is in view, not moving and not covered."""
    # An invisible element may have a visible label: leave that to the script.
    with contextlib.suppress(ElementNotReady):
        _scroll(node)
    milliseconds = min(_STILL_TIMEOUT, node.timeout) * 1000
    at = node.call(scripts.PLACE, milliseconds, acting)
    if not at["framed"]:
        return at["x"], at["y"]
    spot = _in_page(node, at)
    for _ in range(_MAX_CHECKS):
        expression = f"{scripts.COVER}({spot[0]}, {spot[1]})"
        options: dict[str, Any] = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        cover = node.tab.cdp("Runtime.evaluate", timeout=node.timeout, **options)["result"].get("value")
        if (now := _in_page(node, at)) == spot:
            if cover is not None:
                raise node.not_ready(f"is covered by {cover}")
            return spot
        spot = now
    raise node.not_ready("keeps moving")


def _in_page(node: Node, at: dict[str, Any]) -> tuple[float, float]:
    """Return the position in the page of an element in an iframe."""
    tab, timeout = node.tab, node.timeout
    left, top, width, height = at["page"]
    root = node.function(scripts.ROOT, by_value=False)["objectId"]
    # Relative to the viewport of the session's root frame, even if the element is in nested iframes of the same process.
    quad = tab.cdp("DOM.getBoxModel", node.session, objectId=root, timeout=timeout)["model"]["border"]
    x = quad[0] + (at["x"] - left) * ((quad[2] - quad[0]) / width if width else 1)
    y = quad[1] + (at["y"] - top) * ((quad[5] - quad[1]) / height if height else 1)
    for owner in node.owners:
        number, session = owner["backendNodeId"], owner["session_id"]
        quad = tab.cdp("DOM.getBoxModel", session, backendNodeId=number, timeout=timeout)["model"]["content"]
        x, y = x + quad[0], y + quad[1]
    return x, y
