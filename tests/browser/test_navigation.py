"""Waits in a real browser: for navigations and requests that a click, a key or a script has begun, not for others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import connect_daemon
from harness_ipc.browser import daemon_name
from harness_ipc.browser.helpers import (
    CDPError,
    DialogOpen,
    InvalidArgument,
    NavigationOvertaken,
    TabClosed,
    click,
    click_at_xy,
    goto_url,
    handle_dialog,
    iframe_target,
    js,
    page_info,
    press_key,
    switch_tab,
    wait_for_element,
    wait_for_load,
    wait_for_network_idle,
    wait_for_url,
)
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE, wait_until

pytestmark = needs_chromium

# Positions in /start.
FIELD, SEND, LINK, OPEN, NOTHING = (100, 20), (100, 80), (100, 140), (100, 200), (100, 260)


def serves() -> bool:
    return bool(js("6 * 7", timeout=PATIENCE) == 42)


def press_enter() -> None:
    click_at_xy(*FIELD)
    press_key("Enter")


@contextlib.contextmanager
def in_thread(act: Callable[..., Any], *arguments: Any) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(act, *arguments)


def call_in(session: str, method: str, **params: Any) -> None:
    """In another process, call a method of CDP in the page of `session`."""
    with connect_daemon(daemon_name(), request_timeout=PATIENCE) as other:
        other.request({"method": method, "session_id": session, "params": params})


# Navigations.


@pytest.mark.parametrize(
    ("begin", "path"),
    [
        (lambda: click_at_xy(*SEND), "/slow-answer"),
        (press_enter, "/slow-answer"),
        (lambda: click_at_xy(*LINK), "/slow-link"),
        (lambda: js("document.forms[0].submit()"), "/slow-answer"),
        (lambda: js("location.href = '/slow'"), "/slow"),
        (lambda: js("setTimeout(() => location.href = '/slow')"), "/slow"),
    ],
    ids=["click", "key", "link", "submit", "location", "timer"],
)
def test_a_wait_includes_navigations_started_before(used_page: str, slow: Site, begin: Callable[[], Any], path: str) -> None:
    visit(f"{slow.url}/start")
    begin()
    with in_thread(wait_for_load, PATIENCE) as waiting:
        wait_until(lambda: path in slow.paths)
        assert not waiting.done()
        slow.release.set()
        assert waiting.result() is True
    assert page_info()["title"] == "Late"


def test_a_click_and_a_wait_again_and_again(used_page: str, site: Site) -> None:
    for _ in range(5):
        visit(f"{site.url}/start")
        js("document.forms[0].action = '/form'")
        click_at_xy(*SEND)
        assert wait_for_load(PATIENCE) is True
        assert js("document.title") == "A form"


def test_a_page_that_leads_on_at_once(used_page: str, site: Site) -> None:
    for _ in range(3):
        visit(f"{site.url}/refresh")
        assert page_info()["title"] == "A form"


@pytest.mark.parametrize(
    "act",
    [
        lambda: js("location.hash = 'there'"),
        lambda: js("history.pushState(0, '', '/elsewhere')"),
        lambda: js("location.href = '/empty'"),
        lambda: js("location.href = '/endless'"),
        lambda: js("location.href = '/slow'; setTimeout(stop, 50)"),
        lambda: js("location.href = 'javascript:void 0'"),
        lambda: click_at_xy(*NOTHING),
        lambda: click_at_xy(*OPEN),
    ],
    ids=["fragment", "history", "no content", "download", "stopped", "javascript", "javascript link", "new tab"],
)
def test_a_navigation_without_a_document_is_not_awaited(page: str, slow: Site, act: Callable[[], Any]) -> None:
    visit(f"{slow.url}/start")
    act()
    assert wait_for_load(PATIENCE) is True
    assert js("document.title") == "Start"


def test_a_page_that_replaces_settimeout(page: str, site: Site) -> None:
    visit(f"{site.url}/start")
    js("window.setTimeout = () => 0")
    assert wait_for_load(PATIENCE) is True


def test_a_navigation_that_another_overtakes(page: str, slow: Site) -> None:
    visit(f"{slow.url}/start")
    with in_thread(goto_url, f"{slow.url}/slow") as going:
        wait_until(lambda: "/slow" in slow.paths)
        call_in(switch_tab(page), "Page.navigate", url=f"{slow.url}/form")
        with pytest.raises(NavigationOvertaken, match=r"/slow.* was not loaded: the page went to .*/form") as caught:
            going.result()
    assert caught.value.data["url"] == f"{slow.url}/form"
    assert wait_for_load(PATIENCE) is True
    assert page_info()["title"] == "A form"


def test_an_answer_without_content_is_not_overtaken(page: str, site: Site) -> None:
    visit(f"{site.url}/start")
    with pytest.raises(CDPError, match="net::ERR_ABORTED"):
        goto_url(f"{site.url}/empty")
    assert page_info()["title"] == "Start"


# Elements.

LATER = "document.body.insertAdjacentHTML('beforeend', `<p id=late>It is here</p>`)"


@pytest.mark.parametrize("selector", ["#late", "//p[.='It is here']"])
def test_an_element_that_comes(used_page: str, site: Site, selector: str) -> None:
    visit(f"{site.url}/")
    assert wait_for_element(selector, timeout=0.2) is False
    js(f"setTimeout(() => {LATER}, 50)")
    assert wait_for_element(selector, timeout=PATIENCE) is True
    assert js("document.querySelector('#late').textContent") == "It is here"


def test_an_element_that_becomes_visible(used_page: str, site: Site) -> None:
    visit(f"{site.url}/")
    js(f"{LATER}; document.head.insertAdjacentHTML('beforeend', '<style id=hides>#late {{display: none}}</style>')")
    assert wait_for_element("#late", timeout=PATIENCE) is True
    assert wait_for_element("#late", visible=True, timeout=0.2) is False
    # Without a mutation of the document.
    js("setTimeout(() => hides.sheet.disabled = true, 50)")
    assert wait_for_element("#late", visible=True, timeout=PATIENCE) is True


def test_an_element_in_a_shadow_root(used_page: str, site: Site) -> None:
    visit(f"{site.url}/")
    js("window.root = document.body.attachShadow({mode: 'open'}); setTimeout(() => root.innerHTML = '<i id=deep>', 50)")
    assert wait_for_element("#deep", timeout=PATIENCE) is True


def test_an_element_of_the_next_document(used_page: str, slow: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(slow.pages, "/slow-next", "<title>Next</title><p id=next>")
    visit(f"{slow.url}/start")
    js("setTimeout(() => location.href = '/slow-next', 50)")
    with in_thread(lambda: wait_for_element("#next", timeout=PATIENCE)) as waiting:
        wait_until(lambda: "/slow-next" in slow.paths)
        assert not waiting.done()
        slow.release.set()
        assert waiting.result() is True
    assert page_info()["title"] == "Next"


def test_an_element_that_both_documents_have(used_page: str, site: Site) -> None:
    visit(f"{site.url}/start")
    js("document.forms[0].action = '/form'")
    click_at_xy(*SEND)
    assert wait_for_element("form", timeout=PATIENCE) is True
    assert js("location.pathname") == "/form"


def test_an_invalid_selector(empty_page: str, site: Site) -> None:
    with pytest.raises(InvalidArgument, match="not a valid selector"):
        wait_for_element("p[", timeout=PATIENCE)
    with pytest.raises(TypeError, match=r"wait_for_element\(\): selector must be str"):
        wait_for_element(5)  # type: ignore[arg-type]


# Addresses.


@pytest.mark.parametrize("pattern", ["/orders/7", "**/orders/*", "http://127.0.0.1:*/orders/7"])
def test_an_address_that_a_script_changes(used_page: str, site: Site, pattern: str) -> None:
    visit(f"{site.url}/start")
    assert wait_for_url(pattern, timeout=0.2) is False
    js("setTimeout(() => history.pushState(0, '', '/orders/7'), 50)")
    assert wait_for_url(pattern, timeout=PATIENCE) is True


def test_the_address_of_the_next_document(used_page: str, slow: Site) -> None:
    visit(f"{slow.url}/start")
    click_at_xy(*LINK)
    with in_thread(lambda: wait_for_url("*://*/slow-link", timeout=PATIENCE)) as waiting:
        wait_until(lambda: "/slow-link" in slow.paths)
        assert not waiting.done()
        slow.release.set()
        assert waiting.result() is True
    assert js("location.pathname") == "/slow-link"


# The network.


def test_requests_that_are_under_way(used_page: str, slow: Site) -> None:
    visit(f"{slow.url}/start")
    js("void fetch('/slow-answer').then(() => document.title = 'Answered')")
    assert wait_for_network_idle(0, timeout=0.2) is False
    with in_thread(lambda: wait_for_network_idle(0.1, timeout=PATIENCE)) as waiting:
        wait_until(lambda: "/slow-answer" in slow.paths)
        assert not waiting.done()
        slow.release.set()
        assert waiting.result() is True
    assert js("document.title") == "Answered"


@pytest.mark.parametrize(
    "act",
    [
        "new EventSource('/slow-events')",
        "new WebSocket(`ws://${location.host}/slow-socket`)",
        "void fetch('/slow-answer', {signal: AbortSignal.timeout(50)}).catch(() => 0)",
        "location.href = '/empty'",
        "location.href = '/endless'",
        "document.body.insertAdjacentHTML('beforeend', '<iframe id=gone src=/slow>'); setTimeout(() => gone.remove(), 50)",
    ],
    ids=["events", "socket", "aborted", "no content", "download", "removed iframe"],
)
def test_requests_that_do_not_count_for_network_idle(page: str, slow: Site, act: str) -> None:
    visit(f"{slow.url}/start")
    js(act)
    assert wait_for_network_idle(0.2, timeout=PATIENCE) is True


def test_requests_of_a_document_that_was_left(page: str, slow: Site) -> None:
    visit(f"{slow.url}/start")
    js("void fetch('/slow-answer')")
    visit(f"{slow.other_url}/form")
    assert wait_for_network_idle(0.1, timeout=PATIENCE) is True


# Ends of a wait.


@pytest.mark.parametrize(
    "wait",
    [
        lambda: wait_for_element("#never", timeout=PATIENCE),
        lambda: wait_for_url("/never", timeout=PATIENCE),
        lambda: wait_for_network_idle(PATIENCE, timeout=PATIENCE),
    ],
    ids=["element", "url", "network"],
)
def test_a_dialog_ends_each_wait(used_page: str, site: Site, wait: Callable[[], bool]) -> None:
    visit(f"{site.url}/")
    js("setTimeout(() => alert('Look'), 100)")
    with pytest.raises(DialogOpen, match="Look"):
        wait()
    handle_dialog()
    assert serves()


@contextlib.contextmanager
def waiting_for_a_picture(page: str, slow: Site) -> Iterator[tuple[str, Future[Any]]]:
    """In a page that has not loaded, wait for that in a thread. Yield the session and the future."""
    goto_url(f"{slow.url}/picture")
    session = switch_tab(page)
    with in_thread(wait_for_load, PATIENCE) as waiting:
        wait_until(lambda: "/slow-picture" in slow.paths)
        yield session, waiting


def test_a_dialog_ends_the_wait(page: str, slow: Site) -> None:
    with waiting_for_a_picture(page, slow) as (session, waiting):
        call_in(session, "Runtime.evaluate", expression="setTimeout(() => alert('Look'))")
        with pytest.raises(DialogOpen, match="Look"):
            waiting.result()
    handle_dialog()
    assert serves()


def test_a_tab_that_is_closed_ends_the_wait(page: str, slow: Site) -> None:
    with waiting_for_a_picture(page, slow) as (session, waiting):
        call_in(session, "Target.closeTarget", targetId=page)
        with pytest.raises(TabClosed):
            waiting.result()
    assert serves()


def test_a_page_that_crashes_ends_the_wait(page: str, slow: Site) -> None:
    with waiting_for_a_picture(page, slow) as (session, waiting):
        call_in(session, "Page.crash")
        with pytest.raises(CDPError, match="crashed"):
            waiting.result()
    goto_url(f"{slow.url}/form")
    assert serves()


# Iframes.


def visit_iframes(site: Site) -> None:
    """Visit a page with an iframe of its own site and one of another. In both are links and forms to other documents."""
    site.pages["/linked"] = "<!doctype html><a id=on href=/slow-on>On</a>"
    site.pages["/links"] = (
        f"<!doctype html><iframe id=near name=near src=/linked?near></iframe>"
        f"<iframe id=far name=far src={site.other_url}/linked?far></iframe>"
        "<form target=near action=/slow-form><button id=send>Send</button></form>"
        + "".join(
            f"<a id={start}-{end} target={start} href={origin}/slow-{end}>Go</a>"
            for start in ("near", "far")
            for end, origin in (("near", site.url), ("far", site.other_url))
        )
    )
    visit(f"{site.url}/links")


@pytest.mark.parametrize("name", ["near", "far"])
@pytest.mark.parametrize(
    ("begin", "path"),
    [
        (lambda name: click(f"#{name}-near"), "/slow-near"),
        (lambda name: click(f"#{name}-far"), "/slow-far"),
        (lambda name: js(f"document.getElementById('{name}').src = '/slow'"), "/slow"),
        (lambda name: click("#on", frame=f"#{name}"), "/slow-on"),
        (lambda name: js("location.href = '/slow-on'", frame=f"#{name}"), "/slow-on"),
    ],
    ids=["link to near", "link to far", "src", "link inside", "script inside"],
)
def test_a_navigation_of_an_iframe_is_waited_for(
    used_page: str, slow: Site, name: str, begin: Callable[[str], Any], path: str
) -> None:
    visit_iframes(slow)
    frame = iframe_target(f"#{name}")
    begin(name)
    with in_thread(wait_for_load, PATIENCE) as waiting:
        wait_until(lambda: path in slow.paths)
        assert not waiting.done()
        slow.release.set()
        assert waiting.result() is True
    assert js("[document.title, document.readyState]", frame) == ["Late", "complete"]


def test_a_form_for_an_iframe_is_waited_for(used_page: str, slow: Site) -> None:
    visit_iframes(slow)
    click("#send")
    assert wait_for_load(timeout=0.2) is False
    slow.release.set()
    assert wait_for_load(PATIENCE) is True
    assert js("document.title", frame="#near") == "Late"


@pytest.mark.parametrize(
    "act",
    [
        lambda: js("document.querySelector('#near').src += '#there'"),
        lambda: js("document.querySelector('#near').src = '/empty'"),
        lambda: js("document.querySelector('#near').src = '/endless'"),
        lambda: js("document.querySelector('#far').src = '/empty'"),
        lambda: js("const near = document.querySelector('#near'); near.src = '/slow'; near.remove()"),
        lambda: js("const far = document.querySelector('#far'); far.src = '/slow'; far.remove()"),
        lambda: js("document.body.append(Object.assign(document.createElement('iframe'), {src: '/slow'}))"),
    ],
    ids=["same document", "no content", "download", "no content far", "removed", "removed far", "an iframe that is new"],
)
def test_an_iframe_without_a_navigation_is_not_awaited(page: str, slow: Site, act: Callable[[], Any]) -> None:
    visit_iframes(slow)
    act()
    assert wait_for_load(PATIENCE) is True
