"""A process that uses the browser: ``python -m tests.browser.driver look``, or ``drive SITE SECONDS NAME...``.

It drives a tab for each name; several names are driven in threads.

It prints "ready", starts when it reads a line, and prints one line of JSON at its end.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness_ipc.browser import helpers
from harness_ipc.browser.tab import Browser

# Take a screenshot every 10 rounds, and switch to another tab every 3.
SCREENSHOT = 10
EXCURSION = 3


def look() -> dict[str, Any]:
    """Return the page and the pids of daemon and browser. It may start both."""
    url = helpers.page_info()["url"]
    client = helpers.connect()
    return {"url": url, "daemon": client.pid, "browser": client.request({"meta": "connection_status"})["pid"]}


def open_tab(browser: Browser, name: str) -> Any:
    """Open a tab in one of four ways, chosen by the last digit of the name."""
    match int(name[-1]) % 4:
        case 0:
            return browser.new_tab()
        case 1:
            return browser.new_tab(isolated=True)
        case 2:
            return browser.tab(name)
        case _:
            helpers.new_tab()
            return helpers


def drive_all(site: str, seconds: float, names: list[str]) -> list[int]:
    """Drive a tab for each name. Return the number of rounds of each."""
    end = time.monotonic() + seconds
    with Browser() as browser:
        if len(names) == 1:
            return [drive(open_tab(browser, names[0]), site, names[0], end)]
        with ThreadPoolExecutor(len(names)) as pool:
            return list(pool.map(lambda name: drive(open_tab(browser, name), site, name, end), names))


def drive(tab: Any, site: str, name: str, end: float) -> int:
    """Work in a `Tab` or the module `helpers` until `end`. Fail if it shows anything of another driver."""
    target = tab.current_tab()["targetId"]
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        word = f"{name} in round {rounds}"
        url = f"{site}/form?{name}-{rounds}"
        tab.goto_url(url)
        check(tab.wait_for_load(60.0), True)
        tab.js("document.querySelector('#word').focus()")
        tab.type_text(word)
        check(tab.js("document.querySelector('#word').value"), word)
        page = tab.page_info()
        check((page["url"], page["title"]), (url, "A form"))
        if rounds % 2:
            tab.click_at_xy(120, 100)
        else:
            tab.click("#send")
        page = tab.page_info()
        check((page["url"], page["title"]), (url, f"sent {word}"))
        here = tab.current_tab()
        check((here["targetId"], here["url"]), (target, url))
        if rounds % SCREENSHOT == 0:
            clip = {"x": 0, "y": 0, "width": 240, "height": 130, "scale": 0.5}
            picture = base64.b64decode(tab.cdp("Page.captureScreenshot", format="png", clip=clip)["data"])
            # Width and height are in the header (PNG specification, 11.2.2).
            check((picture[:8], picture[16:24]), (b"\x89PNG\r\n\x1a\n", (120).to_bytes(4) + (65).to_bytes(4)))
        if rounds % EXCURSION == 0:
            other = f"{site}/inner?{name}-{rounds}"
            tab.new_tab(other)
            check(tab.wait_for_load(60.0), True)
            check(tab.js("location.href + document.querySelector('#here').innerText"), f"{other}inside")
            tab.switch_tab(target)
            check(tab.js("document.title"), f"sent {word}")
            tab.close_tab(next(found for found in tab.list_tabs() if found["url"] == other))
        rounds += 1
    tab.close_tab()
    return rounds


def check(found: Any, expected: Any) -> None:
    assert found == expected, f"{found!r} instead of {expected!r}"


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    if sys.argv[1] == "look":
        print(json.dumps(look()))
    else:
        print(json.dumps(drive_all(sys.argv[2], float(sys.argv[3]), sys.argv[4:])))
