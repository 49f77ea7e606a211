"""Finding elements by role, name, text, label, placeholder and test id."""

from __future__ import annotations

from typing import Any

import pytest

from harness_ipc.browser.helpers import _send, cdp, click, fill_input, find, js
from tests.browser.site import Site, visit
from tests.browser.test_snapshot import load, text_of
from tests.support.marks import needs_chromium

pytestmark = needs_chromium

# The ids tell the elements apart.
PAGE = """<h1 id=h1>Save  the
date</h1><button id=save>Save</button><button id=saveall>save all</button><button id=hidden hidden>Save hidden</button>
<button id=icon aria-label="Close it">x</button><div id=div><p id=p>Some <b id=b>bold</b> words</p></div>
<label>User <input id=user placeholder="Your name"></label><label for=pass>Password</label><input id=pass type=password>
<span id=by>Birthday</span><input id=date aria-labelledby=by><label>Photo <input id=photo type=file hidden></label>
<input id=submit type=submit value="Send now"><img id=img alt=Logo src=x><section data-testid=box id=section></section>
<div id=rich contenteditable>Draft</div><div><template shadowrootmode=open><i id=deep>In the shadow</i></template></div>
<script>const text = 'Save in a script'</script>"""


def id_of(name: str) -> str:
    """Return the id of the element of a reference."""
    node = _send({"meta": "resolve_reference", "reference": name})
    where = {"objectId": node["objectId"], "session_id": node["node_session"], "returnByValue": True}
    return str(cdp("Runtime.callFunctionOn", functionDeclaration="function() { return this.id }", **where)["result"]["value"])


EXPECTED: list[tuple[dict[str, Any], list[str]]] = [
    ({"role": "button"}, ["save", "saveall", "icon", "submit"]),
    ({"role": "button", "name": "save"}, ["save", "saveall"]),
    ({"role": "button", "name": "Save", "exact": True}, ["save"]),
    ({"role": "heading", "name": "save the date"}, ["h1"]),
    ({"role": "img"}, ["img"]),
    ({"role": "textbox", "name": "password"}, ["pass"]),
    ({"role": "Button", "name": "nothing"}, []),
    ({"name": "close it"}, ["icon"]),
    ({"text": "save"}, ["h1", "save", "saveall"]),
    ({"text": "Save", "exact": True}, ["save"]),
    ({"text": "some bold"}, ["p"]),
    ({"text": "bold"}, ["b"]),
    ({"text": "send now"}, ["submit"]),
    ({"text": "in the shadow"}, ["deep"]),
    ({"label": "user"}, ["user"]),
    ({"label": "Password"}, ["pass"]),
    ({"label": "birth"}, ["date"]),
    ({"label": "close"}, ["icon"]),
    ({"label": "Photo"}, ["photo"]),
    ({"placeholder": "your NAME"}, ["user"]),
    ({"placeholder": "your", "exact": True}, []),
    ({"test_id": "box"}, ["section"]),
    ({"test_id": "bo"}, []),
    ({"role": "textbox", "text": "draft"}, ["rich"]),
]


def test_elements_match_all_criteria(used_page: str, site: Site) -> None:
    load(site, PAGE)
    for criteria, ids in EXPECTED:
        assert (criteria, [id_of(one) for one in find(**criteria)]) == (criteria, ids)


def test_found_references_can_be_clicked(used_page: str, site: Site) -> None:
    load(site, PAGE + "<script>onclick = e => document.title = e.target.id</script>")
    fill_input(find(label="Password")[0], "x")
    click(find(role="button", name="Save", exact=True)[0])
    assert js("[document.querySelector('#pass').value, document.title]") == ["x", "save"]


def test_iframes_are_searched(used_page: str, site: Site) -> None:
    visit(site.url + "/frames")
    assert [text_of(one) for one in find(text="inside")] == ["inside", "inside"]


def test_criteria_that_can_not_be_used(empty_page: str) -> None:
    with pytest.raises(TypeError, match="needs a role, name, text"):
        find()
    with pytest.raises(TypeError, match=r"find\(\): role must be str, not int: 5"):
        find(role=5)  # type: ignore[arg-type]
