"""The browser harness: a daemon that holds one browser, and helpers that any process drives it with.

    from harness_ipc.browser.helpers import *

`helpers` asks (and imports no more than a client needs), `daemon` holds the browser, `chrome` finds or starts it, `cdp` speaks
to it, `errors` has what can go wrong, `cli` is the command `harness-browser`, and `doctor` says what is wrong. It is an
application of the public API of `harness_ipc`, as anybody could write one.
"""

from __future__ import annotations

import os

NAME = "BU_NAME"


def daemon_name() -> str:
    """Return the name of this process's browser daemon: what the variable `BU_NAME` says, else ``browser``."""
    return os.environ.get(NAME) or "browser"
