"""Actions on elements by selector, reference and node, and their errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness_ipc.browser.helpers import (
    ElementNotFound,
    ElementNotReady,
    InvalidArgument,
    cdp,
    click,
    fill_input,
    handle_dialog,
    hover,
    js,
    page_info,
    scroll_into_view,
    select_option,
    snapshot,
    upload_file,
)
from tests.browser.site import Site, visit
from tests.browser.test_snapshot import load, reference, show
from tests.support.marks import needs_chromium

pytestmark = needs_chromium

# `log` has [type, id of the element] for each event.
LOG = """<script>const log = [];
for (const kind of ['click', 'dblclick', 'contextmenu', 'mouseover', 'input', 'change'])
  addEventListener(kind, e => log.push([kind, e.composedPath()[0].id]), true)</script>"""


def logged(kind: str) -> list[str]:
    return [name for one, name in js("log") if one == kind]


# Targets.


def one_button(site: Site) -> str:
    return reference(show(site, LOG + "<button id=a class=main>One</button><p>Text</p>"), "One")


def node_ids() -> dict[str, Any]:
    root = cdp("DOM.getDocument")["root"]["nodeId"]
    return {"nodeId": cdp("DOM.querySelector", nodeId=root, selector="#a")["nodeId"]}


def backend_ids() -> dict[str, Any]:
    return {"backendNodeId": cdp("DOM.describeNode", nodeId=node_ids()["nodeId"])["node"]["backendNodeId"]}


def remote_object() -> dict[str, Any]:
    return dict(cdp("Runtime.evaluate", expression="document.querySelector('#a')")["result"])


@pytest.mark.parametrize("target", ["#a", "button.main", "//button[text()='One']", "xpath=//*[@id='a']"])
def test_a_selector(used_page: str, site: Site, target: str) -> None:
    one_button(site)
    click(target)
    assert logged("click") == ["a"]


@pytest.mark.parametrize("form", ["{}", "@{}", "ref={}"])
def test_a_reference(used_page: str, site: Site, form: str) -> None:
    click(form.format(one_button(site)))
    assert logged("click") == ["a"]


@pytest.mark.parametrize("node", [node_ids, backend_ids, remote_object])
def test_a_node_of_cdp(used_page: str, site: Site, node: Any) -> None:
    one_button(site)
    target = node()
    click(target)
    # The helper does not release the caller's object.
    click(target)
    assert logged("click") == ["a", "a"]


def test_open_shadow_roots_are_searched(used_page: str, site: Site) -> None:
    load(site, LOG + "<div><template shadowrootmode=open><button id=deep><b>In</b></button></template></div>")
    click("#deep b")
    assert logged("click") == [""]
    fill_target = "<p><template shadowrootmode=open><input id=field></template></p>"
    load(site, LOG + fill_target)
    fill_input("#field", "x")
    assert logged("input") == ["field"]


def test_the_only_visible_match_is_used(used_page: str, site: Site) -> None:
    load(site, LOG + "<button id=a hidden>One</button><button id=b>Two</button>")
    click("button")
    assert logged("click") == ["b"]


def test_an_ambiguous_selector_lists_its_matches(used_page: str, site: Site) -> None:
    load(site, "<button id=a>One</button><button id=b>Two</button>")
    expected = r"""'button' matches 2 elements, and has to match one: <button id="a">One, <button id="b">Two"""
    with pytest.raises(ElementNotFound, match=expected) as caught:
        click("button")
    assert caught.value.data["count"] == 2


def test_a_selector_without_a_match_names_similar_elements(used_page: str, site: Site) -> None:
    load(site, "<button id=submit-order>Order</button><p>Text</p>")
    with pytest.raises(
        ElementNotFound, match=r"'#submit' matches no element; similar are <button id=\"submit-order\">Order: see"
    ):
        click("#submit")
    with pytest.raises(ElementNotFound, match="'#other' matches no element: see snapshot"):
        hover("#other")


def test_a_match_in_an_iframe_is_named(used_page: str, site: Site) -> None:
    visit(site.url + "/frames")
    with pytest.raises(ElementNotFound, match=r"but one in the iframe <iframe id=\"near\".*frame="):
        click("#here")


def test_an_invalid_selector_has_chromes_reason(empty_page: str, site: Site) -> None:
    with pytest.raises(InvalidArgument, match=r"'button\[' is not a valid selector"):
        click("button[")


@pytest.mark.parametrize("target", [5, None, {}, {"role": "button"}])
def test_an_invalid_target(empty_page: str, target: Any) -> None:
    with pytest.raises(TypeError, match=r"selector|objectId"):
        click(target)


def test_a_node_that_is_gone(used_page: str, site: Site) -> None:
    name = one_button(site)
    given = backend_ids()
    js("window.kept = document.querySelector('#a'); kept.remove()")
    for target in (name, given):
        with pytest.raises(ElementNotFound, match=r"is gone from the page: call snapshot\(\) again"):
            click(target)


# Clicks.


def test_buttons_and_double_clicks(used_page: str, site: Site) -> None:
    one_button(site)
    click("#a", clicks=2)
    click("#a", "right")
    assert (logged("dblclick"), logged("contextmenu"), logged("click")) == (["a"], ["a"], ["a", "a"])


def test_an_element_is_scrolled_into_view(used_page: str, site: Site) -> None:
    load(
        site,
        LOG + "<div style='height:4000px'></div><div style='height:99px;overflow:auto'><p style='height:900px'></p>"
        "<button id=a>One</button></div>",
    )
    click("#a")
    assert logged("click") == ["a"]
    js("scrollTo(0, 0)")
    scroll_into_view("#a")
    assert page_info()["sy"] > 0


def test_the_error_names_the_covering_element(used_page: str, site: Site) -> None:
    load(site, LOG + "<button id=a>One</button><div id=veil style='position:fixed;inset:0'>Accept cookies</div>")
    with pytest.raises(ElementNotReady, match="'#a' is covered by <div id=\"veil\">Accept cookies: nothing was done"):
        click("#a")
    assert logged("click") == []


def test_a_sticky_header_is_scrolled_away_from(used_page: str, site: Site) -> None:
    load(
        site,
        LOG + "<div style='position:sticky;top:0;height:200px;background:#eee'>Bar</div>"
        "<button id=a>One</button><div style='height:4000px'></div>",
    )
    js("scrollTo(0, 100)")
    click("#a")
    assert logged("click") == ["a"]


def test_a_click_waits_until_an_element_stands_still(used_page: str, site: Site) -> None:
    load(
        site,
        LOG + "<button id=a style='position:relative'>One</button>"
        "<script>a.animate([{left: '0px'}, {left: '600px'}], {duration: 400, fill: 'forwards'})</script>",
    )
    click("#a")
    assert logged("click") == ["a"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<button id=a disabled>One</button>", "is disabled"),
        ("<button id=a aria-disabled=true>One</button>", "is disabled"),
        ("<button id=a style='visibility:hidden'>One</button>", "is not visible"),
        ("<button id=a hidden>One</button>", "is not visible"),
        ("<button id=a style='position:fixed;left:-999px'>One</button>", "outside"),
        ("<select><option id=a>One</select>", r"use select_option\(\)"),
    ],
)
def test_elements_that_cannot_be_clicked(used_page: str, site: Site, body: str, problem: str) -> None:
    load(site, body)
    with pytest.raises(ElementNotReady, match=problem):
        click("#a")


@pytest.mark.parametrize(
    "body",
    [
        "<label>Yes<input id=a type=checkbox></label>",
        "<label for=a>Yes</label><input id=a type=checkbox hidden>",
        "<label><input id=a type=checkbox style='position:absolute;opacity:0'><b style='position:relative'>Yes</b></label>",
    ],
)
def test_a_box_is_clicked_by_its_label_where_that_hides_it(used_page: str, site: Site, body: str) -> None:
    load(site, body)
    click("#a")
    assert js("document.querySelector('#a').checked") is True


def test_an_icon_that_ignores_the_mouse_is_its_buttons(used_page: str, site: Site) -> None:
    load(site, LOG + "<button id=a><svg id=icon width=20 height=20 style='pointer-events:none'></svg></button>")
    click("#icon")
    assert logged("click") == ["a"]


def test_a_click_that_opens_a_dialog_has_happened(used_page: str, site: Site) -> None:
    load(site, "<button onclick='alert(1)'>One</button>")
    click("button")
    handle_dialog()


def test_hover(page: str, site: Site) -> None:
    load(site, LOG + "<button id=a disabled>One</button>")
    hover("#a")
    assert js("document.querySelector('#a').matches(':hover')") is True


# Frames.

FRAMED = f"{LOG}<body style='margin:0'><div style='height:900px'></div><button id=a>In</button><input id=field>"


@pytest.mark.parametrize("origin", ["url", "other_url"])
@pytest.mark.parametrize("by", ["reference", "selector", "url part"])
def test_an_element_in_an_iframe(used_page: str, site: Site, origin: str, by: str) -> None:
    site.pages["/framed"] = FRAMED
    source = getattr(site, origin) + "/framed"
    load(site, f"<div style='height:1500px'></div><iframe id=frame src={source} style='border:9px solid;margin:7px'></iframe>")
    button, field, frame = "#a", "#field", "#frame" if by == "selector" else "/framed"
    if by == "reference":
        text = snapshot()
        button, field = reference(text, '"In"'), reference(text, "textbox")
        click(button)
        fill_input(field, "x")
    else:
        click(button, frame=frame)
        fill_input(field, "x", frame=frame)
    names = [line.split()[1] for line in snapshot(interactive=True).splitlines()]
    assert names == ["iframe", "button", "textbox"]
    assert "textbox [focused]" in snapshot()
    assert snapshot().endswith(": x")


def test_the_error_names_the_element_over_an_iframe(used_page: str, site: Site) -> None:
    site.pages["/framed"] = FRAMED
    load(site, f"<iframe src={site.other_url}/framed></iframe><div id=veil style='position:fixed;inset:0'>Wait</div>")
    with pytest.raises(ElementNotReady, match='is covered by <div id="veil">Wait'):
        click(reference(snapshot(), '"In"'))


def test_an_iframe_that_is_not_there(used_page: str, site: Site) -> None:
    one_button(site)
    with pytest.raises(ElementNotFound, match="no iframe has '/nowhere' in its URL"):
        click("#a", frame="/nowhere")
    with pytest.raises(ElementNotFound, match="'#a' is not an iframe"):
        click("#a", frame="#a")


# Fields.


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("<input id=a value=old>", "new"),
        ("<input id=a>", ""),
        ("<input id=a type=email>", "a@b.c"),
        ("<input id=a type=number>", "4.5"),
        ("<input id=a type=date>", "2025-12-31"),
        ("<input id=a type=color>", "#ff8800"),
        ("<textarea id=a>old</textarea>", "two\nlines"),
        ("<label id=label>Name<input id=a></label>", "by its label"),
    ],
)
def test_a_field_is_filled_and_its_events_fire(used_page: str, site: Site, field: str, text: str) -> None:
    load(site, LOG + field)
    fill_input("#label" if "label" in field else "#a", text)
    assert js("document.querySelector('#a').value") == text
    assert (logged("input"), logged("change")) == (["a"], ["a"])


def test_text_is_appended(used_page: str, site: Site) -> None:
    load(site, "<input id=a value=old>")
    fill_input("#a", "er", clear_first=False)
    assert js("document.querySelector('#a').value") == "older"


def test_a_framework_that_watches_the_value_notices(used_page: str, site: Site) -> None:
    # As React does: it overrides the `value` property, and ignores an input event if the value was set through that.
    load(
        site,
        """<input id=a><script>const proto = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value');
