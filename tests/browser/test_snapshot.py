"""Snapshots: their lines, and the nodes of their references."""

from __future__ import annotations

import re

import pytest

from harness_ipc.browser import helpers
from harness_ipc.browser.helpers import DialogOpen, ElementNotFound, _send, cdp, handle_dialog, js, new_tab, snapshot
from tests.browser.conftest import harness_browser
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium

pytestmark = needs_chromium


def load(site: Site, body: str) -> None:
    """Visit a page with this body."""
    site.pages["/shown"] = f"<!doctype html><title>Shown</title><body>{body}"
    visit(site.url + "/shown")


def show(site: Site, body: str) -> str:
    """Visit a page with this body, and return its snapshot."""
    load(site, body)
    return snapshot()


def reference(text: str, what: str) -> str:
    """Return the reference in the one line that has `what`."""
    (line,) = [line for line in text.splitlines() if what in line]
    found = re.search(r"\[ref=(e\d+)\]", line)
    assert found, line
    return found[1]


def text_of(name: str) -> str:
    """Return the text of the node of a reference."""
    node = _send({"meta": "resolve_reference", "reference": name})
    function = "function() { return this.textContent }"
    where = {"objectId": node["objectId"], "session_id": node["node_session"]}
    return str(cdp("Runtime.callFunctionOn", functionDeclaration=function, returnByValue=True, **where)["result"]["value"])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<h2>Sign in</h2>", '- heading "Sign in" [level=2] [ref=N]'),
        ("<p>Some <b>bold</b> text</p>", "- paragraph [ref=N]: Some bold text"),
        ("<div>one</div><div><div>two</div></div>", "- text: one\n- text: two"),
        ("<button disabled>Go</button>", '- button "Go" [disabled] [ref=N]'),
        ("<input aria-label=Name required value=Ada>", '- textbox "Name" [required] [ref=N]: Ada'),
        ("<input type=checkbox aria-label=All checked>", '- checkbox "All" [checked] [ref=N]'),
        ("<input type=password aria-label=Key value=secret>", '- textbox "Key" [ref=N]: ••••••'),
        ("<ul><li><a href=/a>One</a></ul>", '- list [ref=N]\n  - listitem [ref=N]\n    - link "One" [ref=N]'),
        ("<details><summary>More</summary>hidden</details>", '- group [ref=N]\n  - button "More" [collapsed] [ref=N]'),
        ("<div contenteditable>Draft</div>", "- textbox [ref=N]: Draft"),
        ("<div onclick=1>Card</div>", "- generic [clickable] [ref=N]: Card"),
        ("<div style='cursor: pointer'><span>A</span> <span>card</span></div>", "- generic [clickable] [ref=N]: A card"),
        ("<p hidden>not there</p><p aria-hidden=true>nor this</p>", ""),
        ("<div id=host><template shadowrootmode=open><button>In</button></template></div>", '- button "In" [ref=N]'),
        ('<button>"\x1b[31m\u202e"</button>', r'- button "\"\x1b[31m\u202e\"" [ref=N]'),
    ],
)
def test_a_line_has_role_name_states_and_value(used_page: str, site: Site, body: str, expected: str) -> None:
    assert re.sub(r"ref=e\d+", "ref=N", show(site, body)) == expected


def test_interactive_shows_only_actionable_elements(used_page: str, site: Site) -> None:
    show(
        site, "<h1>Head</h1><p>Text</p><nav><a href=/a>One</a></nav><div onclick=1><b>Card</b></div><div tabindex=0>Stop</div>"
    )
    expected = '- link "One" [ref=N]\n- generic "Card" [clickable] [ref=N]\n- generic "Stop" [ref=N]'
    assert re.sub(r"ref=e\d+", "ref=N", snapshot(interactive=True)) == expected


def test_a_container_with_a_delegated_listener_is_not_clickable(used_page: str, site: Site) -> None:
    text = show(site, "<div id=root><button>One</button></div><script>root.addEventListener('click', () => 0)</script>")
    assert "clickable" not in text


def test_names_and_texts_are_cut(used_page: str, site: Site) -> None:
    text = show(site, f"<button>{'x' * 5000}</button><p>{'y' * 5000}</p>")
    assert "x" * 200 + "…" in text
    assert "y" * 1000 + "…" in text
    assert "x" * 201 not in text
    assert "y" * 1001 not in text


def test_iframes_are_included(used_page: str, site: Site) -> None:
    visit(site.url + "/frames")
    lines = [re.sub(r" \[ref=e\d+\]", "", line) for line in snapshot().splitlines()]
    assert lines == ["- iframe", "  - paragraph: inside", "- iframe", "  - paragraph: inside"]


def test_a_node_keeps_its_reference(used_page: str, site: Site) -> None:
    first = reference(show(site, "<button>One</button><button>Two</button>"), "Two")
    js("document.querySelector('button').before(document.createElement('hr'))")
    assert reference(snapshot(), "Two") == first
    assert reference(snapshot(interactive=True), "Two") == first
    assert text_of(first) == "Two"


def test_a_later_command_understands_a_reference(used_page: str, site: Site) -> None:
    name = reference(show(site, "<button>One</button>"), "One")
    # Leave the tab: the next command begins in the last one that is not in use.
    helpers.disconnect()
    run = harness_browser("-c", "print(snapshot())")
    assert (run.stderr, reference(run.stdout, "One")) == ("", name)


@pytest.mark.parametrize("frame", ["near", "far"])
def test_a_reference_into_an_iframe(used_page: str, site: Site, frame: str) -> None:
    visit(site.url + "/frames")
    lines = [line for line in snapshot().splitlines() if "inside" in line]
    assert text_of(reference(lines[frame == "far"], "inside")) == "inside"


@pytest.mark.parametrize("end", ["document.querySelector('button').remove()", "location.reload()"])
def test_a_reference_whose_node_is_gone_is_an_error(used_page: str, site: Site, end: str) -> None:
    name = reference(show(site, "<button>One</button><p>Stays</p>"), "One")
    js(f"window.kept = document.querySelector('button'); {end}")
    if "reload" in end:
        visit(site.url + "/shown")
        with pytest.raises(ElementNotFound, match=f"the node of {name} is gone from the page: call snapshot\\(\\) again"):
            text_of(name)
    assert name not in re.findall(r"e\d+", snapshot())


def test_a_page_of_another_site_does_not_get_old_references(used_page: str, site: Site) -> None:
    name = reference(show(site, "<button>One</button>"), "One")
    visit(site.other_url + "/shown")
    with pytest.raises(ElementNotFound, match="gone"):
        text_of(name)
    assert reference(snapshot(), "One") != name
    with pytest.raises(ElementNotFound, match="gone"):
        text_of(name)


def test_a_reference_that_was_never_given(empty_page: str) -> None:
    with pytest.raises(ElementNotFound, match="there is no e999999 in this tab: call snapshot"):
        text_of("e999999")


def test_another_tab_has_its_own_references(page: str, site: Site) -> None:
    name = reference(show(site, "<button>One</button>"), "One")
    new_tab()
    with pytest.raises(ElementNotFound, match=f"there is no {name} in this tab"):
        text_of(name)


def test_a_dialog_is_reported(used_page: str, site: Site) -> None:
    show(site, "")
    with pytest.raises(DialogOpen):
        js("alert('Look')")
    with pytest.raises(DialogOpen):
        snapshot()
    handle_dialog()
    assert snapshot() == ""
