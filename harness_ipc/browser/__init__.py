"""The browser harness: a daemon that holds one browser, and helpers with which any process controls it.

    from harness_ipc.browser.helpers import *

Clients: `helpers` are the methods of a default `tab.Tab` as functions. Their modules are imported when needed: `pages`,
`javascript`, `keyboard`, `mouse`, `dialogs`, `cookies`, `http`, `downloads`, `screenshot` with `png`, `snapshot`, `find`, and
`elements` with `nodes` and `scripts`; `arguments` validates arguments. `cli` is the command `harness-browser`, with the options
in `command_line`; `own_imports` keeps the user's directory out of our imports, and `doctor` finds problems.

The daemon: `daemon` routes requests and events to its parts (base class in `part`): `sessions` (with `choosing`), `logins`,
`gone`, `tabs`, `frames`, `events`, `download_events`, and `accessibility`, which reads a page (`dom`), formats it (`tree`),
searches it (`matching`) and keeps `references` to its nodes. `discovery` finds a browser: `requested` by the environment, at
one of the `addresses`, with the owner of a port from `local` and its WebSocket from `version`. `launcher` starts a `program`
in a `profile`, perhaps on a `display`; `reasons` explains why it failed. `connection` communicates by WebSocket or `pipe`.

Both raise `errors`, and use only the public API of harness_ipc.
"""

from __future__ import annotations

import os
import sys

from harness_ipc import IncompatibleDaemon, StartFailed, __version__

NAME = "BU_NAME"
TAB_NAME = "BU_TAB_NAME"
# Recorded by the daemon: a daemon of the same name may belong to another program.
APP_VERSION = f"harness-browser {__version__}"

# The default timeout of a helper, in seconds.
TIMEOUT = 30.0
# The default timeout of a CDP call in seconds, as of a request of a `harness_ipc.Client`.
CALL_TIMEOUT = 60.0
# Bytes. Chrome sends at most this in one message (kSendBufferSizeForDevTools in devtools_http_handler.cc).
MAX_MESSAGE = 256 * 1024 * 1024
# Characters that the daemon keeps of a text in an event or a dialog. Chrome limits a dialog's message to 10,240.
MAX_TEXT = 16 * 1024
# The longest timeout in seconds, thirty years: infinity is not JSON, and a larger integer may overflow.
LONGEST = 1e9
# As a session_id: the browser itself.
BROWSER = "browser"
# CDP domains of the browser itself: without a session, their methods go to the browser.
BROWSER_DOMAINS = ("Target.", "SystemInfo.", "Tethering.")
# URL schemes of pages of the browser or of tools.
INTERNAL = ("chrome:", "chrome-untrusted:", "chrome-extension:", "devtools:", "edge:", "brave:", "about:")


def daemon_name() -> str:
    """Return the name of this process's browser daemon: the variable `BU_NAME`, by default ``browser``."""
    return os.environ.get(NAME) or "browser"


def is_browser_daemon(app_version: str | None) -> bool:
    """Return whether a daemon with this `app_version` is a browser daemon, of any version."""
    return (app_version or "").startswith("harness-browser ")


def wrong_daemon(name: str) -> IncompatibleDaemon:
    """Return the error for a daemon of another program."""
    return IncompatibleDaemon(f"the running daemon {name!r} belongs to another program: choose another --name, or {NAME}")


def check_extra() -> None:
    """Raise `StartFailed` if the extra ``browser`` is not installed."""
    from importlib.util import find_spec

    if find_spec("websockets") is None:
        raise StartFailed(f"the browser part is not installed: run {sys.executable} -m pip install 'harness-ipc[browser]'")
