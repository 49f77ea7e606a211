"""The events of a tab, as CDP has them: those that were kept, and those that come."""

from __future__ import annotations

from math import inf

from harness_ipc import ConnectionLost, DaemonNotRunning

from . import TIMEOUT
from .arguments import check_seconds
from .errors import EventsDropped, TabClosed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from .tab import Tab


def drain_events(tab: Tab, *, timeout: float = TIMEOUT) -> list[dict[str, Any]]:
    """Return the events of this process's tab since the last call: method, params, session_id.

    At most the last 500 are kept, and at most 16 MiB of JSON. Texts of a page above 16,384 characters are cut, with the number
    of those left out behind them; the params of an event that is still above 16 MiB are ``{"left_out_bytes": N}``. The daemon
    keeps an event until it was received: one that raises loses none.
    """
    check_seconds("timeout", timeout)
    events: list[dict[str, Any]] = []
    request: dict[str, Any] = {"meta": "drain_events", "delivered": 0}
    while True:
        try:
            reply = tab.request(request, timeout=timeout)
        except (ConnectionLost, DaemonNotRunning, TabClosed):
            if not events:
                raise
            # What was kept is gone, but for these.
            return events
        if not reply["events"]:
            return events
        events += reply["events"]
        request |= {"delivered": reply["delivered"], "until": reply["until"]}


def events(tab: Tab, *methods: str, timeout: float | None = None) -> EventStream:
    """Return an iterator over the events of the tab as they come, from now on: method, params, session_id.

    ```python
    for event in events("Network.responseReceived"):
        print(event["params"]["response"]["url"])
    ```

    Only those of `methods`, if there are any. Those of other domains than Page, Runtime and Network come once they are enabled,
    as by ``cdp("DOM.enable")``. Leaving the loop, or `close`, ends it. `drain_events` returns them nevertheless.

    Raises `BrowserTimeout` if none comes for `timeout` seconds, `TabClosed` or `BrowserLost` where no more will, and
    `EventsDropped` in the place of events that were not read in time (16 MiB or 10,000 wait): it goes on after that.
    """
    return EventStream(tab, methods, timeout)


class EventStream:
    """The events of a tab: an iterator, and a context manager that closes it."""

    def __init__(self, tab: Tab, methods: tuple[str, ...], timeout: float | None) -> None:
        message = {"meta": "events", "methods": list(methods), "timeout": timeout}
        # The daemon keeps the time.
        self._items = tab.stream(message, timeout=inf if timeout is None else timeout + TIMEOUT)
        # Asked for with the first item, which says that no event is missed from now on.
        next(self._items)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        item: dict[str, Any] = next(self._items)
        if "dropped" in item:
            raise EventsDropped(f"{item['dropped']} events were dropped: they were not read in time", count=item["dropped"])
        return item

    def close(self) -> None:
        """Stop listening. Closing twice is no error."""
        self._items.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
