"""A tab: a client's requests to the daemon, over one connection, for one tab of the browser.

The daemon is started if necessary. Functions that act on a page are in other modules, and have the tab as their first
parameter: `Tab` has them as methods. Modules that `page_info` does not need are imported on first use.
"""

from __future__ import annotations

import os

from . import BROWSER_DOMAINS, LONGEST, TIMEOUT, daemon_name, javascript, pages
from .arguments import check_seconds, check_text
from .errors import CDPError, DialogOpen, TabClosed, from_reply
from .own_imports import without_program_directory
from .place import START_TIMEOUT, Connection, Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, Self

    from harness_ipc import Client

    from . import cookies, dialogs, downloads, elements, event_stream, find, http, keyboard, mouse, nodes, screenshot, snapshot

# Seconds that the client waits beyond a timeout: the daemon enforces it, with a better error.
_GRACE_PERIOD = 2.0

# Methods and verbs that do no harm in another tab than the caller expects.
_SAFE_IN_ANY_TAB = {"Page.navigate", "current_tab", "drain_events", "pending_dialog"}


class Browser:
    """The browser of a daemon: `new_tab` and `tab` return its tabs. A forked child opens its own connection and tabs.

    ```python
    with Browser() as browser, browser.new_tab("https://example.org") as tab:
        print(tab.page_info()["title"])
    ```

    `name` is that of the daemon, which is started on first use; the default is the variable `BU_NAME` at that time.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = name
        self._connection = Connection()

    @property
    def connection(self) -> Connection:
        """The connection of this process, which may not be open yet."""
        if self._connection.pid != os.getpid():
            self._connection = Connection()
        return self._connection

    def connect(self, *, timeout: float = START_TIMEOUT, on_progress: Callable[[Any], object] | None = None) -> Client:
        """Return the client of the daemon, which is started if it does not run, or restarted if its browser is gone.

        `on_progress` is called with a text if the start waits for the browser's user. Raises `StartFailed` (of harness_ipc)
        with the reason, `IncompatibleDaemon` if the daemon belongs to another program, `BrowserMismatch` if it holds another
        browser than the environment asks for, and what `ensure_daemon` does.
        """
        return self.connection.connect(self._name or daemon_name(), timeout, on_progress)

    def new_tab(self, url: str = "about:blank", *, isolated: bool = False, background: bool = False, keep: bool = False) -> Tab:
        """Open a tab for this process. It is closed by its `close`, by that of this object, and at the end of the process.

        An `isolated` tab has its own cookies and storage; a `background` tab is not shown; with `keep`, it stays open. Raises
        what `goto_url` does.
        """
        tab = Tab(self, {"new": True, "isolated": isolated, "background": background, "keep": keep, "alone": True})
        tab.enter()
        if url != "about:blank":
            tab.goto_url(url)
        return tab

    def tab(self, name: str) -> Tab:
        """Return the tab of that name, which is opened on first use and stays open: see `--tab-name`.

        Raises `TabInUse` if another process is in it.
        """
        tab = Tab(self, {"name": name})
        tab.enter()
        return tab

    def tabs(self) -> list[Tab]:
        """Return all tabs of the browser. This process enters one with its first request, and may share it with others."""
        tab = Tab(self)
        return [Tab(self, {"target_id": info["targetId"], "alone": True}) for info in tab.list_tabs()]

    def close(self) -> None:
        """Close the tabs that were opened for this process, and the connection. The next request opens another.

        The daemon and its browser keep running.
        """
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Deferred:
    """A function of a module that is imported when the function is first called or inspected."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._function: Callable[..., Any] | None = None
        self.__name__ = self.__qualname__ = name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        if self._function is None:
            from importlib import import_module

            with without_program_directory():
                self._function = getattr(import_module(f".{self._module}", __package__), self.__name__)
        return self._function

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__wrapped__.__doc__

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__wrapped__(*arguments, **keywords)

    def __get__(self, tab: Tab | None, owner: type[Tab] | None = None) -> Any:
        return self if tab is None else self.__wrapped__.__get__(tab)


