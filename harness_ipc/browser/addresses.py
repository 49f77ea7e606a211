"""Addresses of browsers: which part may be shown, whether it is local, and its proxy. No I/O."""

from __future__ import annotations

import ipaddress
import urllib.request
from importlib.util import find_spec
from urllib.parse import urlsplit, urlunsplit

# The limit of a quoted reason in characters.
_MAX_QUOTE = 200
# Shorter parts of an address are not secret.
_MIN_SECRET = 4


class UnusableProxy(ValueError):
    """The environment names an unusable proxy. The text says which, why, and what to do."""


def is_local(url: str) -> bool:
    """Return whether the host of `url` is a literal loopback address, localhost or a name below it (RFC 6761)."""
    host = address_of(url)[0].removesuffix(".")
    try:
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(url: str) -> tuple[str, int]:
    """Return the host and port of `url`, or ``("", 0)`` if it is invalid."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or (443 if parts.scheme in ("https", "wss") else 80)
    except ValueError:
        return "", 0


def make_url(scheme: str, host: str, port: int, path: str = "") -> str:
    """Return a URL; `path` is empty or begins with a slash."""
    return f"{scheme}://{_bracketed(host)}:{port}{path}"


def with_host(url: str, host: str) -> str:
    """Return `url` with another host, and the same user, password and port."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    port = "" if parts.port is None else f":{parts.port}"
    return urlunsplit(parts._replace(netloc=f"{user}{at}{_bracketed(host)}{port}"))


def without_secret(url: str) -> str:
    """Return the scheme, host and port of `url`: the rest may be a secret that gives access to the browser."""
    try:
        parts = urlsplit(url)
        if not parts.hostname:
            return "the address"
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{_bracketed(parts.hostname)}{port}"
    except ValueError:
        return "the address"


def quote_reason(body: bytes | bytearray, url: str) -> str:
    """Return ``": "`` and the reason in a plain-text response of the server of `url`, or an empty string."""
    text = " ".join(body.decode("utf-8", "replace").split())
    parts = urlsplit(url)
    secrets = {*parts.path.split("/"), *parts.query.split("&"), parts.query.partition("=")[2], parts.username, parts.password}
    if not text or len(text) > _MAX_QUOTE or text[0] in "<{[" or not text.isprintable():
        return ""
    if any(secret in text for secret in secrets if secret and len(secret) >= _MIN_SECRET):
        return ""
    return f": {text}"


def find_proxy(url: str) -> str | None:
    """Return the proxy in the environment or the system's settings for `url`; None for loopback. Raises `UnusableProxy`."""
    host, port = address_of(url)
    scheme = urlsplit(url).scheme
    if is_local(url) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    # For a WebSocket in the order of `websockets` (RFC 6455, 4.1).
    kinds = {"ws": ("ws", "socks", "https", "http", "all"), "wss": ("wss", "socks", "https", "all")}
    proxies = urllib.request.getproxies()
    kind = next((kind for kind in kinds.get(scheme, (scheme, "socks", "all")) if proxies.get(kind)), None)
    if kind is None:
        return None
    proxy = proxies[kind]
    if kind == "socks" and proxy.startswith("http://"):
        # Some systems put http:// before another scheme.
        proxy = proxy.removeprefix("http://")
    if "://" not in proxy:
        proxy = f"{'socks5h' if kind == 'socks' else 'http'}://{proxy}"
    if (problem := _find_problem(proxy, scheme)) is not None:
        text = f"the proxy {without_secret(proxy)} of {kind}_proxy can't be used: {problem}"
        raise UnusableProxy(f"{text}; change {kind}_proxy, or add {host} to no_proxy")
    return proxy


def _find_problem(proxy: str, scheme: str) -> str | None:
    try:
        parts = urlsplit(proxy)
        if not parts.hostname or parts.port == 0:
            return "it has no host, or no port"
        if (parts.username is None) is not (parts.password is None) or parts.path not in ("", "/") or parts.query:
            return "a proxy may have only a host, a port, a user and a password"
    except ValueError:
        return "its port is not a number"
    if parts.scheme in ("http", "https"):
        return None
    if parts.scheme not in ("socks4", "socks4a", "socks5", "socks5h"):
        return f"its scheme {parts.scheme} is not http, https, socks4 or socks5"
    if scheme not in ("ws", "wss"):
        return "only a WebSocket goes through a SOCKS proxy: set BU_CDP_WS"
    return None if find_spec("python_socks") else "SOCKS needs the package python-socks"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
