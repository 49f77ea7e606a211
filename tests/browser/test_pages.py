"""The helpers with dialogs, frames, screenshots, tabs and events of a real browser, and their errors."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import Client, connect_daemon
from harness_ipc.browser import daemon_name, helpers
from harness_ipc.browser.helpers import (
    BrowserTimeout,
    CDPError,
    DialogOpen,
    ElementNotFound,
    JavaScriptError,
    TabClosed,
    capture_screenshot,
    cdp,
    click_at_xy,
    close_tab,
    current_tab,
    drain_events,
    ensure_real_tab,
    find,
    goto_url,
    handle_dialog,
    iframe_target,
    js,
    list_tabs,
    new_tab,
    page_info,
    press_key,
    scroll,
    switch_tab,
    type_text,
    wait_for_load,
)
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium, needs_posix, needs_root
from tests.support.processes import PATIENCE, run_python, wait_until

pytestmark = needs_chromium

# Positions: the buttons of /dialog, the field of /leave and of /keys.
CONFIRM, PROMPT, ALERT, FIELD = (50, 25), (50, 85), (50, 145), (100, 20)


def serves() -> bool:
    return bool(js("6 * 7", timeout=PATIENCE) == 42)


# Dialogs.


@pytest.mark.parametrize(
    ("place", "kind", "message", "answer", "title"),
    [
        (CONFIRM, "confirm", "Sure?", {}, "said true"),
        (CONFIRM, "confirm", "Sure?", {"accept": False}, "said false"),
        (PROMPT, "prompt", "Who?", {"text": "Zoë 🎈"}, "Zoë 🎈"),
        (PROMPT, "prompt", "Who?", {}, "me"),
        (PROMPT, "prompt", "Who?", {"accept": False}, "null"),
        (ALERT, "alert", "Look", {}, "Asks"),
    ],
)
def test_a_click_that_opens_a_dialog(
    used_page: str, site: Site, place: tuple[int, int], kind: str, message: str, answer: dict[str, Any], title: str
) -> None:
    visit(f"{site.url}/dialog")
    click_at_xy(*place)
    dialog = page_info()["dialog"]
    assert (dialog["type"], dialog["message"]) == (kind, message)
    handle_dialog(**answer)
    assert page_info()["title"] == title


def test_a_key_that_opens_a_dialog(used_page: str, site: Site) -> None:
    visit(f"{site.url}/dialog")
    js("document.querySelector('button').focus()")
    press_key("Enter")
    assert page_info()["dialog"]["message"] == "Sure?"
    handle_dialog()
    assert page_info()["title"] == "said true"


@pytest.mark.parametrize(
    "act",
    [
        lambda: js("document.title = 'it ran'"),
        lambda: type_text("x"),
        lambda: press_key("x"),
        lambda: click_at_xy(*PROMPT),
        lambda: scroll(*PROMPT),
        lambda: capture_screenshot(),
        lambda: wait_for_load(PATIENCE),
    ],
    ids=["js", "type_text", "press_key", "click_at_xy", "scroll", "capture_screenshot", "wait_for_load"],
)
def test_nothing_runs_under_a_dialog(used_page: str, site: Site, act: Callable[[], object]) -> None:
    visit(f"{site.url}/dialog")
    click_at_xy(*ALERT)
    with pytest.raises(DialogOpen, match="alert: 'Look'") as caught:
        act()
    assert caught.value.dialog["message"] == "Look"
    assert caught.value.data["ran"] is False
    handle_dialog()
    assert page_info()["title"] == "Asks"


def test_javascript_that_opens_a_dialog_has_run(page: str) -> None:
    with pytest.raises(DialogOpen, match="alert: '1'") as caught:
        js("alert(1)")
    assert caught.value.dialog["type"] == "alert"
    assert caught.value.data["ran"] is True
    handle_dialog()
    with pytest.raises(DialogOpen):
        js("window.said = confirm('Sure?')")
    handle_dialog()
    assert js("said") is True


def test_a_dialog_that_comes_before_the_click(page: str, site: Site) -> None:
    visit(f"{site.url}/keys")
    js("document.body.onmousemove = () => alert('before')")
    with pytest.raises(DialogOpen, match="alert: 'before'") as caught:
        click_at_xy(*FIELD)
    assert caught.value.data["ran"] is False
    handle_dialog()
    assert js("clicks") == []


def test_a_prompt_of_any_length(page: str) -> None:
    for length in 16_384, 16_385, 1_000_000:
        with pytest.raises(DialogOpen, match="prompt: 'Who") as caught:
            js(f"window.said = prompt('Who?', 'x'.repeat({length}))")
        default = caught.value.dialog["defaultPrompt"]
        assert default[:16_384] == "x" * 16_384
        if length > 16_384:
            # A truncated default must not be sent as the answer.
            assert default[16_384:] == f"… ({length - 16_384} more characters were left out)"
            with pytest.raises(ValueError, match="16384 characters"):
                handle_dialog()
            handle_dialog(text="x" * length)
        else:
            handle_dialog()
        assert js("said.length") == length


def test_leaving_a_page_that_asks_first(page: str, site: Site) -> None:
    visit(f"{site.url}/leave")
    # Chrome asks only after a user gesture in the page.
    click_at_xy(*FIELD)
    press_key("x")
    with pytest.raises(DialogOpen, match="beforeunload"):
        goto_url(f"{site.url}/")
    assert page_info()["dialog"]["type"] == "beforeunload"
    handle_dialog(accept=False)
    assert page_info()["title"] == "Leave"
    with pytest.raises(DialogOpen, match="beforeunload"):
        goto_url(f"{site.url}/")
    handle_dialog()
    wait_until(lambda: page_info()["title"] == "Home")


def test_answering_without_a_dialog(empty_page: str) -> None:
    with pytest.raises(CDPError, match="No dialog is showing"):
        handle_dialog()
    assert serves()


# Frames.


@pytest.mark.parametrize("name", ["near", "far"])
def test_javascript_in_an_iframe(used_page: str, site: Site, name: str) -> None:
    visit(f"{site.url}/frames")
    here = "[location.search, document.getElementById('here').textContent]"
    frame = iframe_target(f"inner?{name}")
    assert js(here, frame) == [f"?{name}", "inside"]
    assert frame == iframe_target(f"#{name}") == iframe_target(find(role="iframe")[name == "far"])
    assert js(here, frame=f"#{name}") == js(here, frame=f"inner?{name}") == js(here, frame=frame) == [f"?{name}", "inside"]
    assert js("const n = await 6; return [n * 7, location.search]", frame) == [42, f"?{name}"]
    with pytest.raises(JavaScriptError, match="Error: in the frame"):
        js("throw new Error('in the frame')", target_id=frame)
    with pytest.raises(BrowserTimeout):
        js("for (;;);", target_id=frame, timeout=1)
    assert js("6 * 7", target_id=frame) == 42
    assert js("location.href") == f"{site.url}/frames"


def test_javascript_in_an_iframe_that_is_not_there(used_page: str, site: Site) -> None:
    visit(f"{site.url}/frames")
    assert iframe_target("nowhere") is None
    for which in ("title", "iframe"):
        with pytest.raises(ElementNotFound, match=r"is not an iframe|matches 2 elements"):
            iframe_target(which)
    with pytest.raises(ElementNotFound, match="no iframe has 'nowhere' in its URL"):
        js("1", frame="nowhere")
    with pytest.raises(CDPError, match="No target with given id"):
        js("1", target_id="nowhere")
    with pytest.raises(TypeError, match="not both"):
        js("1", "nowhere", frame="nowhere")


def test_javascript_in_an_iframe_within_an_iframe(used_page: str, site: Site) -> None:
    site.pages["/outer"] = "<iframe src=/inner?deep></iframe>"
    site.pages["/outside"] = f"<!doctype html><iframe src={site.other_url}/outer></iframe><iframe srcdoc='<p>in'></iframe>"
    visit(f"{site.url}/outside")
    assert js("location.href", iframe_target("inner?deep")) == f"{site.other_url}/inner?deep"
    assert js("document.body.textContent", iframe_target("about:srcdoc")) == "in"


def test_an_iframe_that_navigates_keeps_its_id(used_page: str, site: Site) -> None:
    visit(f"{site.url}/frames")
    frame = iframe_target("inner?near")
    for place in (f"{site.url}/inner?there", f"{site.other_url}/inner?there", f"{site.url}/inner?back"):
        js(f"await new Promise(loaded => {{ near.onload = loaded; near.src = '{place}' }})")
        assert js("location.href", frame) == place


def test_javascript_in_another_tab_while_a_dialog_holds_this_one(page: str, site: Site) -> None:
    visit(f"{site.url}/inner")
    new_tab(f"{site.url}/dialog")
    js("setTimeout(() => alert('Look'))")
    wait_until(lambda: "dialog" in page_info())
    assert js("document.title", page) == "Inner"


def test_an_iframe_that_opens_a_dialog(used_page: str, site: Site) -> None:
    visit(f"{site.url}/frames")
    frame = iframe_target("inner?far")
    try:
        with pytest.raises(DialogOpen, match="alert: 'in the frame'"):
            js("alert('in the frame')", target_id=frame, timeout=5)
        assert page_info()["dialog"]["message"] == "in the frame"
    finally:
        handle_dialog()
    assert js("6 * 7", target_id=frame) == 42


def test_closing_a_tab_blocked_by_an_iframe(page: str, site: Site) -> None:
    new_tab(f"{site.url}/frames")
    assert wait_for_load(PATIENCE)
    js("setTimeout(() => alert('in the frame'))", target_id=iframe_target("inner?far"))
    wait_until(lambda: "dialog" in page_info())
    close_tab()
    assert page in {tab["targetId"] for tab in list_tabs()}
    assert serves()


def test_an_iframe_that_goes_away_meanwhile(used_page: str, site: Site) -> None:
    visit(f"{site.url}/frames")
    js("addEventListener('message', () => document.getElementById('far').remove())")
    with pytest.raises(CDPError, match="this may have run"):
        js("parent.postMessage('enough', '*'); new Promise(() => {})", target_id=iframe_target("inner?far"))
    assert iframe_target("inner?far") is None
    assert serves()


def test_an_iframe_is_one_of_this_page(page: str, site: Site) -> None:
    visit(f"{site.url}/frames")
    assert iframe_target("inner?far") is not None
    new_tab(f"{site.url}/inner")
    assert iframe_target("inner?far") is None


# Screenshots and large replies.


def size(png: bytes) -> tuple[int, int]:
    """Return width and height from the header of the PNG."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png[12:16] == b"IHDR"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def set_viewport() -> None:
    cdp("Emulation.setDeviceMetricsOverride", width=800, height=600, deviceScaleFactor=1, mobile=False)


