"""The helpers: functions that act on the page. Each sends one or a few requests to the daemon over one connection.

They are the methods of a default `Tab`. The first one starts the daemon if necessary. A process stays in the tab that it used
first, or has switched to, regardless of other processes. Every `timeout` is in seconds, for each request of the helper; when it
expires, `BrowserTimeout` or `DaemonTimeout` is raised, both `TimeoutError`.
"""

from __future__ import annotations

import os
import threading
import time

from . import TAB_NAME, TIMEOUT
from .arguments import check_seconds
from .errors import (
    BrowserError,
    BrowserLost,
    BrowserNotFound,
    BrowserTimeout,
    CDPError,
    DialogOpen,
    ElementNotFound,
    ElementNotReady,
    EventsDropped,
    HTTPError,
    InvalidArgument,
    JavaScriptError,
    LoginFailed,
    NavigationOvertaken,
    TabClosed,
    TabInUse,
)
from .place import START_TIMEOUT, Place
from .tab import Browser, Tab

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Concatenate, ParamSpec, TypeVar

    from harness_ipc import Client

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = [
    "BrowserError",
    "BrowserLost",
    "BrowserNotFound",
    "BrowserTimeout",
    "CDPError",
    "DialogOpen",
    "ElementNotFound",
    "ElementNotReady",
    "EventsDropped",
    "HTTPError",
    "InvalidArgument",
    "JavaScriptError",
    "LoginFailed",
    "NavigationOvertaken",
    "TabClosed",
    "TabInUse",
    "capture_screenshot",
    "cdp",
    "click",
    "click_at_xy",
    "close_tab",
    "cookies",
    "current_tab",
    "dispatch_key",
    "drain_events",
    "ensure_real_tab",
    "events",
    "fill_input",
    "find",
    "goto_url",
    "handle_dialog",
    "handle_login",
    "hover",
    "http_get",
    "iframe_target",
    "js",
    "list_tabs",
    "new_tab",
    "page_info",
    "press_key",
    "print_pdf",
    "scroll",
    "scroll_into_view",
    "select_option",
    "set_cookies",
    "snapshot",
    "switch_tab",
    "type_text",
    "upload_file",
    "wait",
    "wait_for_download",
    "wait_for_element",
    "wait_for_load",
    "wait_for_network_idle",
    "wait_for_url",
]


class _DefaultTab(Tab):
    """The tab of the process. A thread that opens or switches to a tab has its own from then on."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        super().__init__(Browser())

    @property
    def begin(self) -> dict[str, Any]:
        """The requested first tab, by default the one named by `BU_TAB_NAME`."""
        name = os.environ.get(TAB_NAME)
        return self._begin or ({"name": name} if name else {})

    @begin.setter
    def begin(self, wanted: dict[str, Any]) -> None:
        self._begin = wanted

    @property
    def _place(self) -> Place | None:
        return getattr(self._of_thread, "place", None) or self._of_process

    @_place.setter
    def _place(self, place: Place | None) -> None:
        if hasattr(self._of_thread, "place"):
            self._of_thread.place = place
        else:
            self._of_process: Place | None = place

    def move(self, wanted: dict[str, Any], *, timeout: float = TIMEOUT) -> Place:
        """Go to another tab. A thread other than the main one has its own tab from then on."""
        check_seconds("timeout", timeout)
        if threading.current_thread() is not threading.main_thread() and not hasattr(self._of_thread, "place"):
            self.browser.connect()
            place = self._of_thread.place = self.browser.connection.enter({**self._identity, "own": False, **wanted}, timeout)
            return place
        return super().move(wanted, timeout=timeout)


default_tab = _DefaultTab()


class _Helper:
    """A method of the default tab as a function. `help` and `inspect.signature` show it without the tab."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(default_tab, self.__name__)
        return method

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__wrapped__.__doc__

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__wrapped__(*arguments, **keywords)

    def __get__(self, instance: object, owner: type | None = None) -> _Helper:
        # A descriptor, so that `help` treats it as a function. A class does not bind it.
        return self

    def __repr__(self) -> str:
        return f"<helper {self.__name__}>"


if TYPE_CHECKING:

    def _of_default_tab(method: Callable[Concatenate[Tab, P], R]) -> Callable[P, R]: ...

else:

    def _of_default_tab(method):
        return _Helper(method.__name__)


_send = _of_default_tab(Tab.request)
capture_screenshot = _of_default_tab(Tab.capture_screenshot)
cdp = _of_default_tab(Tab.cdp)
click = _of_default_tab(Tab.click)
click_at_xy = _of_default_tab(Tab.click_at_xy)
close_tab = _of_default_tab(Tab.close_tab)
cookies = _of_default_tab(Tab.cookies)
current_tab = _of_default_tab(Tab.current_tab)
dispatch_key = _of_default_tab(Tab.dispatch_key)
drain_events = _of_default_tab(Tab.drain_events)
events = _of_default_tab(Tab.events)
ensure_real_tab = _of_default_tab(Tab.ensure_real_tab)
fill_input = _of_default_tab(Tab.fill_input)
find = _of_default_tab(Tab.find)
goto_url = _of_default_tab(Tab.goto_url)
handle_dialog = _of_default_tab(Tab.handle_dialog)
handle_login = _of_default_tab(Tab.handle_login)
hover = _of_default_tab(Tab.hover)
http_get = _of_default_tab(Tab.http_get)
iframe_target = _of_default_tab(Tab.iframe_target)
js = _of_default_tab(Tab.js)
list_tabs = _of_default_tab(Tab.list_tabs)
new_tab = _of_default_tab(Tab.new_tab)
page_info = _of_default_tab(Tab.page_info)
press_key = _of_default_tab(Tab.press_key)
print_pdf = _of_default_tab(Tab.print_pdf)
scroll = _of_default_tab(Tab.scroll)
scroll_into_view = _of_default_tab(Tab.scroll_into_view)
select_option = _of_default_tab(Tab.select_option)
set_cookies = _of_default_tab(Tab.set_cookies)
snapshot = _of_default_tab(Tab.snapshot)
switch_tab = _of_default_tab(Tab.switch_tab)
type_text = _of_default_tab(Tab.type_text)
upload_file = _of_default_tab(Tab.upload_file)
wait_for_download = _of_default_tab(Tab.wait_for_download)
wait_for_element = _of_default_tab(Tab.wait_for_element)
wait_for_load = _of_default_tab(Tab.wait_for_load)
wait_for_network_idle = _of_default_tab(Tab.wait_for_network_idle)
wait_for_url = _of_default_tab(Tab.wait_for_url)


def connect(*, timeout: float = START_TIMEOUT, on_progress: Callable[[Any], object] | None = None) -> Client:
    """Return this process's connection to the browser daemon, which is started if necessary.

    Raises what `Browser.connect` does.
    """
    return default_tab.browser.connect(timeout=timeout, on_progress=on_progress)


def disconnect() -> None:
    """Leave the tabs and close this process's connection, if any. The next helper opens another."""
    default_tab.browser.close()


def wait(seconds: float = 1.0) -> None:
    """Sleep. To wait for something, use `wait_for_load` and the like, or a promise in `js`."""
    check_seconds("wait(): seconds", seconds)
    time.sleep(seconds)
