"""Finds a browser: the one named by the environment, else one that runs with its DevTools open, else a managed one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit, urlunsplit

from harness_ipc import report

from . import local
from .addresses import UnusableProxy, address_of, find_proxy, is_local, make_url, with_host, without_secret
from .connection import Connection, ConnectionFailed, ProxyFailed, reason_of
from .errors import BrowserError, BrowserNotFound
from .launcher import ManagedBrowser
from .profile import ACTIVE_PORT, read_active_port
from .requested import OWN, URL, WEBSOCKET, wants_managed
from .version import TIMEOUT, ask_websocket_url

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from typing import Any

    from .connection import OnEvent

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# The usual values of --remote-debugging-port.
PORTS: tuple[int, ...] = (9222, 9223)

# Errors on a machine without IPv6.
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH)
# Seconds for a browser to answer an HTTP request. A server that takes longer is not a browser.
_ASK_TIMEOUT = 2.0
# Seconds after which the browser may be waiting for its user.
_SILENCE = 1.0
# Seconds to resolve a name, to check that it is local.
_RESOLVE_TIMEOUT = 2.0

# The profile directories of browsers, relative to the system's directory for them.
if sys.platform == "win32":
    _PLACE = "~/AppData/Local"
    _PROFILES = [
        *(f"Google/Chrome{channel}/User Data" for channel in ("", " Beta", " Dev", " SxS")),
        *(f"Microsoft/Edge{channel}/User Data" for channel in ("", " Beta", " Dev", " SxS")),
        *(f"BraveSoftware/Brave-Browser{channel}/User Data" for channel in ("", "-Beta", "-Nightly")),
        *(f"{name}/User Data" for name in ("Chromium", "Arc", "Dia", "Perplexity/Comet", "Vivaldi")),
        "Packages/TheBrowserCompany.Arc_ttt1ap7aakyb4/LocalCache/Local/Arc/User Data",
        *(f"../Roaming/Opera Software/{name}" for name in ("Opera Stable", "Opera GX Stable")),
    ]
elif sys.platform == "darwin":
    _PLACE = "~/Library/Application Support"
    _PROFILES = [
        *(f"Google/Chrome{channel}" for channel in ("", " Beta", " Dev", " Canary")),
        *(f"Microsoft Edge{channel}" for channel in ("", " Beta", " Dev", " Canary")),
        *(f"BraveSoftware/Brave-Browser{channel}" for channel in ("", "-Beta", "-Nightly")),
        *("Chromium", "Arc/User Data", "Dia/User Data", "Comet", "Perplexity/Comet", "Vivaldi"),
        *(f"com.operasoftware.{name}" for name in ("Opera", "OperaGX")),
    ]
else:
    _PLACE = "~"
    _CONFIG = [
        *(f"google-chrome{channel}" for channel in ("", "-beta", "-unstable")),
        *(f"microsoft-edge{channel}" for channel in ("", "-beta", "-dev")),
        *(f"BraveSoftware/Brave-Browser{channel}" for channel in ("", "-Beta", "-Nightly")),
        *("chromium", "vivaldi", "opera", "comet", "arc", "dia"),
    ]
    _FLATPAKS = {
        "com.google.Chrome": "google-chrome",
        "com.google.ChromeDev": "google-chrome-unstable",
        "org.chromium.Chromium": "chromium",
        "io.github.ungoogled_software.ungoogled_chromium": "chromium",
        "com.microsoft.Edge": "microsoft-edge",
        "com.brave.Browser": "BraveSoftware/Brave-Browser",
        "com.vivaldi.Vivaldi": "vivaldi",
        "com.opera.Opera": "opera",
    }
    _PROFILES = [
        *(f".config/{name}" for name in _CONFIG),
        *(f".var/app/{flatpak}/config/{name}" for flatpak, name in _FLATPAKS.items()),
        *("snap/chromium/common/chromium", "snap/brave/current/.config/BraveSoftware/Brave-Browser"),
    ]


@dataclass(frozen=True, slots=True)
class Source:
    """A browser that may exist. `how` describes where it was found."""

    how: str
    # Raises `BrowserNotFound`. Called again to reconnect.
    connect: Callable[[OnEvent], Awaitable[Connection]]
    # Checks whether `connect` would succeed, without prompting the browser's user. Raises `ConnectionFailed`.
    probe: Callable[[], Coroutine[Any, Any, object]] | None = None
    # The file with its port.
    file: str | None = None
    # The variable that requires this browser, and its address: if it can't be used, that is an error.
    named: tuple[str, str] | None = None
    own: ManagedBrowser | None = None


async def find(name: str, on_event: OnEvent) -> tuple[Source, Connection]:
    """Return a browser for the daemon `name`, the first of `sources` that can be connected, and the connection.

    Raises `BrowserNotFound`, with a text of one line.
    """
    seen = ""
    for source in sources(name):
        try:
            connection = await source.connect(on_event)
        except ConnectionFailed as error:
            if source.named is not None or source.own is not None:
                raise BrowserNotFound(str(error)) from None
            if error.must_allow:
                raise BrowserNotFound(_must_allow(source, error)) from None
            logger.info("not usable, %s: %s", source.how, error)
            if not isinstance(error, NotListening):
                seen = f"{source.how}: {error}"
        except BrowserNotFound as error:
            raise BrowserNotFound(f"{error}{f' (also seen: {seen})' if seen else ''}") from None
        else:
            logger.info("connected to %s", source.how)
            return source, connection
    raise AssertionError("the last source is a managed browser, which raises")


def sources(name: str) -> Iterator[Source]:
    """Yield possible browsers for the daemon `name`, in order. Reads files, but connects to nothing."""
    for variable in (WEBSOCKET, URL):
        if url := os.environ.get(variable):
            how = f"{variable}, {without_secret(url)}"
            named = _NamedBrowser(variable, url)
            yield Source(how, named.connect, named.probe, named=(variable, url))
            return
    if not wants_managed(os.environ):
        for profile in (os.path.normpath(os.path.expanduser(f"{_PLACE}/{name}")) for name in _PROFILES):
            if (active := read_active_port(profile)) is not None:
                how, file = f"{ACTIVE_PORT} of {profile}, port {active[0]}", os.path.join(profile, ACTIVE_PORT)
                found = _FoundBrowser(how, active[0], profile)
                yield Source(how, found.connect, found.probe, file)
        for port in PORTS:
            found = _FoundBrowser(f"port {port}", port)
            yield Source(found.how, found.connect, found.probe)
    own = ManagedBrowser(name)
    yield Source(f"our own browser, its profile {own.profile}", own.connect, own=own)


# Browsers that are not managed.


class NotListening(ConnectionFailed):
    """Nothing listens there."""


class OwnerUnknown(ConnectionFailed):
    """The owner of a port is unknown: it may be this user's browser."""


