"""Tabs as objects, and the helpers as the functions of a default one."""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys

import pytest

from harness_ipc.browser import helpers
from harness_ipc.browser.errors import TabInUse
from harness_ipc.browser.tab import Browser, Tab
from tests.support.processes import PATIENCE

FUNCTIONS = [name for name in helpers.__all__ if callable(getattr(Tab, name, None))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_helper_is_documented_as_its_method(name: str) -> None:
    method, helper = getattr(Tab, name), getattr(helpers, name)
    first, *others = inspect.signature(method).parameters.values()
    assert first.name in ("self", "tab")
    assert list(inspect.signature(helper).parameters.values()) == others
    summary = inspect.getdoc(method)
    assert summary
    page = pydoc.plain(pydoc.render_doc(helper))
    assert f"{name}(" in page
    assert summary.splitlines()[0] in page


def test_importing_the_helpers_imports_only_what_page_info_needs() -> None:
    program = (
        # Coverage may have imported modules before.
        "import sys; before = set(sys.modules); from harness_ipc.browser.helpers import *; "
        "heavy = 'asyncio dataclasses logging subprocess tempfile typing'.split(); "
        "deferred = 'dialogs keyboard mouse screenshot _files'.split(); "
        "print({*heavy, *(f'harness_ipc.browser.{name}' for name in deferred)} & (set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.stdout, run.stderr) == ("set()\n", "")


def targets() -> set[str]:
    return {tab["targetId"] for tab in helpers.list_tabs()}


def test_tabs_of_a_program_are_apart_and_closed_at_its_end(page: str) -> None:
    before = targets()
    with Browser() as browser:
        one = browser.new_tab("data:text/html,<title>one</title>")
        with browser.new_tab("data:text/html,<title>two</title>", isolated=True) as two:
            assert one.wait_for_load(PATIENCE)
            assert two.wait_for_load(PATIENCE)
            assert (one.page_info()["title"], two.page_info()["title"]) == ("one", "two")
            two.goto_url("data:text/html,<title>three</title>")
            assert two.wait_for_load(PATIENCE)
            assert (one.js("document.title"), two.js("document.title")) == ("one", "three")
        assert len(targets()) == len(before) + 1
        assert helpers.current_tab()["targetId"] == page
    assert targets() == before


def test_a_tab_to_keep_stays(page: str) -> None:
    with Browser() as browser:
        kept = browser.new_tab(keep=True).current_tab()["targetId"]
    assert kept in targets()
    helpers.disconnect()
    # Commands do not begin in a tab that a program opened.
    assert helpers.current_tab()["targetId"] == page


def test_a_program_finds_a_tab_by_its_name(page: str) -> None:
    with Browser() as browser, browser.tab("work") as tab:
        work = tab.current_tab()["targetId"]
        with Browser() as other, pytest.raises(TabInUse) as caught:
            other.tab("work")
        assert caught.value.data["pid"] == os.getpid()
    with Browser() as browser:
        assert browser.tab("work").current_tab()["targetId"] == work


def test_a_program_sees_the_tabs_of_others(page: str) -> None:
    with Browser() as browser:
        assert {tab.current_tab()["targetId"] for tab in browser.tabs()} == targets()


def test_a_tab_that_is_dropped_is_left(page: str) -> None:
    with Browser() as browser:
        for tab in browser.tabs():
            tab.page_info()
    helpers.disconnect()
    assert helpers.current_tab()["targetId"] == page
