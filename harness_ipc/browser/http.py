"""HTTP GET without the browser, optionally with its cookies."""

from __future__ import annotations

import time

from .addresses import is_local
from .arguments import check_kind, check_seconds, check_text, check_url
from .errors import BrowserError, BrowserTimeout, HTTPError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any
    from urllib.request import OpenerDirector, Request

    from .tab import Tab

# Sent without cookies: some servers refuse clients that are not browsers.
_USER_AGENT = "Mozilla/5.0"
# Headers that must not be sent to another server after a redirect.
_SECRET = ("Authorization", "Cookie", "Proxy-authorization")
# Characters of an error response's body to keep.
_MAX_TEXT = 16 * 1024


def http_get(tab: Tab, url: str, headers: Mapping[str, str] | None = None, timeout: float = 20.0, cookies: bool = False) -> str:
    """Get `url` without the browser, and return the body as text. `timeout` is for everything, in seconds.

    ```python
    http_get("https://example.org/feed.xml")
    json.loads(http_get("https://example.org/api/me", cookies=True))
    ```

    With `cookies`, the browser's cookies for the address and its User-Agent are sent; cookies set by the server are ignored.
    The variables `http_proxy` and so on apply, but never to loopback addresses. Redirects are followed; cookies and
    Authorization are not sent to another server.

    Raises `HTTPError`, with `status` for a response of 400 or above, and without one if there is no response; and
    `BrowserTimeout`.
    """
    import http.client

    check_url("http_get", url)
    if not url.strip().lower().startswith(("http://", "https://")):
        raise ValueError("http_get(): url must begin with http:// or https://")
    check_kind("http_get", "cookies", cookies, bool, "True or False")
    check_kind("http_get", "headers", headers or {}, dict, "a dict of texts")
    for text in (one for header in (headers or {}).items() for one in header):
        check_text("http_get", "a header", text)
    check_seconds("http_get(): timeout", timeout)
    deadline = time.monotonic() + timeout
    place = url.partition("?")[0]
    try:
        request = _request(tab, url.strip(), dict(headers or {}), cookies, timeout)
        with _opener(tab, cookies, timeout).open(request, timeout=timeout) as response:
            body = _read(response, deadline)
            text = _decode(body, response.headers)
            if response.status >= 400:
                reason = f"{place} answered {response.status} {response.reason}"
                raise HTTPError(reason, status=response.status, text=text[:_MAX_TEXT])
            return text
    except BrowserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        # A redirect refused by urllib still holds its connection.
        getattr(error, "close", int)()
        cause: object = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise BrowserTimeout(f"{place} has not answered within {timeout:g} s") from None
        raise HTTPError(f"{place} can't be read: {' '.join(str(cause).split()) or type(cause).__name__}") from None


def _request(tab: Tab, url: str, headers: dict[str, str], cookies: bool, timeout: float) -> Request:
    from urllib.parse import quote, urlsplit
    from urllib.request import Request

    # Like a browser: escape invalid characters, and keep existing escapes.
    host = urlsplit(url).netloc
    if not host.isascii():
        url = url.replace(host, host.encode("idna").decode(), 1)
    url = quote(url, safe="%/:=&?~#+!$,;'@()*[]|")
    request = Request(url, headers={"Accept-Encoding": "gzip"})  # noqa: S310 - of http or https
    request.add_header("User-Agent", tab.js("navigator.userAgent", timeout=timeout) if cookies else _USER_AGENT)
    for name, value in headers.items():
        request.add_header(name, value)
    if cookies:
        _add_cookies(tab, request, timeout)
    return request


def _add_cookies(tab: Tab, request: Request, timeout: float) -> None:
    found = tab.cookies(request.full_url, timeout=timeout)
    if found and not request.has_header("Cookie"):
        request.add_unredirected_header("Cookie", "; ".join(f"{cookie['name']}={cookie['value']}" for cookie in found))


def _opener(tab: Tab, cookies: bool, timeout: float) -> OpenerDirector:
    import urllib.request

    class Redirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request: Request, *arguments: Any) -> Request | None:
            redirected = super().redirect_request(request, *arguments)
            if redirected is not None:
                if redirected.host != request.host or redirected.type != request.type:
                    for name in _SECRET:
                        redirected.remove_header(name)
                if cookies:
                    _add_cookies(tab, redirected, timeout)
            return redirected

    class Proxy(urllib.request.ProxyHandler):
        def proxy_open(self, request: Request, *arguments: Any) -> Any:
            return None if is_local(request.full_url) else super().proxy_open(request, *arguments)

    class AnyStatus(urllib.request.HTTPErrorProcessor):
        def http_response(self, request: Request, response: Any) -> Any:
            return super().http_response(request, response) if response.status in range(300, 400) else response

        https_response = http_response

    return urllib.request.build_opener(Redirect, Proxy, AnyStatus)


def _read(response: Any, deadline: float) -> bytes:
    """Read the body to its end. Raises `TimeoutError` at the deadline, and `http.client.IncompleteRead`."""
    parts = []
    while part := response.read1(65536):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    body = b"".join(parts)
    if (expected := response.headers.get("Content-Length")) is not None and len(body) < int(expected):
        raise OSError(f"the connection ended after {len(body)} of {expected} bytes")
    return body


def _decode(body: bytes, headers: Any) -> str:
    if headers.get("Content-Encoding") == "gzip":
        import gzip
        import zlib

        try:
            body = gzip.decompress(body)
        except (EOFError, zlib.error) as error:
            raise OSError(f"its body is not valid gzip: {error}") from None
    try:
        return body.decode(headers.get_content_charset() or "utf-8", errors="replace")
    except LookupError:
        return body.decode("utf-8", errors="replace")
