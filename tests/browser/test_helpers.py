"""The helpers in a page of a real browser: page information and input."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness_ipc import connect_daemon
from harness_ipc.browser import daemon_name
from harness_ipc.browser.helpers import (
    BrowserTimeout,
    CDPError,
    ElementNotFound,
    cdp,
    click_at_xy,
    dispatch_key,
    goto_url,
    js,
    page_info,
    press_key,
    scroll,
    switch_tab,
    type_text,
    wait,
    wait_for_load,
)
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE, wait_until

pytestmark = needs_chromium

ALT, CONTROL, META, SHIFT = 1, 2, 4, 8
# Positions: the field and the button of /form, the text of /keys.
FIELD, SEND, TEXT = (100, 35), (100, 100), (150, 50)


def serves() -> bool:
    return bool(js("6 * 7", timeout=PATIENCE) == 42)


# Page information and loading.


def test_page_info_has_values_of_the_page(page: str, site: Site) -> None:
    cdp("Emulation.setDeviceMetricsOverride", width=800, height=600, deviceScaleFactor=1, mobile=False)
    visit(f"{site.url}/form?a=1#b")
    js("document.body.style.width = '2000px'")
    page_size = js("({pw: document.documentElement.scrollWidth, ph: document.documentElement.scrollHeight})")
    assert page_size["pw"] >= 2000
    assert page_size["ph"] >= 3000
    here = {"url": f"{site.url}/form?a=1#b", "title": "A form", "w": 800, "h": 600, **page_size}
    assert page_info() == {**here, "sx": 0, "sy": 0}
    scroll(400, 300, dy=500)
    wait_until(lambda: page_info() == {**here, "sx": 0, "sy": 500})
    scroll(400, 300, dy=-200, dx=100)
    wait_until(lambda: page_info() == {**here, "sx": 100, "sy": 300})
    assert js("[scrollX, scrollY]") == [100, 300]


def test_an_address_at_which_nobody_listens(page: str, site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(CDPError, match=r"127\.0\.0\.1:\d+/ can't be loaded: net::ERR_CONNECTION_REFUSED"):
            goto_url(f"http://127.0.0.1:{taken.getsockname()[1]}/")
    visit(f"{site.url}/")
    assert page_info()["title"] == "Home"


def test_a_download_does_not_change_the_page(page: str, site: Site) -> None:
    visit(f"{site.url}/")
    assert goto_url("data:application/octet-stream,bytes")["isDownload"] is True
    assert page_info()["title"] == "Home"


def test_a_page_that_is_late(page: str, slow: Site) -> None:
    visit(f"{slow.url}/")
    with pytest.raises(BrowserTimeout, match=r"Page\.navigate") as caught:
        goto_url(f"{slow.url}/slow", timeout=1)
    assert isinstance(caught.value, TimeoutError)
    assert page_info()["title"] == "Home"
    slow.release.set()
    visit(f"{slow.url}/slow")
    assert page_info()["title"] == "Late"


@contextlib.contextmanager
def once_it_waits(session: str, act: Callable[[Callable[[str], Any]], object]) -> Iterator[None]:
    """In another process, call `act(evaluate)` once a wait for the page of `session` has begun."""

    def run() -> None:
        with connect_daemon(daemon_name()) as other:

            def evaluate(expression: str) -> Any:
                params = {"expression": expression, "includeCommandLineAPI": True}
                request = {"method": "Runtime.evaluate", "session_id": session, "params": params}
                return other.request(request)["result"]["result"].get("value")

            wait_until(lambda: evaluate("(getEventListeners(document).readystatechange ?? []).length") > 0)
            act(evaluate)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run)
        yield
        done.result()


def test_a_picture_that_never_comes(page: str, slow: Site) -> None:
    goto_url(f"{slow.url}/picture")
    assert wait_for_load(1) is False
    assert wait_for_load(0) is False
    assert js("document.readyState") == "interactive"


def test_a_picture_that_comes_meanwhile(page: str, slow: Site) -> None:
    goto_url(f"{slow.url}/picture")
    with once_it_waits(switch_tab(page), lambda _: slow.release.set()):
        assert wait_for_load(PATIENCE) is True
    assert js("document.readyState") == "complete"


def test_a_wait_for_load_includes_the_next_page(page: str, slow: Site) -> None:
    goto_url(f"{slow.url}/picture")
    with once_it_waits(switch_tab(page), lambda evaluate: evaluate("location.href = '/form'")):
        assert wait_for_load(PATIENCE) is True
    assert page_info()["title"] == "A form"


def test_wait_takes_the_given_time() -> None:
    begun = time.monotonic()
    wait(0.25)
    assert time.monotonic() - begun >= 0.2


# Input.


def test_a_form_is_sent_with_the_enter_key(used_page: str, site: Site) -> None:
    visit(f"{site.url}/form")
    click_at_xy(*FIELD)
    type_text("Grüße, 日本 👩‍👩‍👧")
    press_key("!")
    press_key("Enter")
    assert js("document.title") == "sent Grüße, 日本 👩‍👩‍👧!"


def test_a_form_is_sent_with_its_button(used_page: str, site: Site) -> None:
    visit(f"{site.url}/form")
    click_at_xy(*FIELD)
    type_text("word")
    click_at_xy(*SEND)
    assert js("document.title") == "sent word"


def test_keys_edit_a_text(used_page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    click_at_xy(*TEXT)
    for key in ("a", "B", "7", "Space", "é", "🎈", "Enter", "c", "ArrowLeft", "d", "Home", "e", "End", "f"):
        press_key(key)
    assert js("document.getElementById('text').value") == "aB7 é🎈\nedcf"
    for key in ("Backspace", "ArrowUp", "Home", "g"):
        press_key(key)
    assert js("document.getElementById('text').value") == "gaB7 é🎈\nedc"
    press_key("a", META if sys.platform == "darwin" else CONTROL)
    press_key("Delete")
    assert js("document.getElementById('text').value") == ""


def test_the_tab_key_moves_the_focus(used_page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    click_at_xy(*TEXT)
    press_key("Tab")
    assert js("document.activeElement.id") == "next"
    press_key("Tab", SHIFT)
    assert js("document.activeElement.id") == "text"


def test_the_page_sees_which_key_it_is(used_page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    pressed: list[tuple[str, int, str, int]] = [
        ("a", 0, "KeyA", 65),
        ("Z", SHIFT, "KeyZ", 90),
        ("7", 0, "Digit7", 55),
        (" ", 0, "Space", 32),
        ("é", 0, "", 0),
        ("k", ALT | CONTROL | SHIFT, "KeyK", 75),
        ("k", META, "KeyK", 75),
        ("Enter", 0, "Enter", 13),
        ("Tab", 0, "Tab", 9),
        ("Backspace", 0, "Backspace", 8),
        ("Escape", 0, "Escape", 27),
        ("Delete", 0, "Delete", 46),
        ("ArrowDown", 0, "ArrowDown", 40),
        ("PageUp", 0, "PageUp", 33),
        ("F2", 0, "F2", 113),
    ]
    for key, modifiers, _, _ in pressed:
        press_key(key, modifiers)
    assert js("keys") == [
        [kind, key, code, number, modifiers] for key, modifiers, code, number in pressed for kind in ("keydown", "keyup")
    ]


@pytest.mark.parametrize(
    ("key", "modifiers", "seen"),
    [
        ("k", "ctrl", ["k", "KeyK", CONTROL]),
        ("k", ["Control", "SHIFT"], ["k", "KeyK", CONTROL | SHIFT]),
        ("k", "alt+shift", ["k", "KeyK", ALT | SHIFT]),
        ("Control+K", 0, ["K", "KeyK", CONTROL]),
        ("Shift+k", "cmd", ["k", "KeyK", META | SHIFT]),
        ("Shift+k", 0, ["K", "KeyK", SHIFT]),
        ("ControlOrMeta+k", 0, ["k", "KeyK", META if sys.platform == "darwin" else CONTROL]),
        ("+", 0, ["+", "", 0]),
        ("Control++", 0, ["+", "", CONTROL]),
        ("esc", 0, ["Escape", "Escape", 0]),
        ("Shift+Return", 0, ["Enter", "Enter", SHIFT]),
        ("down", (), ["ArrowDown", "ArrowDown", 0]),
        ("Shift", 0, ["Shift", "ShiftLeft", 0]),
    ],
)
def test_keys_and_modifiers_by_their_names(used_page: str, site: Site, key: str, modifiers: Any, seen: list[Any]) -> None:
    visit(f"{site.url}/keys")
    press_key(key, modifiers)
    assert js("keys.map(([kind, key, code, , modifiers]) => [kind, key, code, modifiers])") == [
        ["keydown", *seen],
        ["keyup", *seen],
    ]


def test_a_key_that_a_script_sends(used_page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    js("for (const kind of ['keypress', 'keydown']) next.addEventListener(kind, e => "
       "document.title = [e.type, e.key, e.code, e.keyCode, e.isTrusted, document.activeElement.id])")  # fmt: skip
    dispatch_key("#next")
    assert js("document.title") == "keypress,Enter,Enter,13,false,next"
    dispatch_key("#next", "a", "keydown")
    assert js("document.title") == "keydown,a,KeyA,65,false,next"
    with pytest.raises(ElementNotFound):
        dispatch_key("#nowhere")
    with pytest.raises(ValueError, match="event must be keydown, keypress or keyup, not 'click'"):
        dispatch_key("#next", event="click")


def test_everything_is_selected_and_replaced(used_page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    click_at_xy(*TEXT)
    type_text("before")
    press_key("ControlOrMeta+A")
    press_key("x", "shift")
    assert js("document.getElementById('text').value") == "X"


@pytest.mark.parametrize("key", ["Entre", "", "ab"])
def test_an_unknown_key(used_page: str, site: Site, key: str) -> None:
    visit(f"{site.url}/keys")
    with pytest.raises(ValueError, match="there is no key"):
        press_key(key)
    press_key("x")
    assert js("keys.map(seen => seen[1])") == ["x", "x"]


def test_the_page_sees_which_click_it_is(used_page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    click_at_xy(400, 300)
    click_at_xy(410, 310, clicks=2)
    click_at_xy(420, 320, "right")
    click_at_xy(430, 330, "middle")
    assert js("clicks") == [
        ["click", 0, 400, 300],
        ["click", 0, 410, 310],
        ["click", 0, 410, 310],
        ["dblclick", 0, 410, 310],
        ["contextmenu", 2, 420, 320],
        ["auxclick", 2, 420, 320],
        ["auxclick", 1, 430, 330],
    ]
