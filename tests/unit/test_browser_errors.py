"""The browser's errors: the documented tree, their built-in bases, pickling, and replies."""

from __future__ import annotations

import builtins
import json
import pickle
import re

import pytest

from harness_ipc import HarnessIPCError, RemoteError
from harness_ipc._protocol import messages
from harness_ipc.browser import errors
from harness_ipc.browser.errors import (
    BrowserError,
    BrowserLost,
    BrowserMismatch,
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
    from_reply,
)

# The names and built-in bases in the module's docstring.
DRAWN = re.findall(r"^    [├└]── (\w+)(?: +([A-Z]\w*Error))? +\S", errors.__doc__ or "", re.MULTILINE)

INSTANCES: list[BrowserError] = [
    BrowserNotFound("text"),
    BrowserLost("text"),
    BrowserMismatch("text"),
    BrowserTimeout("text"),
    TabClosed("text"),
    TabInUse("text", pid=7),
    DialogOpen("text", dialog={"type": "alert", "message": "Grüße"}, ran=False),
    EventsDropped("text", count=3),
    LoginFailed("text", login={"origin": "http://127.0.0.1", "realm": "x"}),
    ElementNotFound("text", count=2),
    ElementNotReady("text"),
    InvalidArgument("text"),
    HTTPError("text", status=404, text="Nothing here"),
    NavigationOvertaken("text", url="https://example.org/"),
    CDPError("text", code=-32601),
    JavaScriptError("text", line=3, column=4),
]


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, BrowserError)}
    assert {name for name, _ in DRAWN} == real - {"BrowserError"} == {type(error).__name__ for error in INSTANCES}


@pytest.mark.parametrize(("name", "builtin"), DRAWN)
def test_each_leaf_is_the_builtin_that_a_caller_already_catches(name: str, builtin: str) -> None:
    leaf = getattr(errors, name)
    assert issubclass(leaf, RemoteError)
    assert issubclass(leaf, HarnessIPCError)
    assert issubclass(leaf, getattr(builtins, builtin or "Exception"))


@pytest.mark.parametrize("error", [BrowserError("text", more=[1]), *INSTANCES], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_text_type_and_data(error: BrowserError, protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert (str(copy), copy.type, copy.data) == ("text", type(error).__name__, error.data)


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
def test_a_reply_keeps_text_type_and_data(error: BrowserError) -> None:
    reply = json.loads(json.dumps(messages.error_reply(error)))
    copy = from_reply(reply["error"])
    assert type(copy) is type(error)
    assert isinstance(copy, BrowserError)
    assert (str(copy), copy.type, copy.data) == ("text", type(error).__name__, error.data)


def test_the_data_has_names() -> None:
    assert CDPError("text", code=-32601).code == -32601
    assert CDPError("text").code is None
    assert DialogOpen("text", dialog={"type": "alert"}).dialog == {"type": "alert"}
    assert DialogOpen("text").dialog == {}


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        ({"type": "KeyError", "message": "text"}, "text", "KeyError"),
        ({"message": "text"}, "text", "RemoteError"),
        ("text", "text", "RemoteError"),
    ],
)
def test_an_error_of_another_type_is_a_remote_error(error: object, text: str, kind: str) -> None:
    copy = from_reply(error)
    assert type(copy) is RemoteError
    assert (copy.message, copy.type) == (text, kind)
