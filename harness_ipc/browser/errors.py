"""The exceptions of the browser harness. Most also derive from a fitting built-in exception.

RemoteError (of harness_ipc)
└── BrowserError
    ├── BrowserNotFound   ConnectionRefusedError  no browser could be found, reached or started
    ├── BrowserMismatch   ValueError              the daemon holds another browser than the command asks for: nothing ran
    ├── BrowserLost       ConnectionError         the connection to the browser was lost: calls in flight may have run
    ├── BrowserTimeout    TimeoutError            the browser has not answered in time: the call may still run
    ├── TabClosed         LookupError             the tab is closed: nothing ran
    ├── TabInUse          BlockingIOError         another process is in the tab of that name: nothing ran
    ├── DialogOpen                                a dialog (alert, confirm, prompt, beforeunload) blocks the page
    ├── EventsDropped                             events of a stream were not read in time; the stream continues
    ├── LoginFailed       PermissionError         a server refused the user and the password
    ├── ElementNotFound   LookupError             no element matches, or more than one, or it was removed: nothing ran
    ├── ElementNotReady                           the element is covered, disabled or not visible: nothing ran
    ├── InvalidArgument   ValueError              invalid in this page (a selector, a text, an option): nothing ran
    ├── HTTPError         ConnectionError         http_get: an error status, or no response
    ├── NavigationOvertaken                       another navigation replaced the requested one
    ├── CDPError                                  the browser answered with an error
    └── JavaScriptError                           code in the page threw an exception

The daemon raises them, and the helpers raise the same class, text and data again (`from_reply`; for streams, the channel knows
`CLASSES`).
"""

from __future__ import annotations

from harness_ipc import RemoteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The general error code of JSON-RPC: Chrome uses it for a replaced document, the daemon for a crashed or closed page.
SERVER_ERROR = -32000


class BrowserError(RemoteError):
    """The base class of these errors. `data` is a dict whose keys depend on the class."""

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message, data=data)

    def __str__(self) -> str:
        # Without the type, which the class shows.
        return self.message


class BrowserNotFound(BrowserError, ConnectionRefusedError):
    """No browser could be found, reached or started. The text says why, and what to do."""


class BrowserMismatch(BrowserError, ValueError):
    """The daemon holds another browser than this command's environment asks for. The text names both, and what to do."""


class BrowserLost(BrowserError, ConnectionError):
    """The connection to the browser was lost. Calls in flight may have run, and are not repeated."""


class BrowserTimeout(BrowserError, TimeoutError):
    """The browser has not answered in time. The call may still run."""


class TabClosed(BrowserError, LookupError):
    """The tab of the request's session is closed. The request did not run."""


class TabInUse(BrowserError, BlockingIOError):
    """Another process is in the tab of that name. ``data["pid"]`` is its process id, or None. Nothing was done."""


class DialogOpen(BrowserError):
    """A dialog blocks the page: see `dialog`. ``data["ran"]`` is False if the request certainly did not run."""

    @property
    def dialog(self) -> dict[str, Any]:
        """The parameters of `Page.javascriptDialogOpening`: type, message, url, defaultPrompt."""
        return dict(self.data.get("dialog") or {})


class EventsDropped(BrowserError):
    """Events of a stream were not read in time. ``data["count"]`` is their number. The stream continues."""


class LoginFailed(BrowserError, PermissionError):
    """A server refused the user and the password. ``data["login"]`` has the origin, realm, scheme and source."""


class ElementNotFound(BrowserError, LookupError):
    """No element matches, or more than one, or it was removed. ``data["count"]`` is the number of matches of a selector."""


class ElementNotReady(BrowserError):
    """The element is covered, disabled, read-only or not visible. The text says which."""


class InvalidArgument(BrowserError, ValueError):
    """An argument is invalid in this page: a malformed selector, a text that is too long, a missing option."""


class HTTPError(BrowserError, ConnectionError):
    """`http_get` got an error status, or no response."""

    @property
    def status(self) -> int | None:
        """The status of the response, 400 or above, or None without a response."""
        status: int | None = self.data.get("status")
        return status

    @property
    def text(self) -> str:
        """The first 16,384 characters of the body."""
        return str(self.data.get("text", ""))


class CDPError(BrowserError):
    """The browser answered with an error. `code` is the JSON-RPC code."""

    @property
    def code(self) -> int | None:
        """The JSON-RPC code: -32000 for most, -32601 for an unknown method, -32602 for bad parameters."""
        code: int | None = self.data.get("code")
        return code


class NavigationOvertaken(BrowserError):
    """Another navigation of the tab, to ``data["url"]``, replaced the requested one."""


class JavaScriptError(BrowserError):
    """Code in the page threw an exception. The text has its message, and its stack if there is one."""


# By name.
CLASSES = {kind.__name__: kind for kind in BrowserError.__subclasses__()}


def is_browser_error(kind: str) -> bool:
    """Return whether `kind` is the name of an error of this module."""
    return kind in CLASSES


def node_gone(name: str, **data: Any) -> ElementNotFound:
    """Return the error for a node that was removed from its document; `name` describes it."""
    return ElementNotFound(f"the node of {name} is gone from the page: call snapshot() again", **data)


def from_reply(error: Any) -> RemoteError:
    """Return the exception for the ``"error"`` of a reply: a `RemoteError` if its type is not one of this module."""
    if not isinstance(error, dict):
        return RemoteError(str(error))
    kind, data = CLASSES.get(str(error.get("type"))), error.get("data")
    message = str(error.get("message", error))
    if kind is None:
        return RemoteError(message, type=str(error.get("type", "")), data=data)
    return kind(message, **data if isinstance(data, dict) else {})
