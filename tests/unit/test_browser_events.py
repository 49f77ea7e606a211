"""Events of the browser: the limits, and draining without loss."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness_ipc._protocol import messages
from harness_ipc.browser import MAX_MESSAGE, MAX_TEXT
from harness_ipc.browser.events import MAX_EVENTS, MAX_QUEUE_BYTES, MAX_TOTAL_BYTES, EventStore

MEBI = 1024 * 1024
# An event requested by a client, whose texts are not truncated.
WHOLE = "Runtime.bindingCalled"
LARGE = "x" * MEBI


def add(store: EventStore, session: str | None, method: str = "Runtime.consoleAPICalled", **params: Any) -> None:
    frame = json.dumps({"method": method, "params": params, "sessionId": session}, ensure_ascii=False)
    parsed = json.loads(frame)
    store.add(session, method, parsed["params"], session, frame)


def add_large(store: EventStore, session: str, number: int = 0, text: str = LARGE) -> None:
    """Add an event that is not truncated. `text` is as in JSON: a conversion for each event would take most of the test."""
    params = {"n": number, "payload": text}
    frame = f'{{"method":"{WHOLE}","params":{{"n":{number},"payload":"{text}"}},"sessionId":"{session}"}}'
    store.add(session, WHOLE, params, session, frame)


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["params"]["n"] for event in events]


def test_a_drained_event_is_unchanged() -> None:
    store = EventStore()
    params = {"text": 'é😀"\\\ud800', "list": [1.5, None, {"a": True}]}
    frame = json.dumps({"method": "A.b", "params": params, "sessionId": "s"})
    store.add("s", "A.b", params, "s", frame)
    store.add("s", "A.b", params, "s", frame.encode())
    store.add("s", "A.c", {}, "s", '{"method":"A.c"}')
    event = {"method": "A.b", "params": params, "session_id": "s"}
    assert store.drain("s") == [event, event, {"method": "A.c", "params": {}, "session_id": "s"}]
    assert store.drain("s") == store.drain_all() == []
    assert store.size == 0


def test_the_oldest_events_of_a_session_are_dropped_above_500() -> None:
    store = EventStore()
    for number in range(MAX_EVENTS + 200):
        add(store, "loud", n=number)
    add(store, "quiet", n=-1)
    assert numbers(store.drain("quiet")) == [-1]
    assert numbers(store.drain("loud")) == list(range(200, MAX_EVENTS + 200))
    assert store.size == 0


def test_above_16_mebibytes_the_oldest_events_are_dropped() -> None:
    store = EventStore()
    add(store, "quiet", n=-1)
    for number in range(20):
        add_large(store, "loud", number)
        assert store.size <= MAX_QUEUE_BYTES + 100
    assert numbers(store.drain("quiet")) == [-1]
    assert numbers(store.drain("loud")) == list(range(5, 20))


def test_characters_are_counted_as_bytes() -> None:
    store = EventStore()
    add_large(store, "s", text="é" * MEBI)
    assert 2 * MEBI < store.size < 2 * MEBI + 100


def test_above_64_mebibytes_the_largest_session_loses_its_oldest() -> None:
    store = EventStore()
    add(store, None, "Target.targetCreated", n=-1)
    add(store, "quiet", n=-2)
    for number in range(15):
        for session in "abcde":
            add_large(store, session, number)
            assert store.size <= MAX_TOTAL_BYTES
    assert store.size > MAX_TOTAL_BYTES - 2 * MEBI
    assert numbers(store.drain("quiet")) == [-2]
    left = {session: numbers(store.drain(session)) for session in "abcde"}
    assert {len(kept) for kept in left.values()} == {12, 13}
    assert all(kept == list(range(15 - len(kept), 15)) for kept in left.values())
    assert numbers(store.drain_all()) == [-1]


def test_a_session_that_has_ended_keeps_no_events() -> None:
    store = EventStore()
    add(store, "s", n=1)
    store.forget("s")
    store.forget("never there")
    assert store.size == 0
    assert store.drain("s") == store.drain_all() == []


def test_a_drain_of_all_returns_500_events_in_order() -> None:
    store = EventStore()
    for number in range(MAX_EVENTS + 100):
        add(store, "ab"[number % 2] if number % 3 else None, n=number)
    events = store.drain_all()
    assert numbers(events) == list(range(100, MAX_EVENTS + 100))
    assert events[0]["session_id"] == "a"
    assert events[2]["session_id"] is None
    assert store.size == 0


def test_a_drain_of_all_returns_at_most_16_mebibytes() -> None:
    store = EventStore()
    for number in range(40):
        add_large(store, "abc"[number % 3], number)
    drained = [numbers(store.drain_all()) for _ in range(4)]
    assert [len(part) for part in drained] == [15, 15, 10, 0]
    assert [number for part in drained for number in part] == list(range(40))
    assert store.size == 0


@pytest.mark.parametrize("text", ["x", "é", "\x7f", "😀", '"'], ids=ascii)
def test_kept_events_fit_into_a_reply(text: str) -> None:
    store = EventStore()
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    payload = quoted * (MAX_QUEUE_BYTES // len(quoted.encode()) // 4 - 100)
    for _ in range(4):
        for session in "ab":
            add_large(store, session, text=payload)
    assert store.size > 1.9 * MAX_QUEUE_BYTES
    events = store.drain_all()
    assert len(events) == 4
    messages.encode({"events": events}, limit=MAX_MESSAGE)


def test_long_texts_are_truncated_at_any_depth() -> None:
    store = EventStore()
    short, long = "x" * MAX_TEXT, "é" * (MAX_TEXT + 7)
    add(store, "s", short=short, args=[{"value": long}, [long, 1]], deep={"a": {"b": long}}, n=1)
    (event,) = store.drain("s")
    cut = "é" * MAX_TEXT + "… (7 more characters were left out)"
    assert event["params"] == {"short": short, "args": [{"value": cut}, [cut, 1]], "deep": {"a": {"b": cut}}, "n": 1}


def test_truncated_texts_leave_room_for_500_events() -> None:
    store = EventStore()
    frame = json.dumps({"method": "Runtime.consoleAPICalled", "params": {"args": [{"value": "x" * 2 * MEBI}]}}).encode()
    for number in range(MAX_EVENTS + 1):
        parsed = json.loads(frame) if number % 100 == 0 else {"args": [{"value": "x" * (MAX_TEXT + 1)}]}
        store.add("s", "Runtime.consoleAPICalled", parsed, "s", frame)
    assert len(store.drain("s")) == MAX_EVENTS


@pytest.mark.parametrize("method", [WHOLE, "Page.screencastFrame", "Network.dataReceived", "Fetch.requestPaused"])
def test_requested_data_is_not_truncated(method: str) -> None:
    store = EventStore()
    add(store, "s", method, data="x" * MEBI)
    assert store.drain("s") == [{"method": method, "params": {"data": "x" * MEBI}, "session_id": "s"}]


@pytest.mark.parametrize("method", [WHOLE, "Runtime.consoleAPICalled"])
def test_an_event_above_the_limit_is_replaced_by_its_size(method: str) -> None:
    store = EventStore()
    add(store, "s", n=1)
    # Truncation can't make it smaller.
    params = {"args": ["x" * MAX_TEXT] * (MAX_QUEUE_BYTES // MAX_TEXT)}
    add(store, "s", method, **params)
    before, event = store.drain("s")
    assert before["params"] == {"n": 1}
    assert event["method"] == method
    assert list(event["params"]) == ["left_out_bytes"]
    assert event["params"]["left_out_bytes"] > MAX_QUEUE_BYTES


def test_an_event_may_be_as_deep_as_the_parser_allows() -> None:
    depth = 300  # Chrome's limit of nested values (kStackLimit in crdtp/json.cc)
    store = EventStore()
    nested: Any = "x" * (MAX_TEXT + 1)
    for _ in range(depth):
        nested = [nested]
    add(store, "s", nested=nested)
    (event,) = store.drain("s")
    text = event["params"]["nested"]
    for _ in range(depth):
        (text,) = text
    assert text.endswith("(1 more characters were left out)")


def test_events_are_kept_until_they_are_delivered() -> None:
    store = EventStore()
    for number in range(10):
        add_large(store, "s", number)
    first = store.read("s", delivered=0, until=None)
    # Not confirmed: the same again.
    assert store.read("s", delivered=0, until=None) == first
    seen = numbers(first["events"])
    add(store, "s", n=10)
    reply = first
    while reply["events"]:
        reply = store.read("s", delivered=reply["delivered"], until=reply["until"])
        seen += numbers(reply["events"])
    # Without events that were added since the first read.
    assert seen == list(range(10))
    assert numbers(store.drain("s")) == [10]
    assert store.read("never there", delivered=0, until=None)["events"] == []
