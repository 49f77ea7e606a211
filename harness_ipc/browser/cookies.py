"""Reading and setting cookies, of the page or of the whole browser."""

from __future__ import annotations

from . import TIMEOUT
from .arguments import check_kind, check_text, check_url, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .tab import Tab

    Cookie = dict[str, Any]

# The fields of Network.CookieParam.
_FIELDS = (
    "name",
    "value",
    "url",
    "domain",
    "path",
    "secure",
    "httpOnly",
    "sameSite",
    "expires",
    "priority",
    "sourceScheme",
    "sourcePort",
    "partitionKey",
)
# The read-only fields of Network.Cookie.
_READ_ONLY = ("size", "session", "partitionKeyOpaque", "sameParty")


def cookies(tab: Tab, *urls: str, everywhere: bool = False, timeout: float = TIMEOUT) -> list[Cookie]:
    """Return the cookies for the page, for `urls`, or with `everywhere` all cookies of the tab's browser context.

    ```python
    saved = cookies(everywhere=True)
    set_cookies(saved)
    ```

    Each is a dict with name, value, domain, path, expires (seconds since 1970, -1 for the session), httpOnly, secure and
    sameSite.
    """
    for url in urls:
        check_url("cookies", url)
    check_kind("cookies", "everywhere", everywhere, bool, "True or False")
    if everywhere:
        found = tab.cdp("Network.getAllCookies", timeout=timeout)
    else:
        params: dict[str, Any] = {"urls": list(urls)} if urls else {}
        found = tab.cdp("Network.getCookies", timeout=timeout, **params)
    return list(found["cookies"])


def set_cookies(tab: Tab, cookies: Iterable[Cookie], *, timeout: float = TIMEOUT) -> None:
    """Set cookies: the result of `cookies`, or dicts with name, value and optionally domain or url, path, expires, and so on.

    Without domain and url, a cookie is for the page. Raises `CDPError` if the browser refuses one; none is set then.
    """
    if isinstance(cookies, dict | str) or not hasattr(cookies, "__iter__"):
        raise TypeError(f"set_cookies(): cookies must be a list of dicts, not {type(cookies).__name__}")
    wanted = [_checked(cookie) for cookie in cookies]
    if any("url" not in cookie and "domain" not in cookie for cookie in wanted):
        here = tab.js("location.href", timeout=timeout)
        wanted = [cookie if "url" in cookie or "domain" in cookie else {"url": here, **cookie} for cookie in wanted]
    tab.cdp("Network.setCookies", cookies=wanted, timeout=timeout)


def _checked(cookie: Any) -> Cookie:
    check_kind("set_cookies", "cookie", cookie, dict, "a dict with name and value")
    unknown = [key for key in cookie if key not in _FIELDS and key not in _READ_ONLY]
    if unknown:
        raise ValueError(f"set_cookies(): a cookie has no {shown(unknown[0])}: use {', '.join(_FIELDS)}")
    for key in ("name", "value"):
        check_text("set_cookies", key, cookie.get(key))
    # -1 means a session cookie. Network.setCookies would take it for a time in the past.
    return {key: value for key, value in cookie.items() if key in _FIELDS and (key, value) != ("expires", -1)}
