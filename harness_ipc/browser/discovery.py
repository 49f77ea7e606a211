"""Where a browser is: the one that the environment names, one that runs with its DevTools open, or one of our own.

`find` goes through them in that order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from . import WEBSOCKET, local
from .connection import Connection, ConnectionFailed, is_local, without_secret
from .errors import BrowserNotFound
from .launcher import ManagedBrowser
from .profile import ACTIVE_PORT, read_active_port
from .version import ask_websocket_url

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator

    from .connection import OnEvent

logger = logging.getLogger(__name__)

# The variables that say what browser to use.
URL = "BU_CDP_URL"
OWN = "HARNESS_CHROME_OWN"

# Where a browser that was started with --remote-debugging-port usually listens.
PORTS: tuple[int, ...] = (9222, 9223)

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
            yield Source(how, _by_variable(variable, url), address_of(url), demanded=True)
            return
    if not os.environ.get(OWN):
        for profile in map(os.path.expanduser, _PROFILES):
            if (active := read_active_port(profile)) is not None:
                how, file = f"{ACTIVE_PORT} of {profile}, port {active[0]}", os.path.join(profile, ACTIVE_PORT)
                yield Source(how, _by_active_port(profile), (local.LOOPBACK, active[0]), file)
        for port in PORTS:
            yield Source(f"port {port}", _by_port(port), (local.LOOPBACK, port))
    own = ManagedBrowser(name)
    yield Source(f"our own browser, its profile {own.profile}", own.connect, own=own)


# Browsers of others.


class _OwnerUnknown(ConnectionFailed):
    """Whom a port belongs to can't be told: a browser of ours may be there."""


def _by_variable(variable: str, url: str) -> Callable[[OnEvent], Awaitable[Connection]]:
    async def connect(on_event: OnEvent) -> Connection:
        try:
            if variable == WEBSOCKET:
                return await Connection.open(url, on_event, await _dial_named(variable, url))
            websocket = await ask_websocket_url(url, await _dial_named(variable, url))
            if not is_local(websocket):
                return await Connection.open(websocket, on_event)
            # A browser elsewhere may name its own loopback interface, which is not this machine's.
            named = is_local(url) and address_of(url)[1] == address_of(websocket)[1]
            sock = await (_dial_named(variable, websocket) if named else _dial_ours(*address_of(websocket)))
            return await Connection.open(websocket, on_event, sock)
        except ConnectionFailed as error:
            if error.must_allow:
                advice = "click Allow in the browser's window if it asks, then try again"
            else:
                advice = f"start that browser with --remote-debugging-port, mend {variable}, or unset it to use another browser"
            raise ConnectionFailed(f"{variable}: {error}; {advice}", status=error.status, waiting=error.waiting) from None

    return connect


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of `url`, or ``("", 0)`` if it has none."""
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
            return await _open_ours(active[0], active[1], on_event)
        except ConnectionFailed as error:
            if error.must_allow or isinstance(error, _OwnerUnknown):
                raise
            raise ConnectionFailed(
                f"a stale {ACTIVE_PORT} ({error}): the browser that wrote it has ended; start it again, or remove "
                f"{os.path.join(profile, ACTIVE_PORT)}"
            ) from None

    return connect


def _by_port(port: int) -> Callable[[OnEvent], Awaitable[Connection]]:
    async def connect(on_event: OnEvent) -> Connection:
        base = f"http://{local.LOOPBACK}:{port}"
        try:
            parts = urlsplit(await ask_websocket_url(base, await _dial_ours(local.LOOPBACK, port)))
            # Its host and port are what the server says: only who owns this port is known.
            path = urlunsplit(("", "", parts.path, parts.query, ""))
        except ValueError:
            path = ""
        except ConnectionFailed as error:
            # Chrome has no HTTP there for the user's own profile, but the WebSocket, which asks the user.
            if error.status != 404:
                raise
            path = "/devtools/browser"
        if not path.startswith("/"):
            raise ConnectionFailed(f"{base} is no DevTools server (its webSocketDebuggerUrl has no path)")
        return await _open_ours(port, path, on_event)

    return connect


async def _open_ours(port: int, path: str, on_event: OnEvent) -> Connection:
    sock = await _dial_ours(local.LOOPBACK, port)
    return await Connection.open(f"ws://{local.LOOPBACK}:{port}{path}", on_event, sock)


async def _dial_ours(host: str, port: int) -> socket.socket:
    """Connect to a port of this machine that belongs to this user or to root. Raises `ConnectionFailed`."""
    try:
        return await asyncio.to_thread(local.connect_to_ours, host, port)
    except local.NotOurs as error:
        kind = ConnectionFailed if error.uids else _OwnerUnknown
        raise kind(f"{error}, and was sent nothing; if you trust it, name it in {URL}") from None
    except (OSError, OverflowError, ValueError) as error:
        raise ConnectionFailed(f"{host}:{port} can't be reached ({_reason(error)})") from None


async def _dial_named(variable: str, url: str) -> socket.socket | None:
    """Connect to the address `url` of the user's if it is on this machine, and log whose it is. Raises `ConnectionFailed`."""
    host, port = address_of(url)
    if not is_local(url) or not port:
        return None
    try:
        sock, others = await asyncio.to_thread(local.connect_to_any, host, port)
    except (OSError, OverflowError, ValueError) as error:
        raise ConnectionFailed(f"{without_secret(url)} can't be reached ({_reason(error)})") from None
    if others:
        logger.warning("%s, %s, belongs to %s", variable, without_secret(url), local.describe_users(others))
    return sock


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _must_allow(source: Source, error: ConnectionFailed) -> str:
    what = "waits for you" if error.waiting else f"refuses ({error.status})"
    return (
        f"the browser of {source.how} {what}: click Allow in its window (see chrome://inspect/#remote-debugging), then try "
        f"again, or set {OWN}=1 to use a private browser"
    )
