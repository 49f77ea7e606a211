"""Secrets are not logged at any level: queries of URLs, typed text, cookies and passwords."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import ensure_daemon, log_path, stop_daemon
from harness_ipc.browser import helpers
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = needs_chromium

SECRET = "hush-4711"
TALKATIVE = "import logging\nlogging.getLogger().setLevel(logging.DEBUG)\nfrom harness_ipc.browser import daemon\ndaemon.main()"


@pytest.mark.usefixtures("attached")
def test_the_log_has_nothing_of_what_is_said_to_a_page(site: Site, tmp_path: Path) -> None:
    ensure_daemon("browser", [sys.executable, "-W", "error", "-c", TALKATIVE, "browser"])
    url = f"{site.url}/form?token={SECRET}"
    visit(url)
    helpers.set_cookies([{"name": "session", "value": SECRET, "url": site.url}])
    assert [cookie["value"] for cookie in helpers.cookies()] == [SECRET]
    helpers.fill_input("#word", SECRET)
    helpers.click("#word")
    helpers.type_text(SECRET)
    helpers.press_key("Enter")
    assert helpers.page_info()["title"] == f"sent {SECRET * 2}"
    assert SECRET in helpers.snapshot()
    helpers.find(text=SECRET)
    assert helpers.http_get(url, {"Authorization": SECRET}, cookies=True)
    helpers.js(f"setTimeout(() => prompt('{SECRET}'))")
    with pytest.raises(helpers.DialogOpen, match=SECRET):
        helpers.js("new Promise(() => {})", timeout=PATIENCE)
    helpers.handle_dialog(True, SECRET)
    other = helpers.new_tab(f"{site.url}/private?{SECRET}")
    helpers.wait_for_load(PATIENCE)
    with contextlib.suppress(helpers.LoginFailed):
        helpers.handle_login("Ada", SECRET, timeout=PATIENCE)
    helpers.close_tab(other)
    helpers.switch_tab(helpers.new_tab(url))
    with helpers.wait_for_download(tmp_path, timeout=PATIENCE):
        helpers.js(f"{{const a = document.createElement('a'); a.href = 'data:,{SECRET}'; a.download = '{SECRET}'; a.click()}}")
    failures: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (helpers.goto_url, (f"http://127.0.0.1:1/?{SECRET}",)),
        (helpers.js, (f"throw Error('{SECRET}')",)),
        (helpers.click, (f"#{SECRET}",)),
        (helpers.cdp, (f"{SECRET}.enable",)),
        (helpers.switch_tab, (SECRET,)),
    ]
    for helper, arguments in failures:
        with contextlib.suppress(helpers.BrowserError):
            helper(*arguments)
    helpers.connect().request({"meta": SECRET, "method": [SECRET]})
    helpers.connect().request({"method": SECRET, "params": SECRET})
    helpers.drain_events()
    helpers.disconnect()
    assert stop_daemon("browser")
    log = log_path("browser").read_text(encoding="utf-8")
    assert " DEBUG " in log
    assert [line for line in log.splitlines() if SECRET in line] == []
