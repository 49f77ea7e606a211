"""The page as text: its accessibility tree, a line a node, with references to act on."""

from __future__ import annotations

from . import TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .tab import Tab


def snapshot(tab: Tab, interactive: bool = False, *, timeout: float = TIMEOUT) -> str:
    """Return the page as text: a line a node, with its role, name, states, reference and value, those of iframes included.

    ```
    - heading "Sign in" [level=1] [ref=e1]
    - textbox "Name" [required] [ref=e2]: Ada
    - button "Go" [disabled] [ref=e3]
    ```

    Only what can be acted on if `interactive`. `click`, `fill_input` and others take the references: ``click("e3")``, in later
    commands too. A node keeps its reference as long as it is there, and no other node of the tab gets it. Names are cut at 200
    characters, and text at 1,000; control characters are escaped. An empty page is an empty text.
    """
    return str(tab.request({"meta": "snapshot", "interactive": bool(interactive)}, timeout=timeout)["text"])
