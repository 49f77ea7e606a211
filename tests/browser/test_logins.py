"""HTTP logins: challenges and answers."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from harness_ipc.browser.errors import CDPError, LoginFailed
from harness_ipc.browser.helpers import (
    cdp,
    drain_events,
    handle_login,
    js,
    page_info,
    switch_tab,
    wait_for_load,
)
from tests.browser.site import LOGIN, LocalServer, Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE, wait_until

pytestmark = needs_chromium

FETCH = "fetch('/private/api').then(reply => reply.status)"


@pytest.fixture
def alone(warm: Path) -> Iterator[None]:
    """A tab in its own context: the browser remembers the logins of a context."""
    context = cdp("Target.createBrowserContext")["browserContextId"]
    target = cdp("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
    switch_tab(target)
    yield
    cdp("Target.disposeBrowserContext", browserContextId=context)


@pytest.mark.usefixtures("alone")
def test_a_fetch_gets_its_401(site: Site) -> None:
    visit(site.url)
    drain_events()
    assert js(FETCH, timeout=PATIENCE) == 401
    assert "login" not in page_info()
    # The daemon's own interception is invisible to clients.
    assert [event["method"] for event in drain_events() if event["method"].startswith("Fetch.")] == []
    handle_login("Ada", "secret")
    assert js(FETCH, timeout=PATIENCE) == 200


@pytest.mark.usefixtures("alone")
def test_a_page_that_requires_a_login_is_reported(site: Site) -> None:
    visit(f"{site.url}/private")
    login = {"origin": site.url, "realm": "/private", "scheme": "basic", "source": "Server"}
    assert page_info()["login"].items() >= login.items()
    handle_login("Ada", "secret", timeout=PATIENCE)
    assert wait_for_load(PATIENCE)
    assert (page_info()["title"], "login" in page_info()) == ("Private", False)


@pytest.mark.usefixtures("alone")
def test_a_login_that_is_refused_is_an_error(site: Site) -> None:
    visit(f"{site.url}/private")
    with pytest.raises(LoginFailed, match="refused the user and the password"):
        handle_login("Ada", "wrong", timeout=PATIENCE)
    handle_login("Ada", "secret", timeout=PATIENCE)
    assert wait_for_load(PATIENCE)
    assert page_info()["title"] == "Private"


@pytest.mark.usefixtures("alone")
def test_a_login_may_be_given_before_it_is_asked_for(site: Site) -> None:
    with pytest.raises(CDPError, match="nothing in this tab requires a login"):
        handle_login("Ada", "secret")
    handle_login("Ada", "secret", origin=site.url)
    visit(f"{site.url}/private")
    assert page_info()["title"] == "Private"


@pytest.mark.usefixtures("alone")
def test_a_login_goes_to_the_origin_that_it_is_for(site: Site) -> None:
    handle_login("Ada", "secret", origin=site.url)
    visit(f"{site.other_url}/private")
    assert page_info()["login"]["origin"] == site.other_url


@pytest.mark.usefixtures("page")
def test_requests_that_a_client_intercepts_are_its_own(site: Site) -> None:
    visit(site.url)
    cdp("Fetch.enable", patterns=[{"urlPattern": "*/form"}])
    drain_events()
    js("window.answer = fetch('/form').then(reply => reply.text()); 0")
    seen: list[str] = []

    def is_paused() -> bool:
        seen.extend(event["params"]["requestId"] for event in drain_events() if event["method"] == "Fetch.requestPaused")
        return bool(seen)

    wait_until(is_paused)
    cdp("Fetch.fulfillRequest", requestId=seen[0], responseCode=200, body="")
    assert js("window.answer", timeout=PATIENCE) == ""


@pytest.mark.usefixtures("page")
def test_a_proxy_asks_for_a_login() -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Proxy-Authorization"] == LOGIN
            body = b"<!doctype html><title>Through</title>" if known else b"<!doctype html><title>Stop</title>"
            self.send_response(200 if known else 407)
            if not known:
                self.send_header("Proxy-Authenticate", 'Basic realm="the proxy"')
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    proxy = LocalServer()
    proxy.serve(Proxy)
    try:
        context = cdp("Target.createBrowserContext", proxyServer=proxy.url)["browserContextId"]
        switch_tab(cdp("Target.createTarget", url="about:blank", browserContextId=context)["targetId"])
        visit("http://harness.invalid/")
        login = page_info()["login"]
        assert (login["origin"], login["realm"], login["source"]) == (proxy.url, "the proxy", "Proxy")
        with pytest.raises(LoginFailed, match="refused the user and the password"):
            handle_login("Ada", "wrong", timeout=PATIENCE)
        handle_login("Ada", "secret", timeout=PATIENCE)
        assert wait_for_load(PATIENCE)
        assert (page_info()["title"], "login" in page_info()) == ("Through", False)
    finally:
        proxy.close()
