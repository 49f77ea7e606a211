"""The page and the tabs: where it is, going elsewhere, waiting for it."""

from __future__ import annotations

from . import INTERNAL, TIMEOUT
from .arguments import check_kind, check_seconds, check_text, check_url, shown
from .errors import BrowserTimeout, CDPError, DialogOpen, NavigationOvertaken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .tab import Tab

# Seconds for a page to load, as browser-harness has it.
LOAD_TIMEOUT = 15.0
# Of HTTP: the server, or the proxy, asks for a login.
_LOGIN_STATUS = (401, 407)
# What Chrome says of a navigation that was given up: for another one, a download, an answer without content.
_ABORTED = "net::ERR_ABORTED"

_PAGE = (
    "({status: performance.getEntriesByType('navigation')[0]?.responseStatus, "
    "url: location.href, title: document.title, w: innerWidth, h: innerHeight, sx: scrollX, sy: scrollY, "
    "pw: document.documentElement?.scrollWidth ?? 0, ph: document.documentElement?.scrollHeight ?? 0})"
)


def page_info(tab: Tab, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Return what the page is: url, title, viewport (w, h), scroll position (sx, sy) and page size (pw, ph), in CSS pixels.

    If a dialog holds the page, return ``{"dialog": {"type", "message", …}}`` instead: answer it with `handle_dialog`. If the
    page is what a server or a proxy answered instead of a login, ``"login"`` is what is asked for (origin, realm, scheme,
    source): answer it with `handle_login`.
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
    """Navigate the tab, and return CDP's result once the new document is there; `wait_for_load` waits for the rest of it.

    Raises `CDPError` with the browser's reason (``net::ERR_…``) if the page can't be had, `NavigationOvertaken` if another
    navigation of the tab has taken its place, `ValueError` for what has no scheme.
    """
    check_url("goto_url", url)
    try:
        result = tab.cdp("Page.navigate", url=url, timeout=timeout)
    except BrowserTimeout:
        # Chrome keeps all else of the page waiting until the navigation ends.
        tab.try_cdp("Page.stopLoading", timeout=timeout)
        raise
    # What is downloaded instead of shown is "aborted" as a page.
    if result.get("errorText") and not result.get("isDownload"):
        if result["errorText"] == _ABORTED:
            _check_overtaken(tab, url, result.get("loaderId"), timeout)
        raise CDPError(f"{url} can't be loaded: {result['errorText']}")
    # Answered once the document has taken its place: until then the tab has no address.
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
    """Wait until the page has loaded, with its images and frames. Return False if it has not after `timeout` seconds.

    A navigation that a click, a key or a script has begun just before, or that begins meanwhile, is waited for, also one of an
    iframe; one that an iframe of another site begins itself only if `click` or another function has been used in that iframe.
    Raises at once where nothing will load: `DialogOpen`, `CDPError` for a page that has crashed, `TabClosed`, `BrowserLost`.
    """
    check_seconds("wait_for_load(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_load"}, timeout)


def wait_for_element(tab: Tab, selector: str, visible: bool = False, *, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page has an element, a `visible` one if that is set. Return False if it has not after `timeout` seconds.

    `selector` is what `click` takes, in the page itself or its open shadow roots, not its iframes. In a page that navigates,
    the next document is searched. Raises what `wait_for_load` does, and `InvalidArgument` for a selector that is none.
    """
    check_text("wait_for_element", "selector", selector)
    check_kind("wait_for_element", "visible", visible, bool, "True or False")
    check_seconds("wait_for_element(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_element", "selector": selector, "visible": visible}, timeout)


def wait_for_network_idle(tab: Tab, idle: float = 0.5, *, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until no request of the page has been under way for `idle` seconds. Return False if that takes too long.

    WebSockets, EventSources and beacons are not counted, nor what iframes of other sites request. Raises what `wait_for_load`
    does.
    """
    check_seconds("wait_for_network_idle(): idle", idle)
    check_seconds("wait_for_network_idle(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_network_idle", "idle": idle}, timeout)


def wait_for_url(tab: Tab, pattern: str, *, timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page's address fits, also by a script that changes it. Return False if it does not in `timeout` seconds.

    `pattern` is a part of the address, or with ``*`` a glob of the whole: ``*`` is any text without ``/``, ``**`` any text, as
    in ``"**/orders/*"``. `wait_for_load` waits for the rest of the page. Raises what that does.
    """
    check_text("wait_for_url", "pattern", pattern)
    check_seconds("wait_for_url(): timeout", timeout)
    return _wait(tab, {"meta": "wait_for_url", "pattern": pattern}, timeout)


def _wait(tab: Tab, message: dict[str, Any], timeout: float) -> bool:
    return bool(tab.request(message, timeout=timeout)["done"])


# Tabs.


def list_tabs(tab: Tab, include_chrome: bool = True, *, timeout: float = TIMEOUT) -> list[dict[str, str]]:
    """Return the tabs, each with targetId, url and title; the browser's own pages only with `include_chrome`."""
    return [
        {"targetId": info["targetId"], "title": info.get("title", ""), "url": info.get("url", "")}
        for info in tab.cdp("Target.getTargets", timeout=timeout)["targetInfos"]
        if info["type"] == "page" and (include_chrome or not info.get("url", "").startswith(INTERNAL))
    ]


def current_tab(tab: Tab, *, timeout: float = TIMEOUT) -> dict[str, str]:
    """Return targetId, url and title of the tab that this process is in."""
    reply = tab.request({"meta": "current_tab"}, timeout=timeout)
    return {key: reply[key] for key in ("targetId", "url", "title")}


def switch_tab(tab: Tab, target: str | dict[str, str], *, activate: bool = True, timeout: float = TIMEOUT) -> str:
    """Go on in another tab, and show it unless `activate` is False. Return its session.

    A process that starts later begins there, if nobody is in it then. One with a tab name moves the name instead, and a thread
    that is not the main one has a tab of its own from then on.

    `target` is a targetId, or what `list_tabs` and `current_tab` give. Raises `TabClosed` if there is no such tab.
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
    """Open a tab, go on in it as with `switch_tab`, and return its targetId. It stays when the process ends.

    It is `isolated` if it has cookies and storage of its own, until it and the tabs that it opens are closed. In the
    `background` the browser goes on to show the tab that it shows. Raises what `goto_url` does.
    """
    check_url("new_tab", url)
    target = tab.move({"new": True, "isolated": isolated, "background": background, "switch": True}, timeout=timeout).target
    if url != "about:blank":
        # Not with its creation: then the empty document could be taken for the page.
        tab.goto_url(url, timeout=timeout)
    return target


def close_tab(tab: Tab, target: str | dict[str, str] | None = None, *, timeout: float = TIMEOUT) -> None:
    """Close a tab: the one that this process is in, if none is given. It then begins anew with its next helper.

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
    """Leave a page that is the browser's own for another, if there is one; return the tab, or None."""
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
