"""Addresses of browsers: which part is shown, reasons of servers, and proxies."""

from __future__ import annotations

import pytest

from harness_ipc.browser.addresses import (
    UnusableProxy,
    address_of,
    find_proxy,
    is_local,
    make_url,
    quote_reason,
    with_host,
    without_secret,
)

REMOTE = "ws://browser.example:9222/devtools/browser/0a1b"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("all", "http", "https", "no", "socks", "ws", "wss"):
        for variable in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:1", True),
        ("ws://127.0.0.2/x", True),
        ("http://[::1]:9222", True),
        ("http://a.b.LocalHost.:9222", True),
        ("http://localhost.example", False),
        (REMOTE, False),
        ("http://[", False),
    ],
)
def test_loopback_addresses_are_local(url: str, local: bool) -> None:
    assert is_local(url) is local


def test_parts_of_an_address() -> None:
    assert address_of("wss://a.example/x") == ("a.example", 443)
    assert address_of("http://[::1]:9222") == ("::1", 9222)
    assert address_of("http://a:b:c") == ("", 0)
    assert make_url("ws", "::1", 9222, "/x") == "ws://[::1]:9222/x"
    assert with_host("http://me:word@name:9222/x?y", "192.0.2.1") == "http://me:word@192.0.2.1:9222/x?y"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("wss://me:word@a.example:1/token?key=1", "wss://a.example:1"),
        ("http://[::1]/x", "http://[::1]"),
        ("nothing", "the address"),
        ("http://a:b:c", "the address"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secret(url) == shown


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        (b"Host header is\n specified", ": Host header is specified"),
        (b"", ""),
        (b"<html>", ""),
        (b'{"a": 1}', ""),
        (b"x" * 201, ""),
        (b"no \x1b[31m red", ""),
        (b"no browser 0a1b", ""),
    ],
)
def test_a_servers_plain_text_reason_is_quoted_without_secrets(body: bytes, quoted: str) -> None:
    assert quote_reason(body, REMOTE) == quoted


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "ws_proxy"])
def test_a_proxy_is_used_only_for_remote_addresses(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_proxy(REMOTE) is None
    monkeypatch.setenv(variable, "proxy.example:3128")
    assert find_proxy(REMOTE) == "http://proxy.example:3128"
    assert find_proxy("ws://127.0.0.1:9222/x") is None
    monkeypatch.setenv("no_proxy", "browser.example")
    assert find_proxy(REMOTE) is None


@pytest.mark.parametrize(
    ("variable", "proxy", "problem"),
    [
        ("http_proxy", "http://:3128", "it has no host, or no port"),
        ("http_proxy", "http://me@proxy.example:3128", "a proxy may have only a host, a port, a user and a password"),
        ("http_proxy", "http://proxy.example:word", "its port is not a number"),
        ("http_proxy", "ftp://proxy.example:1", "its scheme ftp is not http, https, socks4 or socks5"),
    ],
)
def test_an_unusable_proxy_is_an_error(variable: str, proxy: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(
        UnusableProxy, match=f"of {variable} can't be used: {problem}; change {variable}, or add browser.example"
    ):
        find_proxy(REMOTE)


def test_only_a_websocket_goes_through_socks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("socks_proxy", "http://proxy.example:1080")
    with pytest.raises(UnusableProxy, match="only a WebSocket goes through a SOCKS proxy: set BU_CDP_WS"):
        find_proxy("http://browser.example:9222")
