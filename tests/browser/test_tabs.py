"""The tab of each client: commands, threads, names, contexts; and tabs of ended clients."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness_ipc.browser import helpers
from harness_ipc.browser.helpers import (
    TabClosed,
    cdp,
    close_tab,
    current_tab,
    goto_url,
    js,
    list_tabs,
    new_tab,
    page_info,
    switch_tab,
    wait_for_load,
)
from tests.browser.conftest import harness_browser
from tests.browser.others import OtherBrowser
from tests.browser.site import Site
from tests.support.processes import PATIENCE, wait_until

WHERE = "print(current_tab()['targetId'])"
# A client that is in a tab until its standard input is closed.
STAYS = "from harness_ipc.browser.helpers import *\nprint(current_tab()['targetId'], flush=True)\nimport sys; sys.stdin.read()"


def tabs() -> set[str]:
    return {tab["targetId"] for tab in list_tabs()}


def here() -> str:
    return current_tab()["targetId"]


def where(*options: str) -> str:
    """Return the tab in which a command with these options begins."""
    run = harness_browser(*options, "-c", WHERE)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.strip()


@pytest.fixture
def free(page: str) -> str:
    """The targetId of the tab that was switched to last. No client is in it."""
    helpers.disconnect()
    return page


# Commands.


def test_a_command_begins_in_the_tab_that_was_switched_to_last(free: str) -> None:
    assert where() == free


def test_a_command_avoids_a_tab_in_use(page: str) -> None:
    assert here() == page
    before = tabs()
    assert where() not in before
    assert tabs() == before


def test_a_command_in_a_new_tab_closes_it_unless_it_is_to_keep(free: str) -> None:
    before = tabs()
    assert where("--new-tab") not in before
    assert tabs() == before
    kept = where("--new-tab", "--keep-tab")
    assert tabs() == before | {kept}
    # The next command begins there, as after a switch.
    assert where() == kept


def test_a_command_chooses_a_tab_by_id_url_or_as_the_current_one(free: str, site: Site) -> None:
    other = new_tab(f"{site.url}/form")
    switch_tab(free)
    assert where("--tab", other) == other
    assert where("--tab", "/form") == other
    # "current" shares a tab that is in use.
    assert where("--tab", "current") == free == here()


@pytest.mark.parametrize(
    ("which", "text"), [("no such tab", "no tab has the id 'no such tab'"), ("about:", "tabs have 'about:' in their URL")]
)
def test_a_command_with_an_unknown_tab_runs_nothing(page: str, which: str, text: str) -> None:
    new_tab()
    run = harness_browser("--tab", which, "-c", "print('ran')")
    assert (run.returncode, run.stdout) == (6, "")
    assert text in run.stderr


def test_the_next_command_starts_in_the_switched_or_new_tab(free: str) -> None:
    run = harness_browser("-c", f"new_tab(); {WHERE}")
    assert where() == run.stdout.strip() != free
    harness_browser("-c", f"switch_tab('{free}', activate=False)")
    assert where() == free


def test_a_popup_closes_with_its_opener(page: str) -> None:
    before = tabs()
    run = harness_browser("-c", "js('!!open(\"about:blank\")'); wait(0); print(len(list_tabs()))")
    assert (run.stderr, run.stdout.strip()) == ("", str(len(before) + 2))
    wait_until(lambda: tabs() == before)


def test_an_own_tab_with_beforeunload_is_closed(page: str, site: Site) -> None:
    before = tabs()
    asks = f"goto_url('{site.url}/form'); js('onbeforeunload = event => event.preventDefault()'); click_at_xy(5, 5)"
    assert harness_browser("-c", asks).stderr == ""
    wait_until(lambda: tabs() == before)


# Names.


def test_a_name_is_a_tab_that_later_commands_find_again(free: str) -> None:
    work = where("--tab-name", "work")
    assert work != free
    assert where("--tab-name", "work") == work
    assert where("--tab-name", "other") not in (work, free)
    assert where() == free


def test_a_name_follows_the_switches_of_its_commands(free: str) -> None:
    run = harness_browser("--tab-name", "work", "-c", f"new_tab(); {WHERE}")
    assert where("--tab-name", "work") == run.stdout.strip()
    assert where() == free


def test_a_variable_names_the_tab(free: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = where("--tab-name", "work")
    monkeypatch.setenv("BU_TAB_NAME", "work")
    assert where() == work == here()


def test_a_named_tab_in_use_is_an_error_that_names_the_process(page: str) -> None:
    with spawned(STAYS, BU_TAB_NAME="work") as (process, tab):
        run = harness_browser("--tab-name", "work", "-c", "print('ran')")
        assert (run.returncode, run.stdout) == (5, "")
        assert f"the process {process.pid} is in the tab 'work'" in run.stderr
        # The error recommends --tab.
        assert where("--tab", tab) == tab
    assert where("--tab-name", "work") == tab


def test_a_named_tab_that_was_closed_is_opened_anew(free: str) -> None:
    work = where("--tab-name", "work")
    close_tab(work)
    assert where("--tab-name", "work") not in (work, free)


# Clients that end.


@contextlib.contextmanager
def spawned(program: str, **environment: str) -> Any:
    """Run the program in a process. Yield the process and the first line that it prints."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.stdin.close()
        process.wait(PATIENCE)