let tracked = '', state = '';
Object.defineProperty(a, 'value', {get() { return proto.get.call(this) }, set(v) { tracked = v; proto.set.call(this, v) }});
document.addEventListener('input', e => { if (e.target.value !== tracked) state = e.target.value })</script>""",
    )
    fill_input("#a", "noticed")
    assert js("state") == "noticed"


def test_contenteditable_elements(used_page: str, site: Site) -> None:
    load(site, LOG + "<div id=a contenteditable>old <b>text</b></div>")
    fill_input("#a", "new")
    assert js("document.querySelector('#a').textContent") == "new"
    fill_input("#a", "er", clear_first=False)
    assert js("document.querySelector('#a').textContent") == "newer"
    fill_input("#a", "")
    assert js("document.querySelector('#a').textContent.trim()") == ""
    assert logged("input") == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("field", "error", "problem"),
    [
        ("<input id=a disabled>", ElementNotReady, "is disabled"),
        ("<fieldset disabled><input id=a></fieldset>", ElementNotReady, "is disabled"),
        ("<input id=a readonly>", ElementNotReady, "is read-only"),
        ("<input id=a type=checkbox>", ElementNotReady, r"is a checkbox: use click\(\)"),
        ("<input id=a type=file>", ElementNotReady, r"use upload_file\(\)"),
        ("<select id=a></select>", ElementNotReady, r"use select_option\(\)"),
        ("<p id=a>Text</p>", ElementNotReady, "is no field"),
        ("<input id=a maxlength=3>", InvalidArgument, "takes at most 3 characters, not 9"),
        ("<input id=a type=date>", InvalidArgument, "is a date input, which takes what looks like 2025-12-31"),
        ("<input id=a type=number>", InvalidArgument, "takes a number"),
    ],
)
def test_elements_that_cannot_be_filled(used_page: str, site: Site, field: str, error: type[Exception], problem: str) -> None:
    load(site, LOG + field)
    with pytest.raises(error, match=problem):
        fill_input("#a", "some text")
    assert logged("input") == []


SELECT = "<select id=a {}><option value=s>Small<option value=m>Medium size<option value=l disabled>Large</select>"


@pytest.mark.parametrize("choice", ["m", "Medium size", 1])
def test_an_option_by_value_label_or_index(used_page: str, site: Site, choice: str | int) -> None:
    load(site, LOG + SELECT.format(""))
    assert select_option("#a", choice) == ["Medium size"]
    assert js("document.querySelector('#a').value") == "m"
    assert (logged("input"), logged("change")) == (["a"], ["a"])


def test_several_options(used_page: str, site: Site) -> None:
    load(site, SELECT.format("multiple"))
    assert select_option("#a", "s", "m") == ["Small", "Medium size"]
    assert select_option("#a", ["m"]) == ["Medium size"]


@pytest.mark.parametrize(
    ("choices", "error", "problem"),
    [
        (["x"], InvalidArgument, r"has no option \"x\", but \"Small\", \"Medium size\", \"Large\""),
        ([7], InvalidArgument, "has no option 7"),
        (["s", "m"], InvalidArgument, "takes one option only"),
        (["l"], ElementNotReady, "is disabled"),
        ([], TypeError, "takes a value or a label"),
    ],
)
def test_options_that_cannot_be_selected(
    used_page: str, site: Site, choices: list[Any], error: type[Exception], problem: str
) -> None:
    load(site, SELECT.format(""))
    with pytest.raises(error, match=problem):
        select_option("#a", *choices)
    with pytest.raises(ElementNotReady, match="is no select"):
        select_option("body", "x")


# Files.


@pytest.mark.parametrize(
    "body",
    [
        "<input id=a type=file>",
        "<input id=b type=file hidden><label id=a for=b>Photo</label>",
        "<div id=a><input type=file hidden></div>",
    ],
)
def test_a_file_is_uploaded(used_page: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    load(site, LOG + body)
    (tmp_path / "photo.txt").write_text("pixels")
    monkeypatch.chdir(tmp_path)
    upload_file("#a", "photo.txt")
    names = "[...document.querySelector('input').files].map(file => file.name)"
    assert js(names) == ["photo.txt"]
    assert js("document.querySelector('input').files[0].text()") == "pixels"
    assert (len(logged("input")), len(logged("change"))) == (1, 1)


def test_several_files(used_page: str, site: Site, tmp_path: Path) -> None:
    load(site, "<input id=a type=file multiple>")
    files: list[str | os.PathLike[str]] = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        Path(file).write_text("x")
    upload_file("#a", *files)
    upload_file("#a", files)
    assert js("document.querySelector('input').files.length") == 2


def test_files_that_cannot_be_uploaded(used_page: str, site: Site, tmp_path: Path) -> None:
    load(site, "<input id=a type=file><p id=b>Text</p>")
    (tmp_path / "one").write_text("x")
    with pytest.raises(FileNotFoundError, match="there is no such file to upload"):
        upload_file("#a", tmp_path / "none")
    with pytest.raises(TypeError, match="takes the path of a file"):
        upload_file("#a")
    with pytest.raises(ElementNotReady, match="takes one file only, not 2"):
        upload_file("#a", tmp_path / "one", tmp_path / "one")
    with pytest.raises(ElementNotReady, match="takes files, not directories"):
        upload_file("#a", tmp_path)
    with pytest.raises(ElementNotReady, match="'#b' is no file input"):
        upload_file("#b", tmp_path / "one")
