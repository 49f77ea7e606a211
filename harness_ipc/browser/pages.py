"""The page and the tabs: information, navigation, waiting."""

from __future__ import annotations

from . import INTERNAL, TIMEOUT
from .arguments import check_kind, check_seconds, check_text, check_url, shown
from .errors import BrowserTimeout, CDPError, DialogOpen, NavigationOvertaken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .tab import Tab

# Seconds for a page to load, as in browser-harness.
LOAD_TIMEOUT = 15.0
# HTTP statuses with which a server or a proxy requires a login.
_LOGIN_STATUS = (401, 407)
# Chrome's error for an aborted navigation: replaced by another one, a download, or a response without content.
_ABORTED = "net::ERR_ABORTED"

_PAGE = (
    "({status: performance.getEntriesByType('navigation')[0]?.responseStatus, "
    "url: location.href, title: document.title, w: innerWidth, h: innerHeight, sx: scrollX, sy: scrollY, "
    "pw: document.documentElement?.scrollWidth ?? 0, ph: document.documentElement?.scrollHeight ?? 0})"
)


def page_info(tab: Tab, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Return url, title, viewport (w, h), scroll position (sx, sy) and page size (pw, ph), in CSS pixels.

    If a dialog blocks the page, return ``{"dialog": {"type", "message", …}}`` instead: answer it with `handle_dialog`. If a
    server or a proxy requires a login, ``"login"`` has its origin, realm, scheme and source: answer it with `handle_login`.
    """
    try:
        info = dict(tab.js(_PAGE, timeout=timeout))
    except DialogOpen as error:
        return {"dialog": error.dialog}
    if info.pop("status") in _LOGIN_STATUS or info["url"].startswith("chrome-error:"):
        login = tab.request({"meta": "pending_login"}, timeout=timeout)["login"]
        if login is not None and login["document"]:
            info["login"] = login
    return info


def goto_url(tab: Tab, url: str, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Navigate the tab. Return CDP's result once the new document is committed: see `wait_for_load` for the rest.

    Raises `CDPError` with the browser's reason (``net::ERR_…``) if the page can't be loaded, `NavigationOvertaken` if another
    navigation of the tab replaced this one, and `ValueError` for a URL without a scheme.
    """
    check_url("goto_url", url)
    try:
        result = tab.cdp("Page.navigate", url=url, timeout=timeout)
    except BrowserTimeout:
        # Otherwise Chrome queues all other calls until the navigation ends.
        tab.try_cdp("Page.stopLoading", timeout=timeout)
        raise
    # A download is reported as aborted.
    if result.get("errorText") and not result.get("isDownload"):
        if result["errorText"] == _ABORTED:
            _check_overtaken(tab, url, result.get("loaderId"), timeout)
        raise CDPError(f"{url} can't be loaded: {result['errorText']}")
    # Wait until the document is committed: before that, the tab has no address.
    tab.try_cdp("Runtime.evaluate", expression="0", timeout=timeout)
    return result


def _check_overtaken(tab: Tab, url: str, loader: str | None, timeout: float) -> None:
    last = tab.request({"meta": "last_navigation"}, timeout=timeout)
    if last["url"] and last["loader_id"] != loader:
        raise NavigationOvertaken(
            f"{shown(url)} was not loaded: the page went to {shown(last['url'])} meanwhile; wait for that with wait_for_load()",
            url=last["url"],
        )


def wait_for_load(tab: Tab, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page has loaded, with its images and frames. Return False after `timeout` seconds.

    Includes a navigation that was just started by a click, a key or a script, or that starts meanwhile, also in an iframe; in a
    cross-site iframe only if `click` or another function was used in it. Raises at once if the page will not load:
    `DialogOpen`, `CDPError` for a crashed page, `TabClosed` or `BrowserLost`.
    """
    check_seconds("wait_for_load(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_load"}, timeout)


def wait_for_element(tab: Tab, selector: str, visible: bool = False, *, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page has an element that matches, and is `visible` if that is set. Return False after `timeout` seconds.

    `selector` is as for `click`; it is evaluated in the page and its open shadow roots, not in iframes. If the page navigates,
    the new document is searched. Raises what `wait_for_load` does, and `InvalidArgument` for an invalid selector.
    """
    check_text("wait_for_element", "selector", selector)
    check_kind("wait_for_element", "visible", visible, bool, "True or False")
    check_seconds("wait_for_element(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_element", "selector": selector, "visible": visible}, timeout)


def wait_for_network_idle(tab: Tab, idle: float = 0.5, *, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page has had no pending request for `idle` seconds. Return False after `timeout` seconds.

    WebSockets, EventSources, beacons and requests of cross-site iframes do not count. Raises what `wait_for_load` does.
    """
    check_seconds("wait_for_network_idle(): idle", idle)
    check_seconds("wait_for_network_idle(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_network_idle", "idle": idle}, timeout)


def wait_for_url(tab: Tab, pattern: str, *, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page's URL matches, also if a script changes it. Return False after `timeout` seconds.

    `pattern` is a part of the URL, or if it contains ``*`` a glob of the whole URL, as in ``"**/orders/*"``: ``*`` matches any
    text without ``/``, and ``**`` any text. Raises what `wait_for_load` does.
    """
    check_text("wait_for_url", "pattern", pattern)
    check_seconds("wait_for_url(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_url", "pattern": pattern}, timeout)


def _wait(tab: Tab, message: dict[str, Any], timeout: float) -> bool:
    return bool(tab.request(message, timeout=timeout)["done"])


# Tabs.


def list_tabs(tab: Tab, include_chrome: bool = True, *, timeout: float = TIMEOUT) -> list[dict[str, str]]:
    """Return the tabs, each with targetId, url and title; internal pages of the browser only with `include_chrome`."""
    return [
        {"targetId": info["targetId"], "title": info.get("title", ""), "url": info.get("url", "")}
        for info in tab.cdp("Target.getTargets", timeout=timeout)["targetInfos"]
        if info["type"] == "page" and (include_chrome or not info.get("url", "").startswith(INTERNAL))
    ]


def current_tab(tab: Tab, *, timeout: float = TIMEOUT) -> dict[str, str]:
    """Return targetId, url and title of the tab of this process."""
    reply = tab.request({"meta": "current_tab"}, timeout=timeout)
    return {key: reply[key] for key in ("targetId", "url", "title")}


def switch_tab(tab: Tab, target: str | dict[str, str], *, activate: bool = True, timeout: float = TIMEOUT) -> str:
    """Switch to another tab, and show it unless `activate` is False. Return its session.

    A process that starts later begins in this tab, if no other process is in it. A process with a tab name moves the name
    instead. A thread other than the main one has its own tab from then on.

    `target` is a targetId, or a tab as returned by `list_tabs` and `current_tab`. Raises `TabClosed` if there is none.
    """
    wanted = {"target_id": _target_id("switch_tab", target), "activate": activate, "switch": True}
    return tab.move(wanted, timeout=timeout).session


def new_tab(
    tab: Tab,
    url: str = "about:blank",
    *,
    isolated: bool = False,
    background: bool = False,
    timeout: float = TIMEOUT,
) -> str:
    """Open a tab, switch to it as with `switch_tab`, and return its targetId. It stays open when the process ends.

    An `isolated` tab has its own cookies and storage, until it and the tabs that it opens are closed. A `background` tab is not
    shown. Raises what `goto_url` does.
    """
    check_url("new_tab", url)
    target = tab.move({"new": True, "isolated": isolated, "background": background, "switch": True}, timeout=timeout).target
    if url != "about:blank":
        # Not when the tab is created: the empty document could be taken for the page.
        tab.goto_url(url, timeout=timeout)
    return target


def close_tab(tab: Tab, target: str | dict[str, str] | None = None, *, timeout: float = TIMEOUT) -> None:
    """Close a tab, by default that of this process, whose next helper then gets another one.

    Raises `CDPError` if there is no such tab.
    """
    if target is not None:
        target_id = _target_id("close_tab", target)
    else:
        target_id = tab.request({"meta": "session"}, timeout=timeout)["target_id"]
    tab.cdp("Target.closeTarget", targetId=target_id, timeout=timeout)
    if tab.place is not None and tab.place.target == target_id:
        tab.leave()


def ensure_real_tab(tab: Tab, *, timeout: float = TIMEOUT) -> dict[str, str] | None:
    """If the tab shows an internal page of the browser, switch to another tab. Return the tab, or None if there is none."""
    here = tab.current_tab(timeout=timeout)
    if not here["url"].startswith(INTERNAL):
        return here
    tabs = tab.list_tabs(include_chrome=False, timeout=timeout)
    if not tabs:
        return None
    tab.switch_tab(tabs[0], timeout=timeout)
    return tabs[0]


def _target_id(helper: str, target: str | dict[str, str]) -> str:
    found: Any = target
    if isinstance(target, dict):
        found = target.get("targetId") or target.get("target_id")
    if not isinstance(found, str) or not found:
        kind = type(target).__name__
        raise TypeError(f"{helper}(): target must be a targetId, or a tab as list_tabs() has it, not {kind}: {shown(target)}")
    return found
