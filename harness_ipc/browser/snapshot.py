"""The page as text: its accessibility tree, one node per line, with references."""

from __future__ import annotations

from . import TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .tab import Tab


def snapshot(tab: Tab, interactive: bool = False, *, timeout: float = TIMEOUT) -> str:
    """Return the page as text, including iframes: one node per line, with its role, name, states, reference and value.

    ```
    - heading "Sign in" [level=1] [ref=e1]
    - textbox "Name" [required] [ref=e2]: Ada
    - button "Go" [disabled] [ref=e3]
    ```

    With `interactive`, only elements that can be acted on. `click`, `fill_input` and others accept references, also in later
    commands: ``click("e3")``. A node keeps its reference as long as it exists, and references are not reused. Names are
    truncated at 200 characters, and text at 1,000; control characters are escaped. An empty page is an empty string.
    """
    return str(tab.request({"meta": "snapshot", "interactive": bool(interactive)}, timeout=timeout)["text"])