class _NamedBrowser:
    """The browser at the address `url` in the environment variable `variable`."""

    def __init__(self, variable: str, url: str) -> None:
        self._variable = variable
        self._url = url

    async def connect(self, on_event: OnEvent) -> Connection:
        return await self._use(lambda url: self._open(url, on_event))

    async def probe(self) -> None:
        await self._use(self._probe)

    async def _use(self, use: Callable[[str], Awaitable[_T]]) -> _T:
        """Call `use` with the address, or with its host resolved if the browser requires that. Raises `ConnectionFailed`."""
        try:
            try:
                return await use(self._url)
            except ConnectionFailed as error:
                if not error.refuses_name:
                    raise
                address = await asyncio.to_thread(local.to_address, *address_of(self._url))
                return await use(with_host(self._url, address))
        except ProxyFailed as error:
            raise ConnectionFailed(f"{self._variable}: {error}") from None
        except ConnectionFailed as error:
            if error.must_allow:
                advice = "click Allow in the browser's window if it asks, then try again"
            else:
                variable = self._variable
                advice = f"start that browser with --remote-debugging-port, fix {variable}, or unset it to use another browser"
            text = f"{self._variable}: {error}; {advice}"
            raise ConnectionFailed(text, status=error.status, waiting=error.waiting) from None

    async def _probe(self, url: str) -> None:
        if self._variable == URL:
            await ask_websocket_url(url, await self._dial(url))
            return
        try:
            if urlsplit(url).scheme not in ("ws", "wss") or not address_of(url)[0]:
                raise ValueError(url)
            proxy = find_proxy(url)
        except UnusableProxy as error:
            raise ProxyFailed(f"{without_secret(url)} can't be reached: {error}") from None
        except ValueError:
            text = f"{without_secret(url)} is not a DevTools address: it must begin with ws:// or wss://"
            raise ConnectionFailed(text) from None
        # A handshake could prompt the browser's user.
        if (sock := await self._dial(url, anywhere=proxy is None)) is not None:
            sock.close()

    async def _open(self, url: str, on_event: OnEvent) -> Connection:
        websocket = await ask_websocket_url(url, await self._dial(url)) if self._variable == URL else url
        # A remote browser may return an address of its own loopback interface.
        if is_local(websocket) and not (is_local(url) and address_of(url)[1] == address_of(websocket)[1]):
            sock: socket.socket | None = await _dial_ours(*address_of(websocket))
        else:
            sock = await self._dial(websocket)
        how = f"{self._variable}, {without_secret(url)}"
        return await _report_silence(how, Connection.open(websocket, on_event, sock))

    async def _dial(self, url: str, *, anywhere: bool = False) -> socket.socket | None:
        """Connect to the address if it is local, or `anywhere`, and log a foreign owner. Return None otherwise."""
        host, port = address_of(url)
        if not host or not port or not (anywhere or is_local(url) or await _is_here(host, port)):
            return None
        try:
            sock, others = await asyncio.to_thread(local.connect_to_any, host, port)
        except (OSError, OverflowError, ValueError) as error:
            raise ConnectionFailed(f"{without_secret(url)} can't be reached ({reason_of(error)})") from None
        if others:
            logger.warning("%s, %s, belongs to %s", self._variable, without_secret(url), local.describe_users(others))
        return sock