class _DeferredModule:
    """A module of this package whose functions are `Deferred`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Deferred:
        return Deferred(self._name, name)


if not TYPE_CHECKING:
    cookies, dialogs, downloads, elements, event_stream, find, http, keyboard, mouse, nodes, screenshot, snapshot = map(
        _DeferredModule,
        (
            "cookies",
            "dialogs",
            "downloads",
            "elements",
            "event_stream",
            "find",
            "http",
            "keyboard",
            "mouse",
            "nodes",
            "screenshot",
            "snapshot",
        ),
    )


class Tab:
    """A thread-safe tab of the browser. The first request chooses the tab; `switch_tab` and `new_tab` change it.

    `begin` requests the first tab: see `tabs.Tabs`, in the daemon.
    """

    def __init__(self, browser: Browser, begin: dict[str, Any] | None = None) -> None:
        self.browser = browser
        self.begin = begin or {}
        self._place: Place | None = None

    @property
    def place(self) -> Place | None:
        """The current place, or None before the first request, after `leave`, and in a forked child."""
        place = self._place
        return place if place is not None and place.client is self.browser.connection.client else None

    def enter(self, wanted: dict[str, Any] | None = None, *, timeout: float = TIMEOUT) -> Place:
        """Return the current place. If there is none, enter the tab that is `wanted`, by default that of `begin`."""
        self.browser.connect()
        if (place := self.place) is None:
            with self.browser.connection.lock:
                if (place := self.place) is None:
                    place = self._enter(self.begin if wanted is None else wanted, timeout)
        return place

    def _enter(self, wanted: dict[str, Any], timeout: float) -> Place:
        self._place = place = self.browser.connection.enter(wanted, timeout)
        return place

    @property
    def _identity(self) -> dict[str, Any]:
        """The parts of `begin` that describe the client, not its first tab."""
        return {key: value for key, value in self.begin.items() if key in ("name", "alone")}

    def move(self, wanted: dict[str, Any], *, timeout: float = TIMEOUT) -> Place:
        """Go to another tab, and return the place. Raises `TabClosed` if there is none."""
        check_seconds("timeout", timeout)
        if (place := self.place) is None:
            return self.enter({**self._identity, "own": False, **wanted}, timeout=timeout)
        try:
            place.update(self._ask({"meta": "move_tab", "place": place.number, **wanted}, timeout))
        except TabClosed:
            if place.is_known:
                raise
            return self._enter({**self._identity, "own": False, **wanted}, timeout)
        return place

    def leave(self) -> None:
        """Leave the tab; close it if it was opened for this process. The next request chooses a tab, ignoring `begin`."""
        place, self._place = self.place, None
        self.begin = self._identity
        if place is not None:
            self.browser.connection.leave(place)

    def close(self) -> None:
        """Leave the tab. A tab of `Browser.new_tab` is closed, unless it was opened with `keep`; a named one stays open."""
        self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, message: dict[str, Any], *, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Send a request, ``{"method", "params", "session_id"}`` or ``{"meta": verb}``, and return the daemon's reply.

        Without a session, it is for this tab, or for methods of ``Target`` for the browser. Raises the errors in `errors`, and
        `ConnectionLost` if the daemon ends and the request may have run. If the daemon ended before, it is started again.
        """
        check_seconds("timeout", timeout)
        if message.get("session_id") or str(message.get("method")).startswith(BROWSER_DOMAINS):
            return self._ask(message, timeout)
        place = self.enter(timeout=timeout)
        try:
            reply = self._ask({**message, "session_id": place.session}, timeout)
        except TabClosed:
            if place.is_known:
                # Raise once, so that the caller notices the change of tabs.
                self.leave()
                raise
            # Another daemon runs, and the request did not: return to the tab, if it still exists.
            before = place.target
            place = self._enter({**self._identity, "again": before, "own": place.own}, timeout)
            if place.target != before and not _SAFE_IN_ANY_TAB & {message.get("method"), message.get("meta")}:
                raise TabClosed(
                    "the daemon was restarted, and the previous tab is gone: nothing was done; the next request opens a "
                    "new one, so use goto_url()"
                ) from None
            reply = self._ask({**message, "session_id": place.session}, timeout)
        # The session of the tab, or its replacement.
        place.session = reply.get("session_id") or place.session
        return reply

    def _ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        request = {"timeout": min(timeout, LONGEST), **message}
        self.browser.connect()
        reply = self.browser.connection.ask(request, timeout + _GRACE_PERIOD)
        if "error" in reply:
            raise from_reply(reply["error"])
        return reply

    def stream(self, message: dict[str, Any], *, timeout: float = TIMEOUT) -> Generator[Any]:
        """Yield the items of the daemon's stream for `message`, ``{"meta": stream, …}``. `timeout` in seconds is for each item.

        Closing the generator tells the daemon to end the stream. Raises what `request` does.
        """
        check_seconds("timeout", timeout)
        params = {name: value for name, value in message.items() if name != "meta"}
        if not params.get("session_id"):
            # If the daemon has ended, this starts it and returns to the tab.
            params["session_id"] = self.request({"meta": "session"}, timeout=timeout)["session_id"]
        with self.browser.connect().stream(message["meta"], params, timeout=timeout) as items:
            yield from items

    def cdp(self, /, method: str, session_id: str | None = None, *, timeout: float = TIMEOUT, **params: Any) -> dict[str, Any]:
        """Call a method of the Chrome DevTools Protocol, and return its result.

        ```python
        cdp("Page.navigate", url="https://example.org")
        cdp("DOM.getDocument", depth=-1)
        ```

        `session_id` is another session than that of this tab, or ``"browser"`` for the browser itself, which is the default for
        `Target`, `SystemInfo` and `Tethering`. (For a parameter named ``timeout``, use
        ``Tab.request({"method": …, "params": …})``.) Raises `CDPError`, `DialogOpen`, `TabClosed`, `BrowserTimeout` or
        `BrowserLost`.
        """
        check_text("cdp", "method", method)
        message = {"method": method, "params": params, "session_id": session_id}
        result: dict[str, Any] = self.request(message, timeout=timeout)["result"]
        return result

    def try_cdp(self, method: str, session_id: str | None = None, *, timeout: float = TIMEOUT, **params: Any) -> None:
        """Call a method; ignore errors if the page or the object is gone."""
        try:
            self.cdp(method, session_id, timeout=timeout, **params)
        except (CDPError, TabClosed, DialogOpen):
            return

    js = javascript.js

    page_info = pages.page_info
    goto_url = pages.goto_url
    wait_for_load = pages.wait_for_load
    wait_for_element = pages.wait_for_element
    wait_for_network_idle = pages.wait_for_network_idle
    wait_for_url = pages.wait_for_url
    list_tabs = pages.list_tabs
    current_tab = pages.current_tab
    switch_tab = pages.switch_tab
    new_tab = pages.new_tab
    close_tab = pages.close_tab
    ensure_real_tab = pages.ensure_real_tab
    iframe_target = nodes.iframe_target

    drain_events = event_stream.drain_events
    events = event_stream.events
    handle_dialog = dialogs.handle_dialog
    handle_login = dialogs.handle_login
    press_key = keyboard.press_key
    dispatch_key = keyboard.dispatch_key
    type_text = keyboard.type_text
    click_at_xy = mouse.click_at_xy
    scroll = mouse.scroll
    capture_screenshot = screenshot.capture_screenshot
    print_pdf = screenshot.print_pdf
    http_get = http.http_get
    wait_for_download = downloads.wait_for_download
    set_cookies = cookies.set_cookies
    # Last: it shadows the module.
    cookies = cookies.cookies
    snapshot = snapshot.snapshot
    find = find.find

    click = elements.click
    fill_input = elements.fill_input
    hover = elements.hover
    scroll_into_view = elements.scroll_into_view
    select_option = elements.select_option
    upload_file = elements.upload_file
