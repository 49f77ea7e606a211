"""A helper continues with the next daemon after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness_ipc import stop_daemon
from harness_ipc.browser import helpers
from harness_ipc.browser.errors import TabClosed
from tests.browser.conftest import Pair
from tests.browser.others import OtherBrowser
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = needs_chromium


@pytest.fixture
def stopped(killable: Pair) -> None:
    """A process in a tab of a daemon that was stopped, with its browser."""
    helpers.js("window.kept = 42")
    assert stop_daemon("browser")


def test_the_tab_is_found_again_in_the_browser_of_others(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BU_CDP_URL", other.url)
    tab = helpers.current_tab()["targetId"]
    helpers.js("window.kept = 42")
    assert stop_daemon("browser")
    assert helpers.js("window.kept") == 42
    assert helpers.current_tab()["targetId"] == tab


@pytest.mark.usefixtures("stopped")
def test_a_lost_tab_raises_before_another_is_used() -> None:
    with pytest.raises(TabClosed):
        helpers.js("window.kept = 43")
    assert helpers.js("window.kept") is None


@pytest.mark.usefixtures("stopped")
def test_after_a_restart_a_page_can_be_gone_to_at_once() -> None:
    helpers.goto_url("data:text/html,<title>next</title>")
    assert helpers.wait_for_load(PATIENCE)
    assert helpers.page_info()["title"] == "next"


@pytest.mark.usefixtures("killable")
def test_a_tab_is_entered_in_the_next_daemon() -> None:
    helpers.connect()
    assert stop_daemon("browser")
    assert helpers.page_info()["url"] == "about:blank"


@pytest.mark.usefixtures("stopped")
def test_events_of_a_lost_tab_raise_before_those_of_another() -> None:
    with pytest.raises(TabClosed):
        helpers.events("Page.loadEventFired")
    with helpers.events("Page.loadEventFired", timeout=PATIENCE) as events:
        helpers.goto_url("data:text/html,<title>next</title>")
        assert next(events)["method"] == "Page.loadEventFired"