class _FoundBrowser:
    """A browser that may listen at a local `port`; found in the `profile`, which has the path too, or None."""

    def __init__(self, how: str, port: int, profile: str | None = None) -> None:
        self.how = how
        self._port = port
        self._profile = profile

    async def connect(self, on_event: OnEvent) -> Connection:
        if self._profile is None:
            host, path = await self.probe()
            return await self._open(host, self._port, path or "/devtools/browser", on_event)
        # The browser may have been restarted meanwhile.
        active = read_active_port(self._profile)
        if active is None:
            raise ConnectionFailed(f"{self._profile} has no {ACTIVE_PORT} any more: start the browser")
        self._port, path = active
        try:
            host, _ = await self.probe()
            return await self._open(host, self._port, path, on_event)
        except ConnectionFailed as error:
            if error.must_allow or isinstance(error, OwnerUnknown):
                raise
            raise ConnectionFailed(
                f"a stale {ACTIVE_PORT} ({error}): the browser that wrote it has ended; start it again, or remove "
                f"{os.path.join(self._profile, ACTIVE_PORT)}"
            ) from None

    async def probe(self) -> tuple[str, str | None]:
        """Return the host and the WebSocket's path, which is None without HTTP, as for a Chrome that prompts its user."""
        problem: ConnectionFailed | None = None
        for host in local.LOOPBACKS:
            try:
                return host, await self._ask(host)
            except ConnectionFailed as error:
                # Prefer the problem of an address where something listens.
                if problem is None or (isinstance(problem, NotListening) and not isinstance(error, NotListening)):
                    problem = error
        assert problem is not None
        raise problem

    async def _ask(self, host: str) -> str | None:
        base = make_url("http", host, self._port)
        try:
            # Use only its path: the owner is checked only for this port.
            answer = await ask_websocket_url(base, await _dial_ours(host, self._port), timeout=_ASK_TIMEOUT)
            parts = urlsplit(answer)
            path = urlunsplit(("", "", parts.path, parts.query, ""))
        except ValueError:
            path = ""
        except ConnectionFailed as error:
            if isinstance(error, OwnerUnknown | NotListening):
                raise
            if error.status == 404 and await asyncio.to_thread(local.is_browser, self._port) is not False:
                return None
            # Without the status: this is not a browser, so its user need not allow anything.
            raise ConnectionFailed(str(error)) from None
        if not path.startswith("/"):
            raise ConnectionFailed(f"{base} is not a DevTools server (its webSocketDebuggerUrl has no path)")
        return path

    async def _open(self, host: str, port: int, path: str, on_event: OnEvent) -> Connection:
        sock = await _dial_ours(host, port)
        url = make_url("ws", host, port, path)
        connection = await _report_silence(self.how, Connection.open(url, on_event, sock))
        try:
            # Other servers have WebSockets too.
            await connection.call("Browser.getVersion", timeout=TIMEOUT)
        except BaseException as error:
            await connection.close()
            if not isinstance(error, BrowserError):
                raise
            raise ConnectionFailed(f"{without_secret(url)} opens a WebSocket, but is not a browser ({error})") from None
        return connection


async def _report_silence(how: str, opening: Coroutine[Any, Any, Connection]) -> Connection:
    """Wait for a connection. Report if it takes long, since the browser may be prompting its user."""
    task = asyncio.ensure_future(opening)
    try:
        if not (await asyncio.wait({task}, timeout=_SILENCE))[0]:
            logger.info("%s does not answer yet: it may be asking its user", how)
            await report(f"the browser of {how} waits for you: click Allow in its window if it asks")
        return await task
    except asyncio.CancelledError:
        task.cancel()
        raise


async def _is_here(host: str, port: int) -> bool:
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(asyncio.to_thread(local.is_here, host, port), _RESOLVE_TIMEOUT)
    return False


async def _dial_ours(host: str, port: int) -> socket.socket:
    """Connect to a local port that belongs to this user or to root. Raises `ConnectionFailed`."""
    try:
        return await asyncio.to_thread(local.connect_to_ours, host, port)
    except local.NotOurs as error:
        kind = ConnectionFailed if error.uids else OwnerUnknown
        raise kind(f"{error}, and was sent nothing; if you trust it, name it in {URL}") from None
    except (OSError, OverflowError, ValueError) as error:
        refused = isinstance(error, ConnectionRefusedError) or getattr(error, "errno", None) in _NO_SUCH_ADDRESS
        kind = NotListening if refused else ConnectionFailed
        raise kind(f"{host}:{port} can't be reached ({reason_of(error)})") from None


def _must_allow(source: Source, error: ConnectionFailed) -> str:
    what = "waits for you" if error.waiting else f"refuses ({error.status})"
    return (
        f"the browser of {source.how} {what}: click Allow in its window (see chrome://inspect/#remote-debugging), then try "
        f"again, or set {OWN}=1 to use a private browser"
    )
