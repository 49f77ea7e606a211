"""The error tree: as documented, built-in bases, pickling."""

from __future__ import annotations

import builtins
import copy
import pickle
import re

import pytest

from harness_ipc import errors
from harness_ipc.errors import (
    AlreadyRunning,
    AuthenticationFailed,
    Busy,
    ClientClosed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    ExpectedMore,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    InvalidParams,
    MessageTooLarge,
    MethodNotFound,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    StartFailed,
    UnsafeDirectory,
)

# The names and built-in bases in the module's docstring.
DRAWN = re.findall(r"^[│ ]*[├└]── (\w+) +(\w+) +\S", errors.__doc__ or "", re.MULTILINE)

INSTANCES: list[tuple[HarnessIPCError, dict[str, object]]] = [
    (InvalidName("text"), {}),
    (UnsafeDirectory("text", path="/run/d", remedy="chmod 700 /run/d"), {"path": "/run/d", "remedy": "chmod 700 /run/d"}),
    (DaemonNotRunning("text"), {}),
    (AlreadyRunning("text", pid=42), {"pid": 42}),
    (
        StartFailed("text", log_tail="last\nlines", type="ImportError", reason="no module"),
        {"log_tail": "last\nlines", "type": "ImportError", "reason": "no module"},
    ),
    (IncompatibleDaemon("text"), {}),
    (AuthenticationFailed("text"), {}),
    (Busy("text"), {}),
    (DaemonTimeout("text", maybe_executed=True), {"maybe_executed": True}),
    (ConnectionLost("text", maybe_executed=True), {"maybe_executed": True}),
    (ClientClosed("text", maybe_executed=True), {"maybe_executed": True}),
    (ResourceExhausted("text"), {}),
    (MessageTooLarge("text", size=10, limit=9, maybe_executed=True), {"size": 10, "limit": 9, "maybe_executed": True}),
    (ProtocolError("text", maybe_executed=True), {"maybe_executed": True}),
    (
        RemoteError("text", type="KeyError", data={"n": 1}, maybe_executed=False),
        {"message": "text", "type": "KeyError", "data": {"n": 1}, "maybe_executed": False},
    ),
    (MethodNotFound("text"), {"type": "MethodNotFound"}),
    (InvalidParams("text"), {"type": "InvalidParams"}),
    (ExpectedMore("text"), {"type": "ExpectedMore"}),
]
KINDS = pytest.mark.parametrize(("error", "attributes"), INSTANCES, ids=[type(error).__name__ for error, _ in INSTANCES])


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, HarnessIPCError)}
    assert {name for name, _ in DRAWN} == real - {"HarnessIPCError"}
    assert len(DRAWN) == len(INSTANCES)


@pytest.mark.parametrize(("name", "builtin"), DRAWN)
def test_each_leaf_is_the_builtin_that_a_caller_already_catches(name: str, builtin: str) -> None:
    leaf = getattr(errors, name)
    assert issubclass(leaf, HarnessIPCError)
    assert issubclass(leaf, getattr(builtins, builtin))


def assert_same(duplicate: HarnessIPCError, error: HarnessIPCError, attributes: dict[str, object]) -> None:
    assert type(duplicate) is type(error)
    assert str(duplicate) == str(error)
    assert duplicate.args == ("text",)
    assert {name: getattr(duplicate, name) for name in attributes} == attributes


@KINDS
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_the_text_and_the_attributes(
    error: HarnessIPCError, attributes: dict[str, object], protocol: int
) -> None:
    assert_same(pickle.loads(pickle.dumps(error, protocol)), error, attributes)


@KINDS
def test_copying_keeps_the_text_and_the_attributes(error: HarnessIPCError, attributes: dict[str, object]) -> None:
    for duplicate in (copy.copy(error), copy.deepcopy(error)):
        assert_same(duplicate, error, attributes)


@pytest.mark.parametrize("kind", [type(error) for error, _ in INSTANCES])
def test_only_a_remote_error_may_have_run_by_default(kind: type[HarnessIPCError]) -> None:
    assert kind("text").maybe_executed is (kind is RemoteError)


def test_a_remote_error_shows_its_type_and_its_message() -> None:
    error = RemoteError("no such word", type="KeyError")
    assert (str(error), error.message, error.data) == ("KeyError: no such word", "no such word", None)
    assert str(InvalidParams("'text' is missing")) == "InvalidParams: 'text' is missing"


def test_unknown_attributes_of_a_failed_start_are_empty() -> None:
    error = StartFailed("text")
    assert (error.log_tail, error.type, error.reason) == ("", "", "")
