"""Dialogs (alert, confirm, prompt, beforeunload), which block the page until they are answered, and logins."""

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
    """Ignore `DialogOpen` in the block, unless the dialog kept the request from running."""
    try:
        yield
    except DialogOpen as error:
        if not error.data.get("ran"):
            raise


def handle_dialog(tab: Tab, accept: bool = True, text: str | None = None, *, timeout: float = TIMEOUT) -> None:
    """Accept or dismiss the dialog that blocks the page. A prompt is answered with `text`, by default with its default text.

    Raises `CDPError` if there is no dialog, and `ValueError` if the default has more than 16,384 characters: pass `text` then.
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
    """Answer the login that a server or a proxy requires of this tab (status 401 or 407, shown by `page_info`).

    The refused page is reloaded; use `wait_for_load` to wait for it. A refused `fetch` is not repeated: the login is used for
    the next one. With `origin`, such as ``"https://example.org"``, the login is kept for when that server asks. The daemon
    keeps it until the tab is closed or the login is refused; after its first use, the browser sends it by itself.

    Raises `LoginFailed` if the page asks again, and `CDPError` without `origin` if nothing has asked.
    """
    message = {"meta": "handle_login", "user": user, "password": password, "origin": origin}
    tab.request(message, timeout=timeout)
