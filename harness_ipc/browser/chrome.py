"""Where a browser is: the one that the environment names, one that runs with its DevTools open, or one of our own.

`find` goes through them in that order.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from . import WEBSOCKET
from .cdp import Connection, ConnectionFailed, is_local, without_secret
from .errors import BrowserNotFound
from .launcher import ManagedBrowser
from .profile import ACTIVE_PORT, read_active_port

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from .cdp import OnEvent

logger = logging.getLogger(__name__)

# The variables that say what browser to use.
URL = "BU_CDP_URL"
OWN = "HARNESS_CHROME_OWN"

# Where a browser that was started with --remote-debugging-port usually listens.
PORTS = (9222, 9223)
# Seconds for a DevTools server to answer a small HTTP request: a local one takes milliseconds.
_HTTP_TIMEOUT = 5.0

if sys.platform == "win32":
    _PROFILES = [
        f"~/AppData/Local/{place}/User Data"
        for place in (
            "Google/Chrome",
            "Google/Chrome Beta",
            "Google/Chrome SxS",
            "Chromium",
            "Microsoft/Edge",
            "Microsoft/Edge Beta",
            "BraveSoftware/Brave-Browser",
        )
    ]
elif sys.platform == "darwin":
    _PROFILES = [
        f"~/Library/Application Support/{place}"
        for place in (
            "Google/Chrome",
            "Google/Chrome Beta",
            "Google/Chrome Canary",
            "Chromium",
            "Microsoft Edge",
            "Microsoft Edge Beta",
            "BraveSoftware/Brave-Browser",
        )
    ]
else:
    _PROFILES = [
        f"~/{place}"
        for place in (
            ".config/google-chrome",
            ".config/google-chrome-beta",
            ".config/chromium",
            ".config/microsoft-edge",
            ".config/microsoft-edge-beta",
            ".config/BraveSoftware/Brave-Browser",
            ".var/app/com.google.Chrome/config/google-chrome",
            ".var/app/org.chromium.Chromium/config/chromium",
            "snap/chromium/common/chromium",
        )
    ]


@dataclass(frozen=True, slots=True)
class Source:
    """A browser that may be there. `how` says for people where it was found."""

    how: str
    # Raises `BrowserNotFound`. Called again to re-make a lost connection.
    connect: Callable[[OnEvent], Awaitable[Connection]]
    # Where it listens, of a browser that is not ours.
    address: tuple[str, int] | None = None
    # The file that says so.
    file: str | None = None
    # Whether nothing but this one will do: what keeps it from being used is an error then, and not the next one's turn.
    demanded: bool = False
    own: ManagedBrowser | None = None


async def find(name: str, on_event: OnEvent) -> tuple[Source, Connection]:
    """Return a browser for the daemon `name` and the connection to it, the first of `sources` that is there.

    Raises `BrowserNotFound`, its text in one line.
    """
    seen = ""
    for source in sources(name):
        try:
            connection = await source.connect(on_event)
        except ConnectionFailed as error:
            if source.demanded or source.own is not None:
                raise
            if error.must_allow:
                raise BrowserNotFound(_must_allow(source, error)) from None
            seen = f"{source.how}: {error}"
            logger.info("not usable, %s", seen)
        except BrowserNotFound as error:
            raise BrowserNotFound(f"{error}{f' (also seen: {seen})' if seen else ''}") from None
        else:
            logger.info("connected to %s", source.how)
            return source, connection
    raise AssertionError("an own browser is the last one, and raises")


def sources(name: str) -> Iterator[Source]:
    """Yield what may be the browser of the daemon `name`, in order. Looks only at files; connects to nothing."""
    for variable in (WEBSOCKET, URL):
        if url := os.environ.get(variable):
            how = f"{variable}, {without_secret(url)}"
            yield Source(how, _by_variable(variable, url), _address(url), demanded=True)
            return
    if not os.environ.get(OWN):
        for profile in map(os.path.expanduser, _PROFILES):
            if (active := read_active_port(profile)) is not None:
                how, file = f"{ACTIVE_PORT} of {profile}, port {active[0]}", os.path.join(profile, ACTIVE_PORT)
                yield Source(how, _by_active_port(profile), ("127.0.0.1", active[0]), file)
        for port in PORTS:
            yield Source(f"port {port}", _by_port(port), ("127.0.0.1", port))
    own = ManagedBrowser(name)
    yield Source(f"our own browser, its profile {own.profile}", own.connect, own=own)


# Browsers of others.


def _by_variable(variable: str, url: str) -> Callable[[OnEvent], Awaitable[Connection]]:
    async def connect(on_event: OnEvent) -> Connection:
        try:
            websocket = url if variable == WEBSOCKET else await asyncio.to_thread(_websocket_url, url)
            return await Connection.open(websocket, on_event)
        except ConnectionFailed as error:
            if error.must_allow:
                advice = "click Allow in the browser's window if it asks, then try again"
            else:
                advice = f"start that browser with --remote-debugging-port, mend {variable}, or unset it to use another browser"
            raise ConnectionFailed(f"{variable}: {error}; {advice}", status=error.status, waiting=error.waiting) from None

    return connect


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or (443 if parts.scheme in ("https", "wss") else 80)
    except ValueError:
        return "", 0


def _by_active_port(profile: str) -> Callable[[OnEvent], Awaitable[Connection]]:
    async def connect(on_event: OnEvent) -> Connection:
        active = read_active_port(profile)
        if active is None:
            raise ConnectionFailed(f"{profile} has no {ACTIVE_PORT} any more: start the browser")
        try:
            return await Connection.open(f"ws://127.0.0.1:{active[0]}{active[1]}", on_event)
        except ConnectionFailed as error:
            if error.must_allow:
                raise
            raise ConnectionFailed(
                f"a stale {ACTIVE_PORT} ({error}): the browser that wrote it has ended; start it again, or remove "
                f"{os.path.join(profile, ACTIVE_PORT)}"
            ) from None

    return connect


def _by_port(port: int) -> Callable[[OnEvent], Awaitable[Connection]]:
    async def connect(on_event: OnEvent) -> Connection:
        try:
            url = await asyncio.to_thread(_websocket_url, f"http://127.0.0.1:{port}")
        except ConnectionFailed as error:
            # Chrome has no HTTP there for the user's own profile, but the WebSocket, which asks the user.
            if error.status != 404:
                raise
            url = f"ws://127.0.0.1:{port}/devtools/browser"
        return await Connection.open(url, on_event)

    return connect


def _must_allow(source: Source, error: ConnectionFailed) -> str:
    what = "waits for you" if error.waiting else f"refuses ({error.status})"
    return (
        f"the browser of {source.how} {what}: click Allow in its window (see chrome://inspect/#remote-debugging), then try "
        f"again, or set {OWN}=1 to use a private browser"
    )


def _websocket_url(base: str) -> str:
    """Ask a DevTools server for its WebSocket. Raises `ConnectionFailed`."""
    place = without_secret(base)
    try:
        parts = urlsplit(base)
        host = parts.netloc.rpartition("@")[2]
        path = f"{parts.path.rstrip('/')}/json/version"
        request = urllib.request.Request(urlunsplit((parts.scheme, host, path, parts.query, "")))  # noqa: S310 - checked next
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConnectionFailed(f"{place} is no address of DevTools: it begins with http:// or https://")
        if parts.username is not None:
            words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            request.add_header("Authorization", f"Basic {base64.b64encode(words.encode()).decode()}")
        # An environment's proxy can't know this machine's own ports.
        proxies = urllib.request.ProxyHandler({} if is_local(base) else None)
        with urllib.request.build_opener(proxies).open(request, timeout=_HTTP_TIMEOUT) as reply:
            return str(json.load(reply)["webSocketDebuggerUrl"])
    except urllib.error.HTTPError as error:
        raise ConnectionFailed(f"{place} answered {error.code} to /json/version", status=error.code) from None
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        if isinstance(error, ConnectionFailed):
            raise
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise ConnectionFailed(f"{place} has not answered for {_HTTP_TIMEOUT:g} s", waiting=True) from None
        if reason is not error:
            raise ConnectionFailed(f"{place} can't be reached ({getattr(reason, 'strerror', None) or reason})") from None
        # Not its text: that may be the address.
        raise ConnectionFailed(f"{place} is no DevTools server ({type(error).__name__})") from None
