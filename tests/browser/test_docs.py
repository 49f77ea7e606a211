"""The examples of docs/browser.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness_ipc.browser import helpers
from tests.support.marks import needs_chromium
from tests.support.pages import FILES, page
from tests.support.processes import PATIENCE

pytestmark = needs_chromium


def run(name: str, directory: Path) -> str:
    """Run a file of the documentation in `directory`, and return what it prints."""
    (directory / name).write_text(FILES[name], encoding="utf-8")
    command = [sys.executable, "-W", "error", name]
    result = subprocess.run(command, cwd=directory, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert result.stderr == ""
    return result.stdout


@pytest.mark.usefixtures("page")
def test_the_guest_book(tmp_path: Path) -> None:
    assert run("visit.py", tmp_path) == "Guest book - Ada! was here\nguests.png\n"
    assert (tmp_path / "guests.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("page")
def test_tab_objects(tmp_path: Path) -> None:
    assert run("tabs.py", tmp_path) == "2\n"
    assert (tmp_path / "blank.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_helper_is_listed() -> None:
    functions = [name for name in helpers.__all__ if not isinstance(getattr(helpers, name), type)]
    assert [name for name in functions if f"`{name}`" not in page("browser.md")] == []
