"""The error tree: as drawn, catchable as the builtins it promises, and whole after a pickle."""

from __future__ import annotations

import builtins
import pickle
import re

import pytest

from harness_ipc import errors
from harness_ipc.errors import (
    AlreadyRunning,
    AuthenticationFailed,
    Busy,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    StartFailed,
    UnsafeDirectory,
)

# Name and builtin of each leaf as the module's docstring draws it.
DRAWN = re.findall(r"^[├└]── (\w+) +(\w+) +\S", errors.__doc__ or "", re.MULTILINE)

INSTANCES = [
    (InvalidName("text"), {}),
    (UnsafeDirectory("text", path="/run/d", remedy="chmod 700 /run/d"), {"path": "/run/d", "remedy": "chmod 700 /run/d"}),
    (DaemonNotRunning("text"), {}),
    (AlreadyRunning("text", pid=42), {"pid": 42}),
    (StartFailed("text", log_tail="last\nlines"), {"log_tail": "last\nlines"}),
    (IncompatibleDaemon("text"), {}),
    (AuthenticationFailed("text"), {}),
    (Busy("text"), {}),
    (DaemonTimeout("text"), {}),
    (ConnectionLost("text"), {}),
    (MessageTooLarge("text", size=10, limit=9), {"size": 10, "limit": 9}),
    (ProtocolError("text"), {}),
    (RemoteError("text", type="KeyError"), {"type": "KeyError"}),
]


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, HarnessIPCError)}
    assert {name for name, _ in DRAWN} == real - {"HarnessIPCError"}
    assert len(DRAWN) == len(INSTANCES)


@pytest.mark.parametrize(("name", "builtin"), DRAWN)
def test_each_leaf_is_the_builtin_that_a_caller_already_catches(name: str, builtin: str) -> None:
    leaf = getattr(errors, name)
    assert issubclass(leaf, HarnessIPCError)
    assert issubclass(leaf, getattr(builtins, builtin))


@pytest.mark.parametrize(("error", "attributes"), INSTANCES, ids=[type(error).__name__ for error, _ in INSTANCES])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_the_text_and_the_attributes(
    error: HarnessIPCError, attributes: dict[str, object], protocol: int
) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert str(copy) == "text"
    assert {name: getattr(copy, name) for name in attributes} == attributes
