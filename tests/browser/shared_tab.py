"""The tab of the shared browser in which tests are, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from harness_ipc import HarnessIPCError
from harness_ipc.browser import helpers
from harness_ipc.browser.errors import CDPError
from harness_ipc.browser.tab import Browser
from tests.support.processes import wait_until

_VIEW = "innerWidth, innerHeight, devicePixelRatio, visualViewport.scale, name"


def empty_state() -> Any:
    """Return what a test of an empty document may not change."""
    names = helpers.cdp("Runtime.globalLexicalScopeNames")["names"]
    page = "performance.timeOrigin, Object.getOwnPropertyNames(window), document.documentElement.outerHTML"
    return [names, helpers.js(f"[{_VIEW}, {page}]")]


def view_state() -> Any:
    """Return what a test that visits a page may not change."""
    return helpers.js(f"[{_VIEW}, location.protocol == 'about:' || !sessionStorage.length]")


def open_tabs() -> list[str]:
    return [tab["targetId"] for tab in helpers.list_tabs()]


class SharedTab:
    """The only tab of the shared browser between tests: a new one, or one that the last test left in the state it found."""

    target = ""
    # What the tests that used the tab have not changed; None for a new tab.
    read_state: Callable[[], Any] | None = None
    state: Any = None

    @contextlib.contextmanager
    def entered(self, read_state: Callable[[], Any] | None = None) -> Iterator[str]:
        """Enter the tab, and yield its targetId. It is a new one, unless another test has left what `read_state` returns."""
        helpers.disconnect()
        if open_tabs() != [self.target] or self.read_state not in (None, read_state):
            self._replace()
        target, self.target = self.target, ""
        helpers.cdp("Storage.clearCookies", "browser")
        helpers.switch_tab(target)
        if read_state is not self.read_state:
            self.read_state, self.state = read_state, read_state and read_state()
        yield target
        helpers.disconnect()
        if self._is_unchanged(target):
            self.target = target
        else:
            self._replace()
        helpers.disconnect()

    def _is_unchanged(self, target: str) -> bool:
        if self.read_state is None or open_tabs() != [target]:
            return False
        try:
            helpers.switch_tab(target)
            return bool(self.read_state() == self.state)
        except HarnessIPCError:
            return False

    def _replace(self) -> None:
        """Close all tabs but a new one, and remove browser contexts."""
        helpers.disconnect()
        with Browser() as browser:
            self.target = browser.new_tab(keep=True).current_tab()["targetId"]
        # Now that there is another: the browser closes its window with the last tab, and a new window costs more.
        for tab in set(open_tabs()) - {self.target}:
            # The daemon closes those of a client that has just ended.
            with contextlib.suppress(CDPError):
                helpers.close_tab(tab)
        wait_until(lambda: open_tabs() == [self.target])
        for context in helpers.cdp("Target.getBrowserContexts")["browserContextIds"]:
            with contextlib.suppress(CDPError):
                helpers.cdp("Target.disposeBrowserContext", browserContextId=context)
        self.read_state = None