def test_the_tab_of_a_killed_client_is_closed(page: str) -> None:
    before = tabs()
    with spawned(STAYS) as (process, tab):
        assert tabs() == before | {tab}
        process.kill()
        wait_until(lambda: tabs() == before)


def test_a_tab_is_free_once_its_client_was_killed(free: str) -> None:
    with spawned(STAYS) as (process, tab):
        assert tab == free
        process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: where() == free)


def test_a_shared_tab_is_closed_after_both_clients(page: str) -> None:
    before = tabs()
    with spawned(STAYS) as (_, tab):
        switch_tab(tab)
    assert tab in tabs()
    assert js("6 * 7") == 42
    helpers.disconnect()
    wait_until(lambda: tabs() == before)


FORKS = """
import os, sys
from harness_ipc.browser.helpers import *
mine = current_tab()["targetId"]
child = os.fork()
if not child:
    same = current_tab()["targetId"] == mine
    sys.exit(same)
_, status = os.waitpid(child, 0)
print(status, current_tab()["targetId"] == mine, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_has_its_own_tab(page: str) -> None:
    before = tabs()
    with spawned(FORKS) as (_, line):
        assert line == "0 True"
    wait_until(lambda: tabs() == before)


HAS_A_CHILD = """
import os, sys
from harness_ipc.browser.helpers import *
print(current_tab()["targetId"], flush=True)
if not os.fork():
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_does_not_keep_its_parent_in_the_tab(page: str) -> None:
    before = tabs()
    with spawned(HAS_A_CHILD) as (process, tab):
        assert tab not in before
        process.kill()
        wait_until(lambda: tabs() == before)


# Threads.


def test_a_thread_that_opens_a_tab_stays_in_it(page: str) -> None:
    def work(number: int) -> bool:
        mine = new_tab(f"data:text/html,<title>{number}</title>")
        assert wait_for_load(PATIENCE)
        opened.wait(PATIENCE)
        return all((here(), page_info()["title"]) == (mine, str(number)) for _ in range(5))

    opened = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8
    assert here() == page


def test_a_thread_that_opens_none_is_in_the_tab_of_the_process(page: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: here(), range(4))) == [page] * 4


# Isolation.


def cookie() -> Any:
    return js("document.cookie")


def test_an_isolated_tab_has_its_own_cookies_and_storage(page: str, site: Site) -> None:
    goto_url(f"{site.url}/form")
    js("document.cookie = 'a=1'; localStorage.b = 2")
    isolated = new_tab(f"{site.url}/form", isolated=True)
    assert (cookie(), js("localStorage.b")) == ("", None)
    switch_tab(page)
    assert (cookie(), js("localStorage.b")) == ("a=1", "2")
    js("localStorage.clear()")
    close_tab(isolated)
    wait_until(lambda: cdp("Target.getBrowserContexts")["browserContextIds"] == [])


def test_a_context_ends_with_the_last_of_its_tabs(page: str) -> None:
    isolated = new_tab(isolated=True)
    before = tabs()
    assert js("!!open('about:blank')")
    (popup,) = tabs() - before
    close_tab(isolated)
    assert len(cdp("Target.getBrowserContexts")["browserContextIds"]) == 1
    close_tab(popup)
    wait_until(lambda: cdp("Target.getBrowserContexts")["browserContextIds"] == [])


def test_a_closed_tab_is_raised_once(page: str) -> None:
    mine = new_tab()
    cdp("Target.closeTarget", targetId=mine)
    with pytest.raises(TabClosed):
        page_info()
    assert here() != mine


# Several daemons on the browser of a user.


GOES_ON = """
from harness_ipc.browser.helpers import *
goto_url("data:text/html,<title>mine</title>"); print(current_tab()["targetId"], flush=True)
import sys; sys.stdin.readline()
print(current_tab()["targetId"], page_info()["title"], flush=True)
"""


def test_daemons_on_one_browser_have_tabs_of_their_own(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARNESS_CHROME_OWN")
    monkeypatch.setenv("BU_CDP_URL", other.url)
    (users,) = other.tabs()
    assert where("--name", "one") == users
    second = where("--name", "two")
    assert second != users == where("--name", "one")
    with spawned(GOES_ON, BU_NAME="one", BU_TAB_NAME="work") as (process, tab):
        assert tab not in (users, second)
        # A stop does not wait for clients that are in a tab.
        assert harness_browser("--name", "one", "--reload").stderr == ""
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == f"{tab} mine\n"
    assert {users, second} <= set(other.tabs())