def test_a_screenshot_is_a_png_of_the_viewport_or_the_page(page: str, site: Site) -> None:
    set_viewport()
    visit(f"{site.url}/form")
    js("scrollTo(0, 500)")
    assert size(capture_screenshot()) == (800, 600)
    height = js("document.documentElement.scrollHeight")
    assert height >= 3000
    assert size(capture_screenshot(full=True))[1] == height
    assert js("scrollY") == 500


def test_a_screenshot_to_a_file(page: str, tmp_path: Path) -> None:
    set_viewport()
    path = tmp_path / "shot.png"
    path.write_text("an older one")
    assert capture_screenshot(path) == path
    assert size(path.read_bytes()) == (800, 600)
    assert capture_screenshot(str(path), full=True) == str(path)
    assert os.listdir(tmp_path) == ["shot.png"]


@needs_posix
def test_a_screenshot_to_a_file_with_a_long_name(empty_page: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".png")
    capture_screenshot(path)
    assert os.listdir(tmp_path) == [path.name]


@needs_root
def test_a_screenshot_in_a_directory_that_others_write_to(empty_page: str, tmp_path: Path) -> None:
    stranger = 12345
    victim = tmp_path / "victim"
    victim.write_text("precious")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    # The file itself, and names that another user could guess.
    names = [f".harness-browser-{os.getpid()}.tmp", "shot.png", "shot.png.tmp", ".shot.png.tmp"]
    for name in names:
        (shared / name).symlink_to(victim)
        os.chown(shared / name, stranger, stranger, follow_symlinks=False)
    capture_screenshot(shared / "shot.png")
    assert victim.read_text() == "precious"
    assert not (shared / "shot.png").is_symlink()
    assert (shared / "shot.png").stat().st_uid == os.geteuid()
    assert sorted(os.listdir(shared)) == sorted(names)


