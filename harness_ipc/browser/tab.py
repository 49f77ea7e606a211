"""A tab as a client has it: requests to the daemon over one kept connection, for one tab of its browser.

It starts the daemon where none runs. What can be done in a page is in modules of its own, whose functions have the tab as their
first parameter: `Tab` has them as methods, and imports what `page_info` does not need when it is first called.
"""

from __future__ import annotations

import os
import sys
import threading

from harness_ipc import Client, ClientClosed, ConnectionLost, DaemonNotRunning, RemoteError, connect_daemon

from . import BROWSER_DOMAINS, LONGEST, MAX_MESSAGE, TIMEOUT, check_extra, daemon_name, is_ours, javascript, not_ours, pages
from .arguments import check_seconds, check_text
from .errors import CDPError, DialogOpen, TabClosed, from_reply
from .own_imports import without_program_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from . import cookies, dialogs, downloads, elements, event_stream, find, http, keyboard, mouse, screenshot, snapshot

# Seconds for the daemon to start, with a browser that starts or asks its user.
START_TIMEOUT = 60.0
# Seconds that the daemon gets beyond a timeout, which it keeps itself and knows more about.
_GRACE = 2.0


def start_daemon(name: str, *, timeout: float = START_TIMEOUT) -> None:
    """Be sure that the browser's daemon `name` runs. Raises what `harness_ipc.ensure_daemon` does."""
    # Not needed by a process that finds the daemon.
    from harness_ipc import ensure_daemon

    check_extra()
    # -P: `python -m` would import from the current directory first.
    ensure_daemon(name, [sys.executable, "-P", "-m", "harness_ipc.browser.daemon", name], timeout=timeout)


class Browser:
    """This process's connection to the browser's daemon, made when it is first needed. A forked child opens its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._process = 0

    def connect(self, *, timeout: float = START_TIMEOUT) -> Client:
        """Return the connection, and start the daemon if it does not run.

        Raises `StartFailed` (of harness_ipc) with the reason, `IncompatibleDaemon` if it is another program's, and what
        `ensure_daemon` does.
        """
        with self._lock:
            if self._client is not None and self._process == os.getpid() and self._client.name == daemon_name():
                return self._client
            name = daemon_name()
            with without_program_directory():
                try:
                    client = connect_daemon(name, max_message=MAX_MESSAGE)
                except (DaemonNotRunning, ConnectionLost):
                    # Lost, if one is just dying: nothing was sent yet.
                    start_daemon(name, timeout=timeout)
                    client = connect_daemon(name, max_message=MAX_MESSAGE)
            if not is_ours(client.app_version):
                client.close()
                raise not_ours(name)
            self._client, self._process = client, os.getpid()
            return client

    def disconnect(self) -> None:
        """Close the connection, if there is one: the next request opens another."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._process == os.getpid():
            client.close()


class Deferred:
    """A function of a module of this package, which is imported when the function is first called or looked at."""

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
    cookies, dialogs, downloads, elements, event_stream, find, http, keyboard, mouse, screenshot, snapshot = map(
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
            "screenshot",
            "snapshot",
        ),
    )


class Tab:
    """A tab of the browser: the one that its first request is answered for, until `switch_tab` or `new_tab`."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self._client: Client | None = None
        self._session: str | None = None

    @property
    def session(self) -> str | None:
        """The session of the tab in the daemon, or None if no request was answered yet over this connection."""
        return self._session if self._client is self.browser.connect() else None

    def leave(self) -> None:
        """Be in no tab: the next request is for the daemon's."""
        self._session = None

    def request(self, message: dict[str, Any], *, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Ask the daemon one thing, and return its reply: ``{"method", "params", "session_id"}``, or ``{"meta": verb}``.

        A request that names no session is for this tab. Raises what `errors` lists for a reply with an error; `ConnectionLost`
        if the daemon goes away, and then nothing is repeated: the next request finds or starts another.
        """
        check_seconds("timeout", timeout)
        client = self.browser.connect()
        if client is not self._client:
            self._client, self._session = client, None
        request = {"timeout": min(timeout, LONGEST), **message}
        ours = not message.get("session_id")
        # Without a session, those domains are the browser's own.
        is_browsers = message.get("meta") == "set_session" or str(message.get("method", "")).startswith(BROWSER_DOMAINS)
        if ours and self._session is not None and not is_browsers:
            request["session_id"] = self._session
        try:
            reply = client.request(request, timeout=timeout + _GRACE)
        except (ClientClosed, ConnectionLost, DaemonNotRunning):
            self.browser.disconnect()
            raise
        if "error" in reply:
            error = from_reply(reply["error"])
            if isinstance(error, TabClosed) and ours:
                # Raised once, so that nothing goes to another tab unseen. From now on, the daemon's tab is ours.
                self._session = None
            raise error
        if ours and reply.get("session_id"):
            # Ours, or the one that took its place.
            self._session = reply["session_id"]
        return reply

    def stream(self, message: dict[str, Any], *, timeout: float = TIMEOUT) -> Generator[Any]:
        """Yield the items with which the daemon answers `message`, ``{"meta": stream, …}``. `timeout` is for each of them.

        Closing the generator tells the daemon to end the stream. Raises what `request` does.
        """
        check_seconds("timeout", timeout)
        client = self.browser.connect()
        params = {name: value for name, value in message.items() if name != "meta"}
        if params.get("session_id") is None and client is self._client and self._session is not None:
            params["session_id"] = self._session
        try:
            with client.stream(message["meta"], params, timeout=timeout) as items:
                yield from items
        except RemoteError as error:
            raise from_reply({"type": error.type, "message": error.message, "data": error.data}) from None

    def cdp(self, /, method: str, session_id: str | None = None, *, timeout: float = TIMEOUT, **params: Any) -> dict[str, Any]:
        """Call the method of the Chrome DevTools Protocol, and return its result.

        ```python
        cdp("Page.navigate", url="https://example.org")
        cdp("DOM.getDocument", depth=-1)
        ```

        `session_id` is another session than that of this tab, or ``"browser"`` for the browser itself, which `Target`,
        `SystemInfo` and `Tethering` are for without one. (A parameter that is itself called ``timeout`` goes by
        ``Tab.request({"method": …, "params": …})``.) Raises `CDPError`, `DialogOpen`, `TabClosed`, `BrowserTimeout` or
        `BrowserLost`.
        """
        check_text("cdp", "method", method)
        message = {"method": method, "params": params, "session_id": session_id}
        result: dict[str, Any] = self.request(message, timeout=timeout)["result"]
        return result

    def try_cdp(self, method: str, session_id: str | None = None, *, timeout: float = TIMEOUT, **params: Any) -> None:
        """Call the method for something that may be gone already, with the page that it belonged to."""
        try:
            self.cdp(method, session_id, timeout=timeout, **params)
        except (CDPError, TabClosed, DialogOpen):
            return

    js = javascript.js

    page_info = pages.page_info
    goto_url = pages.goto_url
    wait_for_load = pages.wait_for_load
    list_tabs = pages.list_tabs
    current_tab = pages.current_tab
    switch_tab = pages.switch_tab
    new_tab = pages.new_tab
    close_tab = pages.close_tab
    ensure_real_tab = pages.ensure_real_tab
    iframe_target = pages.iframe_target

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
    # Last: then the name is the method's.
    cookies = cookies.cookies
    snapshot = snapshot.snapshot
    find = find.find

    click = elements.click
    fill_input = elements.fill_input
    hover = elements.hover
    scroll_into_view = elements.scroll_into_view
    select_option = elements.select_option
    upload_file = elements.upload_file
