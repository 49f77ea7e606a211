"""The README and the pages of docs/, and their snippets."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


def page(name: str) -> str:
    """Return the text of a page of docs/."""
    return PAGES[ROOT / "docs" / name]


def _marked(mark: str, language: str) -> list[tuple[str, str]]:
    block = re.compile(rf"<!-- {mark}: (\S+) -->\n```{language}\n(.*?)```", re.DOTALL)
    return [found for text in PAGES.values() for found in block.findall(text)]


# Snippets by file name, and the expected output of programs.
FILES = dict(_marked("file", "python"))
OUTPUTS = dict(_marked("output", "text"))
ALL_FILES = _marked("file", "python")
COMMANDS = dict(re.findall(r"<!-- (\w+) -->\n```sh\n(.*?)```", PAGES[README], re.DOTALL))
