"""The client's protocol as rows: bytes in, events and bytes out, and the state; every transition and misuse."""

from __future__ import annotations

import hmac
import json
import struct
from typing import Any

import pytest

from harness_ipc._protocol import session
from harness_ipc._protocol.framing import PipeFraming, StreamFraming
from harness_ipc._protocol.handshake import Keys
from harness_ipc._protocol.session import GOODBYE, PROVED, READY, VERDICT, ClientProtocol, ServerProtocol
from harness_ipc.errors import AuthenticationFailed, HarnessIPCError, MessageTooLarge, ProtocolError

KEYS = Keys(bytes(range(32)), "/run/user/1000/harness-ipc/0123456789abcdef.sock")
LIMIT = 1000
CHALLENGE, WELCOME, FAILURE = b"#CHALLENGE#", b"#WELCOME#", b"#FAILURE#"
NONCE = b"{sha256}" + bytes(32)
FAREWELL = b'{"meta":"goodbye"}'
REPLY, ITEM, REQUEST = b'{"result":1}', b'{"continues":true,"result":2}', b'{"method":"m"}'


def stream(*frames: bytes) -> bytes:
    return b"".join(struct.pack("!i", len(frame)) + frame for frame in frames)


def sent(side: ClientProtocol | ServerProtocol) -> list[bytes]:
    framing = StreamFraming()
    for chunk in side.data_to_send():
        framing.feed(chunk)
    frames = []
    while (frame := framing.next_frame(1 << 20)) is not None:
        frames.append(frame)
    assert framing.buffered == 0
    return frames


def answer(client: ClientProtocol) -> bytes:
    """Return the daemon's valid answer to the challenge of `client`, and its own challenge."""
    (challenge,) = sent(client)
    return stream(b"{sha256}" + hmac.digest(KEYS.daemon, challenge.removeprefix(CHALLENGE), "sha256"), CHALLENGE + NONCE)


def proof() -> list[bytes]:
    return [WELCOME, b"{sha256}" + hmac.digest(KEYS.client, NONCE, "sha256")]


def client_in(state: str) -> ClientProtocol:
    """Return a client's protocol in `state`, with nothing to send."""
    client = ClientProtocol(KEYS, StreamFraming(), LIMIT)
    if state == "HELLO":
        sent(client)
        return client
    client.receive_data(answer(client))
    assert client.next_event() == READY
    if state == "PROVING":
        client.send_request(REQUEST)
    sent(client)
    if state not in ("ANSWERED", "PROVING"):
        client.receive_data(stream(WELCOME))
        assert client.next_event() == VERDICT
    if state in ("AWAITING", "STREAMING"):
        client.send_request(REQUEST)
        sent(client)
    if state == "STREAMING":
        client.receive_data(stream(ITEM))
        assert client.next_event() == json.loads(ITEM)
    if state == "GONE":
        client.receive_data(stream(FAREWELL))
        assert client.next_event() == GOODBYE
    if state == "CLOSED":
        client.close()
    assert client.state == state
    return client


def events(side: ClientProtocol | ServerProtocol) -> list[Any]:
    found = []
    while (event := side.next_event()) is not None:
        found.append(event)
    return found


STATES = ["HELLO", "ANSWERED", "PROVING", "IDLE", "AWAITING", "STREAMING", "GONE", "CLOSED"]
RESULT, CONTINUED = {"result": 1}, {"continues": True, "result": 2}

# Frames of a daemon in each state: the events, and the new state.
ROWS: list[tuple[str, list[bytes], list[Any], str]] = [
    ("ANSWERED", [WELCOME], [VERDICT], "IDLE"),
    ("ANSWERED", [FAREWELL], [GOODBYE], "GONE"),
    ("PROVING", [WELCOME], [], "AWAITING"),
    ("PROVING", [WELCOME, REPLY], [RESULT], "IDLE"),
    ("PROVING", [WELCOME, ITEM, REPLY], [CONTINUED, RESULT], "IDLE"),
    ("PROVING", [FAREWELL], [GOODBYE], "GONE"),
    ("PROVING", [WELCOME, FAREWELL], [GOODBYE], "GONE"),
    ("IDLE", [FAREWELL], [GOODBYE], "GONE"),
    ("AWAITING", [REPLY], [RESULT], "IDLE"),
    ("AWAITING", [REPLY, FAREWELL], [RESULT, GOODBYE], "GONE"),
    ("AWAITING", [ITEM], [CONTINUED], "STREAMING"),
    ("AWAITING", [FAREWELL], [GOODBYE], "GONE"),
    ("AWAITING", [b'{"continues":false,"result":1}'], [{"continues": False, "result": 1}], "IDLE"),
    ("AWAITING", [b'{"continues":1}'], [{"continues": 1}], "IDLE"),
    ("STREAMING", [ITEM, ITEM], [CONTINUED, CONTINUED], "STREAMING"),
    ("STREAMING", [REPLY], [RESULT], "IDLE"),
    ("STREAMING", [FAREWELL], [GOODBYE], "GONE"),
]


