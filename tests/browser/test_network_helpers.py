"""`http_get` and cookies: requests, responses and errors."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from harness_ipc.browser.helpers import (
    BrowserTimeout,
    CDPError,
    HTTPError,
    cookies,
    http_get,
    js,
    new_tab,
    set_cookies,
    switch_tab,
)
from tests.browser.site import LocalServer, Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = needs_chromium

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Server(LocalServer):
    """A server that records its requests. Each path has a status, headers and a body."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {"/": (200, {}, b"plain")}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                if self.path == "/slow":
                    server.release.wait()
                status, headers, body = server.answers.get(self.path, (200, {}, self.path.encode()))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.serve(Handler)

    def headers(self, path: str) -> dict[str, str]:
        return next(headers for asked, headers in self.seen if asked == path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    served = Server()
    yield served
    served.close()


def get(server: Server, path: str = "/", **options: Any) -> str:
    return http_get(f"{server.url}{path}", timeout=PATIENCE, **options)


def test_a_text_and_what_is_sent_for_it(server: Server) -> None:
    assert get(server) == "plain"
    assert get(server, "/a?q=1", headers={"X-Own": "mine", "User-Agent": "own"}) == "/a?q=1"
    assert "cookie" not in server.headers("/")
    assert server.headers("/")["user-agent"] == "Mozilla/5.0"
    assert (server.headers("/a?q=1")["x-own"], server.headers("/a?q=1")["user-agent"]) == ("mine", "own")


def test_texts_in_other_encodings(server: Server) -> None:
    server.answers |= {
        "/gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress("Grüße".encode())),
        "/latin": (200, {"Content-Type": "text/plain; charset=latin-1"}, "Grüße".encode("latin-1")),
        "/unknown": (200, {"Content-Type": "text/plain; charset=nothing"}, "Grüße".encode()),
        "/broken": (200, {}, b"a\xff"),
    }
    assert [get(server, path) for path in ("/gzip", "/latin", "/unknown", "/broken")] == ["Grüße", "Grüße", "Grüße", "a\ufffd"]


def test_an_address_as_a_user_writes_it(server: Server) -> None:
    assert get(server, "/a b/ü?q=é%20") == "/a%20b/%C3%BC?q=%C3%A9%20"


def test_an_answer_that_is_an_error(server: Server) -> None:
    server.answers["/gone"] = (410, {}, b"It has gone")
    with pytest.raises(HTTPError, match=r"^http://127\.0\.0\.1:\d+/gone answered 410 Gone$") as caught:
        get(server, "/gone")
    assert (caught.value.status, caught.value.text) == (410, "It has gone")
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    ("headers", "body"),
    [({"Content-Encoding": "gzip"}, b"no gzip"), ({"Content-Length": "20"}, b"short"), ({"Location": "/loop"}, b"")],
)
def test_an_answer_that_can_not_be_read(server: Server, headers: dict[str, str], body: bytes) -> None:
    server.answers["/loop"] = (302 if "Location" in headers else 200, headers, body)
    with pytest.raises(HTTPError, match=r"^http://127\.0\.0\.1:\d+/loop can't be read: ") as caught:
        get(server, "/loop")
    assert caught.value.status is None
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(HTTPError, match=r"can't be read: .*refused"):
            http_get(f"http://127.0.0.1:{taken.getsockname()[1]}/?token=secret")
    with pytest.raises(HTTPError, match=r"^http://127\.0\.0\.1:1/ can't be read: [^?]*$"):
        http_get("http://127.0.0.1:1/?token=secret")


def test_a_server_that_does_not_answer(server: Server) -> None:
    with pytest.raises(BrowserTimeout, match=r"/slow has not answered within 0\.2 s$"):
        http_get(f"{server.url}/slow", timeout=0.2)


