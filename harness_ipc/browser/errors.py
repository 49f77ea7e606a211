"""What can go wrong with a browser: each leaf is also the builtin that a caller would already catch.

RemoteError (of harness_ipc)
└── BrowserError
    ├── BrowserNotFound   ConnectionRefusedError  no browser could be found, reached or started
    ├── BrowserMismatch   ValueError              the daemon holds another browser than the command asks for: nothing ran
    ├── BrowserLost       ConnectionError         the browser went away: what was in flight may have run
    ├── BrowserTimeout    TimeoutError            the browser has not answered in time: it may still run
    ├── TabClosed         LookupError             the tab of a session is gone: nothing ran
    ├── TabInUse          BlockingIOError         another process is in the tab of that name: nothing ran
    ├── DialogOpen                                a dialog (alert, confirm, prompt, beforeunload) holds the page
    ├── EventsDropped                             events of a stream were not read in time: it goes on
    ├── LoginFailed       PermissionError         a server has refused the user and the password
    ├── ElementNotFound       LookupError         no element, or more than one, or one that is gone: nothing ran
    ├── ElementNotReady                           the element can't be acted on (covered, disabled, not visible): nothing ran
    ├── InvalidArgument       ValueError          the page can't take it (a selector, a text, an option): nothing ran
    ├── HTTPError         ConnectionError         http_get: an answer that is an error, or none
    ├── NavigationOvertaken                       another navigation has taken the place of the one that was asked for
    ├── CDPError                                  the browser answered with an error
    └── JavaScriptError                           the page's own code threw

The daemon raises one, and the helper takes it out of the reply again (`from_reply`): the same class, text and data.
"""

from __future__ import annotations

from harness_ipc import RemoteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# JSON-RPC's code of what has no other: Chrome's for a document that has gone, ours for a page that crashed or was closed.
SERVER_ERROR = -32000


class BrowserError(RemoteError):
    """The root of what this part raises. `data` is a dict of what its class documents."""

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message, data=data)

    def __str__(self) -> str:
        # The class says the type.
        return self.message


class BrowserNotFound(BrowserError, ConnectionRefusedError):
    """No browser could be found, reached or started. The text says which, and what to do."""


class BrowserMismatch(BrowserError, ValueError):
    """The daemon holds another browser than the variables of this command ask for. The text names both, and what to do."""


class BrowserLost(BrowserError, ConnectionError):
    """The browser went away. What was in flight may have run: nothing is repeated."""


class BrowserTimeout(BrowserError, TimeoutError):
    """The browser has not answered in time. What it was asked to do may still run."""


class TabClosed(BrowserError, LookupError):
    """The tab of the request's session is gone. The request did not run."""


class TabInUse(BrowserError, BlockingIOError):
    """Another process is in the tab of that name. ``data["pid"]`` is its process id, or None. Nothing was done."""


class DialogOpen(BrowserError):
    """A dialog holds the page: `dialog` is what CDP says of it. ``ran`` is False if the request certainly did not run."""

    @property
    def dialog(self) -> dict[str, Any]:
        """The parameters of `Page.javascriptDialogOpening`: type, message, url, defaultPrompt."""
        return dict(self.data.get("dialog") or {})


class EventsDropped(BrowserError):
    """Events of a stream were not read in time. ``data["count"]`` is how many; the stream goes on."""


class LoginFailed(BrowserError, PermissionError):
    """A server has refused the user and the password. ``data["login"]`` is what it asks for: origin, realm, scheme, source."""


class ElementNotFound(BrowserError, LookupError):
    """No element is meant, or more than one, or one that is gone. ``data["count"]`` is how many a selector matches."""


class ElementNotReady(BrowserError):
    """The element can't be acted on: something covers it, it is disabled, read-only or not visible. The text says which."""


class InvalidArgument(BrowserError, ValueError):
    """The page can't take it: a selector that Chrome can't parse, a text that is too long, an option that is not there."""


class HTTPError(BrowserError, ConnectionError):
    """What `http_get` was answered is an error, or the server can't be read."""

    @property
    def status(self) -> int | None:
        """The status of the answer, from 400 on, or None without one."""
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
    """Another navigation of the tab, to ``data["url"]``, has taken the place of the one that was asked for."""


class JavaScriptError(BrowserError):
    """The page's own code threw. The text is the exception's, with its stack where it has one."""


_CLASSES = {kind.__name__: kind for kind in BrowserError.__subclasses__()}


def is_ours(kind: str) -> bool:
    """Return whether this is the name of an error of this part."""
    return kind in _CLASSES


def node_gone(name: str, **data: Any) -> ElementNotFound:
    """Return the error for a node that its document no longer has; `name` is the caller's word for it."""
    return ElementNotFound(f"the node of {name} is gone from the page: call snapshot() again", **data)


def from_remote(error: RemoteError) -> RemoteError:
    """Return the exception for one that the channel has raised: an error of a stream."""
    return from_reply({"type": error.type, "message": error.message, "data": error.data})


def from_reply(error: Any) -> RemoteError:
    """Return the exception for the ``"error"`` of a reply. One of a type that is not ours is a `RemoteError`."""
    if not isinstance(error, dict):
        return RemoteError(str(error))
    kind, data = _CLASSES.get(str(error.get("type"))), error.get("data")
    message = str(error.get("message", error))
    if kind is None:
        return RemoteError(message, type=str(error.get("type", "")), data=data)
    return kind(message, **data if isinstance(data, dict) else {})