@pytest.mark.parametrize("place", ["taken", "nowhere/shot.png"])
def test_a_screenshot_that_can_not_be_written(empty_page: str, tmp_path: Path, place: str) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - of whatever kind
        capture_screenshot(tmp_path / place)
    assert caught.value.filename == str(tmp_path / place)
    assert os.listdir(tmp_path) == ["taken"]
    assert os.listdir(tmp_path / "taken") == []
    assert serves()


def test_a_screenshot_of_20_megabytes(page: str, site: Site) -> None:
    set_viewport()
    visit(f"{site.url}/noise")
    picture = capture_screenshot(full=True, timeout=PATIENCE)
    assert len(picture) > 20 * 1024 * 1024
    assert min(size(picture)) >= 2800
    assert serves()


def test_a_page_of_100_000_nodes(used_page: str, site: Site) -> None:
    visit(f"{site.url}/many")
    left = [cdp("DOM.getDocument", depth=-1, timeout=PATIENCE)["root"]]
    count = 0
    while left:
        count += 1
        left += left.pop().get("children", ())
    assert count > 100_000
    assert serves()


# Tabs.


def ids(**options: bool) -> set[str]:
    return {tab["targetId"] for tab in list_tabs(**options)}


@contextlib.contextmanager
def another_process() -> Iterator[Client]:
    with connect_daemon(daemon_name(), request_timeout=PATIENCE) as client:
        yield client