def test_a_proxy_is_for_other_machines(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Server()
    proxy.answers["http://harness.invalid/there"] = (302, {"Location": f"{server.url}/here"}, b"")
    monkeypatch.setenv("http_proxy", proxy.url)
    assert get(server) == "plain"
    assert http_get(f"http://localhost:{server.port}/") == "plain"
    assert proxy.seen == []
    assert http_get("http://harness.invalid/there", timeout=PATIENCE) == "/here"
    assert [path for path, _ in proxy.seen] == ["http://harness.invalid/there"]
    proxy.close()


def test_the_pages_cookies_go_to_their_server_alone(page: str, site: Site, server: Server) -> None:
    visit(f"{site.url}/")
    js("document.cookie = 'seen=1; path=/'")
    other = f"http://localhost:{server.port}"
    set_cookies([{"name": "session", "value": "s3cret", "url": server.url, "httpOnly": True}])
    set_cookies([{"name": "theirs", "value": "2", "url": other}])
    server.answers["/to"] = (302, {"Location": f"{other}/end"}, b"")
    assert get(server, "/to", cookies=True, headers={"Authorization": "mine"}) == "/end"
    first, second = server.headers("/to"), server.headers("/end")
    assert (sorted(first["cookie"].split("; ")), first["authorization"]) == (["seen=1", "session=s3cret"], "mine")
    assert (second["cookie"], "authorization" in second) == ("theirs=2", False)
    assert first["user-agent"] == second["user-agent"] == js("navigator.userAgent")
    server.seen.clear()
    get(server, "/to")
    assert all("cookie" not in headers for _, headers in server.seen)


def test_cookies_are_read_and_set_again(page: str, site: Site) -> None:
    visit(f"{site.url}/")
    set_cookies(
        [
            {"name": "kept", "value": "a", "expires": 4e9, "sameSite": "Lax"},
            {"name": "hidden", "value": "b", "httpOnly": True},
            {"name": "elsewhere", "value": "c", "domain": "example.org", "path": "/a", "secure": True},
        ]
    )
    assert js("document.cookie") == "kept=a"
    saved = cookies(everywhere=True)
    assert {cookie["name"] for cookie in saved} >= {"kept", "hidden", "elsewhere"}
    assert {cookie["name"] for cookie in cookies()} == {"kept", "hidden"}
    assert [cookie["name"] for cookie in cookies("https://example.org/a/b", "https://example.org/b")] == ["elsewhere"]
    js("document.cookie = 'kept=z; max-age=0'")
    set_cookies(saved)
    again = {cookie["name"]: cookie for cookie in cookies(everywhere=True)}
    assert [again[cookie["name"]] for cookie in saved] == saved
    set_cookies([{**cookie, "expires": 1} for cookie in saved])
    assert cookies() == []


def test_an_isolated_tab_has_its_own_cookies(page: str, site: Site) -> None:
    visit(f"{site.url}/")
    set_cookies([{"name": "first", "value": "1"}])
    new_tab(f"{site.url}/", isolated=True)
    assert cookies(everywhere=True) == []
    set_cookies([{"name": "second", "value": "2"}])
    assert [cookie["name"] for cookie in cookies()] == ["second"]
    switch_tab(page)
    assert [cookie["name"] for cookie in cookies()] == ["first"]
    set_cookies([{"name": "first", "value": "1", "expires": 1}])


def test_cookies_that_can_not_be_set(page: str, site: Site) -> None:
    visit(f"{site.url}/")
    with pytest.raises(CDPError, match=r"Network\.setCookies: "):
        set_cookies([{"name": "good", "value": "1"}, {"name": "bad;", "value": "2", "domain": "no domain"}])
    assert cookies() == []


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"name": "a", "value": "b"}, TypeError, "set_cookies(): cookies must be a list of dicts, not dict"),
        (5, TypeError, "set_cookies(): cookies must be a list of dicts, not int"),
        (["a=b"], TypeError, "set_cookies(): cookie must be a dict with name and value, not str: 'a=b'"),
        ([{"name": "a"}], TypeError, "set_cookies(): value must be str, not NoneType: None"),
        ([{"name": "a", "value": "b", "max-age": 5}], ValueError, "set_cookies(): a cookie has no 'max-age': use name, value"),
    ],
)
def test_an_invalid_cookie(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        set_cookies(wrong)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": "example.org"}, "http_get(): 'example.org' is not a complete URL: add http:// or https://"),
        ({"url": "file:///etc/passwd"}, "http_get(): url must begin with http:// or https://"),
        ({"url": "http://a", "cookies": "yes"}, "http_get(): cookies must be True or False, not str: 'yes'"),
        ({"url": "http://a", "headers": "X-A: b"}, "http_get(): headers must be a dict of texts, not str: 'X-A: b'"),
        ({"url": "http://a", "headers": {"X-A": 5}}, "http_get(): a header must be str, not int: 5"),
        ({"url": "http://a", "timeout": -1}, "http_get(): timeout must be a number of seconds from 0 on, not -1"),
    ],
)
def test_an_argument_that_can_not_be_used(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        http_get(**arguments)
    assert str(caught.value) == text
