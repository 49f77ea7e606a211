"""Progress of a start: sent at once, recorded once an interval, and ignored afterwards."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import Any

import pytest

from harness_ipc import MessageTooLarge, ProtocolError, report
from harness_ipc._progress import StartProgress


class Log:
    """A fake ready pipe and registration: records values and times."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.recorded: list[tuple[float, Any]] = []

    def send_progress(self, value: Any) -> None:
        self.sent.append(value)

    def report(self, value: Any) -> None:
        self.recorded.append((time.monotonic(), value))

    def progress(self, **options: float) -> StartProgress:
        both: Any = self
        return StartProgress(both, both, **options)


def test_reports_are_sent_at_once_and_recorded_once_an_interval() -> None:
    log = Log()

    async def main() -> None:
        with log.progress(interval=60):
            for n in range(50):
                await report({"done": n})

    asyncio.run(main())
    assert log.sent == [{"done": n} for n in range(50)]
    assert [value for _, value in log.recorded] == [{"done": 0}]


def test_the_latest_report_is_recorded_after_the_interval() -> None:
    log = Log()

    async def main() -> None:
        with log.progress(interval=0.1):
            for n in range(50):
                await report({"done": n})
            while log.recorded[-1][1] != {"done": 49}:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 30))
    times = [at for at, _ in log.recorded]
    # Windows' clock has steps of 16 ms.
    assert all(after - before > 0.05 for before, after in pairwise(times))


def test_a_report_is_a_copy() -> None:
    log, value = Log(), {"done": 1}

    async def main() -> None:
        with log.progress():
            await report(value)
            value["done"] = 2

    asyncio.run(main())
    assert log.sent == [value_then := {"done": 1}]
    assert [recorded for _, recorded in log.recorded] == [value_then]


def test_a_task_that_outlives_the_start_reports_nothing() -> None:
    log = Log()

    async def late(over: asyncio.Event) -> None:
        await over.wait()
        await report("late")

    async def main() -> None:
        over = asyncio.Event()
        with log.progress():
            task = asyncio.create_task(late(over))
            await report("early")
        await report("outside")
        over.set()
        await task

    asyncio.run(main())
    assert log.sent == ["early"]


@pytest.mark.parametrize(("value", "error"), [({1, 2}, ProtocolError), ("x" * 4000, MessageTooLarge)])
def test_an_unsendable_report_is_an_error(value: Any, error: type[Exception]) -> None:
    log = Log()

    async def main() -> None:
        with log.progress():
            await report("x" * 3900)
            await report(value)

    with pytest.raises(error):
        asyncio.run(main())
    assert log.sent == ["x" * 3900]
