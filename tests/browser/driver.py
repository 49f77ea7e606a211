"""A process that uses the browser: ``python -m tests.browser.driver look``, or ``drive SITE NAME SECONDS``.

It prints "ready", starts when it reads a line, and prints one line of JSON at its end.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from typing import Any

from harness_ipc.browser import helpers

# Rounds between two screenshots.
SCREENSHOT = 10


def look() -> dict[str, Any]:
    """Query the page and the daemon: the first use on a cold machine."""
    url = helpers.page_info()["url"]
    client = helpers.connect()
    return {"url": url, "daemon": client.pid, "browser": client.request({"meta": "connection_status"})["pid"]}


def drive(site: str, name: str, seconds: float) -> dict[str, Any]:
    """Open a tab and work in it for `seconds`. Fail if it shows anything of another process."""
    tab = helpers.new_tab()
    end = time.monotonic() + seconds
    rounds = screenshots = 0
    while rounds == 0 or time.monotonic() < end:
        word = f"{name} in round {rounds}"
        url = f"{site}/form?{name}-{rounds}"
        helpers.goto_url(url)
        check(helpers.wait_for_load(60.0), True)
        helpers.js("document.querySelector('#word').focus()")
        helpers.type_text(word)
        check(helpers.js("document.querySelector('#word').value"), word)
        page = helpers.page_info()
        check((page["url"], page["title"]), (url, "A form"))
        helpers.click_at_xy(120, 100)
        page = helpers.page_info()
        check((page["url"], page["title"]), (url, f"sent {word}"))
        here = helpers.current_tab()
        check((here["targetId"], here["url"]), (tab, url))
        if rounds % SCREENSHOT == 0:
            clip = {"x": 0, "y": 0, "width": 240, "height": 130, "scale": 0.5}
            picture = base64.b64decode(helpers.cdp("Page.captureScreenshot", format="png", clip=clip)["data"])
            # Its size is in its head (PNG specification, 11.2.2).
            check((picture[:8], picture[16:24]), (b"\x89PNG\r\n\x1a\n", (120).to_bytes(4) + (65).to_bytes(4)))
            screenshots += 1
        rounds += 1
    helpers.close_tab()
    return {"rounds": rounds, "screenshots": screenshots}


def check(found: Any, expected: Any) -> None:
    assert found == expected, f"{found!r} instead of {expected!r}"


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    if sys.argv[1] == "look":
        print(json.dumps(look()))
    else:
        print(json.dumps(drive(sys.argv[2], sys.argv[3], float(sys.argv[4]))))
