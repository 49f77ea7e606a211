"""What asks a page's user: dialogs (alert, confirm, prompt, beforeunload), which hold the page until then, and logins."""

from __future__ import annotations

import contextlib

from . import MAX_TEXT, TIMEOUT
from .arguments import check_kind, check_text
from .errors import DialogOpen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .tab import Tab


@contextlib.contextmanager
def may_open_dialog() -> Iterator[None]:
    """Take a dialog that opens within for a part of what was asked for, but not one that has kept it from being done."""
    try:
        yield
    except DialogOpen as error:
        if not error.data.get("ran"):
            raise


def handle_dialog(tab: Tab, accept: bool = True, text: str | None = None, *, timeout: float = TIMEOUT) -> None:
    """Answer the dialog that holds the page: accept or dismiss it. A prompt is answered with `text`, else with its default.

    Raises `CDPError` if there is none, and `ValueError` if the default has more than 16,384 characters: give `text` then.
    """
    check_kind("handle_dialog", "accept", accept, bool, "True or False")
    if text is not None:
        check_text("handle_dialog", "text", text)
    if accept and text is None:
        text = (tab.request({"meta": "pending_dialog"}, timeout=timeout)["dialog"] or {}).get("defaultPrompt")
        if text is not None and len(text) > MAX_TEXT:
            raise ValueError(f"only {MAX_TEXT} characters of the prompt's default are kept: answer it with text=")
    params: dict[str, Any] = {"accept": accept}
    if text is not None:
        params["promptText"] = text
    tab.cdp("Page.handleJavaScriptDialog", timeout=timeout, **params)


def handle_login(tab: Tab, user: str, password: str, *, origin: str | None = None, timeout: float = TIMEOUT) -> None:
    """Log in where a server or a proxy has asked this tab for it (401 and 407, told by `page_info`).

    The page that was refused is loaded again; `wait_for_load` waits for all of it. Where it was a `fetch` of the page, its next
    one is answered. With `origin`, such as ``"https://example.org"``, the login is for when that asks. The daemon keeps it
    until the tab is closed or the login refused; the browser itself sends it from then on.

    Raises `LoginFailed` if the page asks again, and `CDPError` if nothing has asked and there is no `origin`.
    """
    message = {"meta": "handle_login", "user": user, "password": password, "origin": origin}
    tab.request(message, timeout=timeout)