def test_a_process_continues_in_its_new_tab(page: str, site: Site) -> None:
    visit(f"{site.url}/")
    tab = new_tab(f"{site.url}/form")
    assert wait_for_load(PATIENCE)
    assert js("document.title") == "A form"
    assert current_tab() == {"targetId": tab, "url": f"{site.url}/form", "title": "A form"}
    listed = {entry["targetId"]: entry for entry in list_tabs()}
    assert listed[page] == {"targetId": page, "url": f"{site.url}/", "title": "Home"}
    assert listed[tab] == current_tab()


def test_a_new_tab_of_a_page_that_cannot_be_loaded(page: str, site: Site) -> None:
    with pytest.raises(CDPError, match="can't be loaded"):
        new_tab("http://nowhere.invalid/")
    visit(f"{site.url}/")
    assert page_info()["title"] == "Home"


@pytest.mark.parametrize("form", [lambda tab: tab["targetId"], lambda tab: tab], ids=["id", "entry"])
def test_switching_to_a_tab(page: str, site: Site, form: Callable[[dict[str, str]], str | dict[str, str]]) -> None:
    visit(f"{site.url}/form")
    tab = current_tab()
    new_tab()
    session = switch_tab(form(tab))
    assert js("document.title") == "A form"
    new_tab()
    # Its session can be used from another tab.
    assert cdp("Runtime.evaluate", session, expression="document.title")["result"]["value"] == "A form"
    assert js("location.href") == "about:blank"


def test_a_process_that_starts_later_begins_in_the_last_tab(page: str) -> None:
    new_tab()
    switch_tab(page)
    helpers.disconnect()
    assert current_tab()["targetId"] == page


def test_a_process_stays_in_its_tab(page: str) -> None:
    with another_process() as other:
        mine = new_tab()
        assert other.request({"meta": "set_session", "target_id": page})["target_id"] == page
        assert current_tab()["targetId"] == mine


def test_switching_to_an_unknown_tab(empty_page: str) -> None:
    with pytest.raises(TabClosed, match="there is no tab nonsense"):
        switch_tab("nonsense")
    assert current_tab()["targetId"] == empty_page
    assert serves()


def test_closing_the_current_tab(page: str) -> None:
    tab = new_tab()
    close_tab()
    assert tab not in ids()
    assert current_tab()["targetId"] in ids()
    assert serves()


def test_closing_the_current_tab_by_its_id(page: str) -> None:
    tab = new_tab()
    close_tab(tab)
    assert tab not in ids()
    assert serves()


def test_closing_another_tab(page: str) -> None:
    tab = new_tab()
    close_tab(page)
    assert page not in ids()
    assert current_tab()["targetId"] == tab
    assert serves()


def test_closing_an_unknown_tab(empty_page: str) -> None:
    before = ids()
    with pytest.raises(CDPError, match="No target with given id"):
        close_tab("nonsense")
    assert ids() == before
    assert serves()


def test_a_tab_that_is_closed_under_the_process(page: str, site: Site) -> None:
    new_tab(f"{site.url}/")
    assert wait_for_load(PATIENCE)
    switch_tab(page)
    with another_process() as other:
        other.call("Target.closeTarget", targetId=page)
    with pytest.raises(TabClosed, match="nothing was done"):
        js("window.ran = true; document.title")
    assert js("[window.ran, document.title]") == [None, "Home"]


def test_a_tab_that_is_closed_in_the_middle(page: str) -> None:
    def run() -> None:
        with another_process() as other:
            wait_until(lambda: current_title(other) == "in the middle")
            other.call("Target.closeTarget", targetId=page)

    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(run)
        with pytest.raises(CDPError, match="may have run"):
            js("document.title = 'in the middle'; new Promise(() => {})", timeout=PATIENCE)
        closed.result()
    with pytest.raises(TabClosed):
        js("1")
    assert serves()


def current_title(other: Client) -> str:
    return str(other.request({"meta": "current_tab"})["title"])


