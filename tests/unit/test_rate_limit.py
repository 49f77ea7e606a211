"""One log entry of each kind in ten seconds, with a count."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest

from harness_ipc import _rate_limit
from harness_ipc._rate_limit import RateLimitedLogger

logger = logging.getLogger(__name__)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_rate_limit, "time", clock)
    return clock


@pytest.fixture
def limited(clock: Clock) -> RateLimitedLogger:
    return RateLimitedLogger(logger)


def caught(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it raises")


def key_error() -> object:
    return os.environ["NO_SUCH_VARIABLE"]


def value_error() -> object:
    return int("x")


def two_lines(first: bool) -> object:
    if first:
        return int("x")
    return int("x")


def wrapped(cause: Callable[[], object]) -> object:
    try:
        return cause()
    except Exception as error:
        raise RuntimeError("wrapped") from error


def grouped(cause: Callable[[], object]) -> object:
    raise ExceptionGroup("grouped", [caught(cause)])


def recursion(depth: int) -> object:
    return recursion(depth - 1) if depth else int("x")


def test_an_entry_is_logged_once_in_ten_seconds_with_a_count(
    limited: RateLimitedLogger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(500):
        limited.warning("refused a client: %s", number)
    clock.now += 9.9
    limited.warning("refused a client: %s", "last")
    limited.error("another kind")
    clock.now += 0.2
    limited.warning("refused a client: %s", "next")
    limited.warning("refused a client: %s", "left out")
    clock.now += 1000
    limited.warning("refused a client: %s", "much later")
    assert [record.getMessage() for record in caplog.records] == [
        "refused a client: 0",
        "another kind",
        "refused a client: next (and 500 more like this since the last one was logged)",
        "refused a client: much later (and 1 more like this since the last one was logged)",
    ]
    assert [record.levelno for record in caplog.records[:2]] == [logging.WARNING, logging.ERROR]


def test_a_traceback_is_logged_once_for_each_type_and_place(
    limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    different = [
        key_error,
        value_error,
        lambda: two_lines(True),
        lambda: two_lines(False),
        lambda: wrapped(key_error),
        lambda: wrapped(value_error),
        lambda: grouped(key_error),
        lambda: grouped(value_error),
    ]
    for _ in range(100):
        for function in different:
            limited.exception("the handler failed", caught(function))
    assert len(caplog.records) == len(different)
    assert all(record.exc_info for record in caplog.records)


def test_recursions_of_any_depth_are_one_kind(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    for depth in range(3, 100):
        limited.exception("the handler failed", caught(lambda depth=depth: recursion(depth)))  # type: ignore[misc]
    assert len(caplog.records) == 1


def test_errors_without_a_traceback_are_distinguished(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    for function in (key_error, value_error, key_error):
        limited.warning("health check failed: %s", "x", error=caught(function))
    assert [record.exc_info for record in caplog.records] == [None, None]


def test_an_exception_that_is_its_own_context_is_a_kind(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    first, second = caught(key_error), caught(value_error)
    first.__context__, second.__context__ = second, first
    limited.exception("the handler failed", first)
    assert len(caplog.records) == 1


def test_the_number_of_remembered_kinds_is_bounded(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1001):
        limited.warning(f"kind {number}")
    assert len(caplog.records) == 1001
    caplog.clear()
    # The first kind was evicted.
    for number in (1000, 999, 1, 0):
        limited.warning(f"kind {number}")
    assert [record.getMessage() for record in caplog.records] == ["kind 0"]
