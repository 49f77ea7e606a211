"""Finding elements by what a user knows of them."""

from __future__ import annotations

from . import TIMEOUT
from .arguments import check_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .tab import Tab


def find(
    tab: Tab,
    *,
    role: str | None = None,
    name: str | None = None,
    text: str | None = None,
    label: str | None = None,
    placeholder: str | None = None,
    test_id: str | None = None,
    exact: bool = False,
    timeout: float = TIMEOUT,
) -> list[str]:
    """Return the references of the elements that fit all that is given, in their order on the page, iframes included.

    ```python
    find(role="button", name="Save")
    fill_input(find(label="Password")[0], secret)
    ```

    `role` and `name` are the accessible ones, as `snapshot` shows them; `text` is for the smallest elements that have it in
    them, `label` for what a label, aria-label or aria-labelledby names, `test_id` for the attribute data-testid. Texts fit if
    they have what is given in them, whatever its case, and with `exact` if they are the same; test_id is always exact.
    """
    given = {"role": role, "name": name, "text": text, "label": label, "placeholder": placeholder, "test_id": test_id}
    criteria = {kind: wanted for kind, wanted in given.items() if wanted is not None}
    if not criteria:
        raise TypeError("find() takes a role, a name, a text, a label, a placeholder or a test_id, or several of them")
    for kind, wanted in criteria.items():
        check_text("find", kind, wanted)
    reply = tab.request({"meta": "find", "criteria": criteria, "exact": exact}, timeout=timeout)
    return list(reply["references"])
