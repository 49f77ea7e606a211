"""The CDP events of a tab: buffered ones, and a stream of new ones."""

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

    At most the last 500 are kept, and at most 16 MiB of JSON. Texts above 16,384 characters are truncated, and end with the
    number of omitted characters. The params of an event that is still above 16 MiB are ``{"left_out_bytes": N}``. The daemon
    keeps an event until it is received: if this raises, no event is lost.
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
            # The other events are lost with their session.
            return events
        if not reply["events"]:
            return events
        events += reply["events"]
        request |= {"delivered": reply["delivered"], "until": reply["until"]}


def events(tab: Tab, *methods: str, timeout: float | None = None) -> EventStream:
    """Return an iterator over the events of the tab from now on: method, params, session_id.

    ```python
    for event in events("Network.responseReceived"):
        print(event["params"]["response"]["url"])
    ```

    With `methods`, only events of these. Domains other than Page, Runtime and Network have to be enabled first, as by
    ``cdp("DOM.enable")``. `close`, or the end of its ``with`` block, ends the stream. `drain_events` returns the events too.

    Raises `BrowserTimeout` if there is no event for `timeout` seconds, and `TabClosed` or `BrowserLost` at the end. If the
    reader is too slow (16 MiB or 10,000 events wait), the oldest events are dropped; `EventsDropped` is raised in their place,
    after which the iteration can continue.
    """
    return EventStream(tab, methods, timeout)


class EventStream:
    """The events of a tab: an iterator, and a context manager that closes it."""

    def __init__(self, tab: Tab, methods: tuple[str, ...], timeout: float | None) -> None:
        message = {"meta": "events", "methods": list(methods), "timeout": timeout}
        # The daemon enforces the timeout.
        self._items = tab.stream(message, timeout=inf if timeout is None else timeout + TIMEOUT)
        # The first item says that the stream has started: no event is missed from now on.
        next(self._items)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        item: dict[str, Any] = next(self._items)
        if "dropped" in item:
            raise EventsDropped(f"{item['dropped']} events were dropped: they were not read in time", count=item["dropped"])
        return item

    def close(self) -> None:
        """End the stream. Idempotent."""
        self._items.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
