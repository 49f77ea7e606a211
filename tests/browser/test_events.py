"""Events of a tab: buffered and streamed."""

from __future__ import annotations

import pytest

from harness_ipc.browser.errors import BrowserTimeout, EventsDropped, TabClosed
from harness_ipc.browser.helpers import cdp, close_tab, current_tab, drain_events, events, js, new_tab, switch_tab
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = [needs_chromium, pytest.mark.usefixtures("page")]

CONSOLE = "Runtime.consoleAPICalled"
# Size of one event. Console events are truncated, those of bindings are not.
LARGE = 1024 * 1024


def test_events_of_a_method_come_in_order() -> None:
    with events(CONSOLE, timeout=PATIENCE) as stream:
        js("for (let n = 0; n < 100; n++) console.log(n)")
        assert [next(stream)["params"]["args"][0]["value"] for _ in range(100)] == list(range(100))
    logged = [event["params"]["args"][0]["value"] for event in drain_events() if event["method"] == CONSOLE]
    assert logged == list(range(100))


def test_events_are_those_of_the_tab(site: Site) -> None:
    mine = current_tab()
    with events("Network.responseReceived", timeout=PATIENCE) as stream:
        new_tab(f"{site.url}/?theirs")
        switch_tab(mine)
        visit(f"{site.url}/?mine")
        assert next(stream)["params"]["response"]["url"] == f"{site.url}/?mine"


def test_a_stream_without_events_ends_by_its_timeout() -> None:
    with pytest.raises(BrowserTimeout, match=r"no event within 0\.1 s"):
        next(events(CONSOLE, timeout=0.1))


def test_a_stream_ends_with_its_tab() -> None:
    stream = events(CONSOLE, timeout=PATIENCE)
    close_tab()
    with pytest.raises(TabClosed):
        next(stream)


def test_a_slow_reader_gets_the_number_of_dropped_events() -> None:
    cdp("Runtime.addBinding", name="tell")
    with events("Runtime.bindingCalled", timeout=PATIENCE) as stream:
        # More than the buffers of the daemon and of the connection together.
        js(f"for (let n = 0; n < 24; n++) tell(n + ' '.repeat({LARGE}))", timeout=PATIENCE)
        js("tell('last')")
        read: list[str] = []
        dropped = 0
        while "last" not in read:
            try:
                read.append(next(stream)["params"]["payload"].strip())
            except EventsDropped as error:
                dropped += error.data["count"]
    assert dropped > 0
    assert len(read) + dropped == 25


def test_many_large_events_are_drained_in_pieces() -> None:
    cdp("Runtime.addBinding", name="tell")
    drain_events()
    js(f"for (let n = 0; n < 12; n++) tell(n + ' '.repeat({LARGE}))", timeout=PATIENCE)
    kept = [event["params"]["payload"].strip() for event in drain_events(timeout=PATIENCE) if "binding" in event["method"]]
    assert kept == [str(number) for number in range(12)]
    assert drain_events() == []
