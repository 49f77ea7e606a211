"""The porting guide for users of browser-harness: its snippets run, and its names exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from harness_ipc.browser import helpers
from tests.browser.site import Site
from tests.support.marks import needs_chromium

pytestmark = needs_chromium

GUIDE = (Path(__file__).parents[2] / "docs" / "porting-browser-harness.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)

SHOP = """<!doctype html><title>Shop</title>
<label>Email <input id=email></label>
<select id=country><option value=de>Germany</option><option value=fr>France</option></select>
<button id=order onclick="document.title = `ordered by ${email.value}, ${country.value}`">Order</button>
<input type=file id=receipt>
<a id=export download=orders.csv href="data:text/csv,1;2">Export</a>
<button id=ask onclick="document.title = 'said ' + confirm('Sure?')">Ask</button>
<div id=card style="position: relative; width: 50px; height: 50px"
  onmousedown="start = event.x"></div>
<iframe id=far></iframe><div style="height: 3000px"></div>
<script>addEventListener("mousemove", event => { if (event.buttons) card.style.left = `${event.x - start}px` });
far.src = `http://localhost:${location.port}/inner`</script>"""


def run(snippet: str, namespace: dict[str, Any]) -> str:
    """Run a snippet, and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(snippet, "snippet", "exec"), namespace)
    return output.getvalue()


def expected(snippet: str) -> list[str]:
    return re.findall(r"print\(.*\)  # (.*)$", snippet, re.MULTILINE)


def test_the_snippets_print_their_output(page: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(site.pages, "/shop", SHOP)
    namespace = {name: getattr(helpers, name) for name in helpers.__all__}
    assert len(SNIPPETS) >= 10
    for snippet in SNIPPETS:
        lines = run(snippet.replace("https://example.com", site.url), namespace).splitlines()
        assert list(dict.fromkeys(lines)) == list(dict.fromkeys(expected(snippet))), snippet


def test_the_helpers_that_it_names_are_there() -> None:
    table = [row.split("|")[2] for row in GUIDE.splitlines() if row.startswith("| `")]
    same = [row.split("|")[1] for row in GUIDE.splitlines() if re.match(r"\| `.*\| the same", row)]
    named = set(re.findall(r"(?<![.\w])([a-z_]+)\(", "\n".join([*table, *same])))
    assert named - set(helpers.__all__) == set()
    assert len(named) >= 30