def test_a_page_of_the_browser_is_left_for_a_real_one(page: str, site: Site) -> None:
    goto_url("chrome://version")
    assert ensure_real_tab() is None
    assert current_tab()["targetId"] == page
    assert page in ids()
    assert page not in ids(include_chrome=False)
    new_tab(f"{site.url}/")
    assert wait_for_load(PATIENCE)
    real = current_tab()
    assert ensure_real_tab() == real
    switch_tab(page)
    assert ensure_real_tab() == real
    assert current_tab() == real
    assert js("document.title") == "Home"


def test_a_tab_has_an_address_at_any_time(page: str, site: Site) -> None:
    # The URL of a new document may come with a delay: try it several times.
    for number in range(20):
        goto_url(f"{site.url}/?{number}")
        assert current_tab()["url"] == f"{site.url}/?{number}"


# Events.


def logged(events: list[dict[str, Any]]) -> list[Any]:
    return [event["params"]["args"][0]["value"] for event in events if event["method"] == "Runtime.consoleAPICalled"]


def test_events_are_those_of_the_tab(page: str) -> None:
    js("console.log('in the other')")
    session = switch_tab(new_tab())
    js("console.log('one'); console.log('two')")
    events = drain_events()
    assert logged(events) == ["one", "two"]
    assert {event["session_id"] for event in events} == {session}
    assert logged(drain_events()) == []
    switch_tab(page)
    assert logged(drain_events()) == ["in the other"]


def test_the_last_500_events_are_kept(page: str) -> None:
    js("for (let number = 0; number < 700; number++) console.log(number)")
    events = drain_events()
    assert len(events) == 500
    numbers = logged(events)
    assert numbers == list(range(700 - len(numbers), 700))
    # Drain the events that were still in flight.
    wait_until(lambda: drain_events() == [])


def test_the_first_events_of_a_process_are_those_of_its_tab(page: str) -> None:
    js("console.log('in the other')")
    session = switch_tab(new_tab())
    helpers.disconnect()
    assert {event["session_id"] for event in drain_events()} == {session}
    switch_tab(page)
    assert logged(drain_events()) == ["in the other"]


# Errors.


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("No.such", {}, -32601),
        ("Target.noSuch", {}, -32601),
        ("Page.navigate", {"url": 5}, -32602),
        ("Page.navigate", {}, -32602),
        ("", {}, -32600),
    ],
)
def test_cookies_refused_by_the_browser(empty_page: str, method: str, params: dict[str, Any], code: int) -> None:
    with pytest.raises(CDPError) as caught:
        cdp(method, **params)
    assert caught.value.code == code
    assert serves()


def test_an_unknown_session(empty_page: str) -> None:
    with pytest.raises(TabClosed):
        cdp("Runtime.evaluate", "nonsense", expression="1")
    # The session of the process is unaffected.
    assert current_tab()["targetId"] == empty_page
    assert serves()


def crash() -> None:
    with pytest.raises(CDPError, match="crashed"):
        cdp("Page.crash", timeout=PATIENCE)


def test_a_page_that_has_crashed(page: str, site: Site) -> None:
    visit(f"{site.url}/form")
    crash()
    for act in (page_info, capture_screenshot, lambda: js("1"), lambda: press_key("x"), lambda: click_at_xy(1, 1)):
        # Each raises at once, not after its timeout.
        with pytest.raises(CDPError, match="the page has crashed: reload it with goto_url"):
            act()
    visit(f"{site.url}/form")
    assert page_info()["title"] == "A form"


def test_waiting_for_a_page_that_has_crashed(page: str, site: Site) -> None:
    visit(f"{site.url}/form")
    crash()
    with pytest.raises(CDPError, match="crashed"):
        wait_for_load(2)
    visit(f"{site.url}/form")
    assert page_info()["title"] == "A form"


# Processes.

FORKS = """
import os
from harness_ipc.browser import helpers
from harness_ipc.browser.helpers import js

connection = helpers.connect()
assert js("6 * 7") == 42
child = os.fork()
# Concurrent requests of both get their own replies.
name = "parent" if child else "child"
same = all(js(f"'{name} {number}'") == f"{name} {number}" for number in range(200))
own = helpers.connect() is not connection
if not child:
    os._exit(0 if same and own else 1)
_, status = os.waitpid(child, 0)
assert (same, own, status) == (True, False, 0), (same, own, status)
helpers.disconnect()
"""


@needs_posix
def test_a_process_that_forks(empty_page: str) -> None:
    run = run_python("-c", FORKS)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert serves()