@pytest.mark.parametrize(("state", "frames", "expected", "afterwards"), ROWS)
def test_client_events_in_each_state(state: str, frames: list[bytes], expected: list[Any], afterwards: str) -> None:
    data = stream(*frames)
    for cut in range(len(data) + 1):
        client = client_in(state)
        client.receive_data(data[:cut])
        found = events(client)
        client.receive_data(data[cut:])
        assert (found + events(client), client.state, client.buffered) == (expected, afterwards, 0)
        assert sent(client) == []


def test_the_rows_cover_every_transition() -> None:
    reached = {(state, event) for state, event in session.CLIENT_TRANSITIONS if event in ("answer", "request", "close")}
    for state, frames, _, _ in ROWS:
        client = client_in(state)
        for frame in frames:
            before = client.state
            client.receive_data(stream(frame))
            client.next_event()
            verb = {WELCOME: "verdict", FAREWELL: "goodbye", ITEM: "item"}.get(frame, "reply")
            reached.add((before, verb))
    assert reached == set(session.CLIENT_TRANSITIONS)


@pytest.mark.parametrize(
    ("state", "frame", "kind"),
    [
        ("HELLO", b"{sha256}" + bytes(32), AuthenticationFailed),
        # A goodbye of an unauthenticated peer does not count.
        ("HELLO", FAREWELL, AuthenticationFailed),
        ("HELLO", bytes(257), AuthenticationFailed),
        ("ANSWERED", FAILURE, AuthenticationFailed),
        ("ANSWERED", REPLY, AuthenticationFailed),
        ("PROVING", FAILURE, AuthenticationFailed),
        ("PROVING", REPLY, AuthenticationFailed),
        ("IDLE", REPLY, ProtocolError),
        ("IDLE", ITEM, ProtocolError),
        ("GONE", REPLY, ProtocolError),
        ("GONE", FAREWELL, ProtocolError),
        ("CLOSED", REPLY, ProtocolError),
        ("AWAITING", b"{", ProtocolError),
        ("AWAITING", b"[1]", ProtocolError),
        ("AWAITING", bytes(LIMIT + 1), MessageTooLarge),
        ("STREAMING", b"", ProtocolError),
    ],
)
def test_invalid_replies_are_typed_errors(state: str, frame: bytes, kind: type[HarnessIPCError]) -> None:
    client = client_in(state)
    client.receive_data(stream(frame))
    with pytest.raises(kind):
        client.next_event()
    # It can still be closed, and no request can be sent on it by mistake.
    if state not in ("IDLE", "ANSWERED"):
        with pytest.raises(ProtocolError):
            client.send_request(REQUEST)
    client.close()
    assert client.state == "CLOSED"


@pytest.mark.parametrize("state", STATES)
def test_a_request_is_sent_only_if_none_is_in_flight(state: str) -> None:
    client = client_in(state)
    if state in ("ANSWERED", "IDLE"):
        client.send_request(REQUEST)
        assert sent(client) == [REQUEST]
    else:
        with pytest.raises(ProtocolError):
            client.send_request(REQUEST)
        assert sent(client) == []
    client.close()
    assert client.state == "CLOSED"


def test_handshake_split_at_any_byte() -> None:
    length = len(answer(ClientProtocol(KEYS, StreamFraming(), LIMIT)))
    for cut in range(length + 1):
        client = ClientProtocol(KEYS, StreamFraming(), LIMIT)
        data = answer(client)
        client.receive_data(data[:cut])
        assert client.next_event() == (READY if cut == length else None)
        if cut < length:
            client.receive_data(data[cut:])
            assert client.next_event() == READY
        client.send_request(REQUEST)
        assert sent(client) == [*proof(), REQUEST]


def test_a_refused_daemon_gets_a_verdict() -> None:
    client = client_in("HELLO")
    client.receive_data(stream(bytes(40)))
    with pytest.raises(AuthenticationFailed):
        client.next_event()
    assert sent(client) == [FAILURE]


def test_frame_limit_before_authentication() -> None:
    assert client_in("HELLO").frame_limit == 256
    assert client_in("ANSWERED").frame_limit == client_in("STREAMING").frame_limit == LIMIT


@pytest.mark.parametrize("framing", [StreamFraming, PipeFraming])
def test_both_sides_exchange_requests_items_and_a_goodbye(framing: Any) -> None:
    client, server = ClientProtocol(KEYS, framing(), LIMIT), ServerProtocol(KEYS, framing(), LIMIT)

    def carry() -> None:
        for sender, receiver in ((client, server), (server, client)):
            for chunk in sender.data_to_send():
                receiver.receive_data(chunk)

    carry()
    assert server.next_event() is None
    carry()
    assert client.next_event() == READY
    client.send_request(REQUEST)
    carry()
    assert server.next_event() == PROVED
    for _ in range(2):
        assert server.next_event() == {"method": "m"}
        server.send_item(ITEM)
        server.send_reply(REPLY)
        carry()
        server.reply_taken()
        assert events(client) == [CONTINUED, RESULT]
        client.send_request(REQUEST)
        carry()
    server.leave()
    carry()
    assert client.next_event() == GOODBYE
