"""Finding elements by role, name, text, label, placeholder or test id."""

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
    """Return references of the elements that match all criteria, in document order, including iframes.

    ```python
    find(role="button", name="Save")
    fill_input(find(label="Password")[0], secret)
    ```

    `role` and `name` are the accessible role and name, as shown by `snapshot`. `text` matches the smallest elements that
    contain it, `label` elements with that label, aria-label or aria-labelledby, and `test_id` the attribute data-testid. A text
    matches if it contains the criterion, ignoring case, or with `exact` if it is equal; test_id is always exact.
    """
    given = {"role": role, "name": name, "text": text, "label": label, "placeholder": placeholder, "test_id": test_id}
    criteria = {kind: wanted for kind, wanted in given.items() if wanted is not None}
    if not criteria:
        raise TypeError("find() needs a role, name, text, label, placeholder or test_id, or several of them")
    for kind, wanted in criteria.items():
        check_text("find", kind, wanted)
    reply = tab.request({"meta": "find", "criteria": criteria, "exact": exact}, timeout=timeout)
    return list(reply["references"])
