"""The server's protocol as rows: bytes in, events and bytes out, and the state; every transition and misuse."""

from __future__ import annotations

import hmac
import json
from typing import Any

import pytest

from harness_ipc._protocol import session
from harness_ipc._protocol.framing import StreamFraming
from harness_ipc._protocol.session import PROVED, ServerProtocol
from harness_ipc.errors import AuthenticationFailed, HarnessIPCError, MessageTooLarge, ProtocolError

from .test_session import CHALLENGE, FAILURE, FAREWELL, ITEM, KEYS, LIMIT, NONCE, REPLY, REQUEST, WELCOME, events, sent, stream

STATES = ["HELLO", "ANSWERED", "IDLE", "ACTIVE", "CANCELLING", "REPLYING", "LEAVING", "CLOSED"]
MESSAGE = {"method": "m"}


def answer_to(frames: list[bytes]) -> bytes:
    """Return the client's valid proof for the frames of the daemon."""
    nonce = frames[1].removeprefix(CHALLENGE)
    return stream(WELCOME, b"{sha256}" + hmac.digest(KEYS.client, nonce, "sha256"))


def server_in(state: str) -> ServerProtocol:
    """Return a server's protocol in `state`, with nothing to send."""
    server = ServerProtocol(KEYS, StreamFraming(), LIMIT)
    if state != "HELLO":
        server.receive_data(stream(CHALLENGE + NONCE))
        assert server.next_event() is None
        frames = sent(server)
    if state not in ("HELLO", "ANSWERED"):
        server.receive_data(answer_to(frames))
        assert server.next_event() == PROVED
        assert sent(server) == [WELCOME]
    if state in ("ACTIVE", "CANCELLING", "REPLYING"):
        server.receive_data(stream(REQUEST))
        assert server.next_event() == MESSAGE
    if state == "CANCELLING":
        server.cancel()
    if state == "REPLYING":
        server.send_reply(REPLY)
    if state == "LEAVING":
        server.leave()
    if state == "CLOSED":
        server.close()
    sent(server)
    assert server.state == state
    return server


CALLS = {
    "reply": lambda server: server.send_reply(REPLY),
    "reply taken": ServerProtocol.reply_taken,
    "cancel": ServerProtocol.cancel,
    "leave": ServerProtocol.leave,
    "fail": lambda server: server.fail(ProtocolError("text")),
    "close": ServerProtocol.close,
}
ERROR = b'{"error":{"type":"ProtocolError","message":"text","executed":false}}'

# Calls in each state: the frames out, and the new state. Any other call is an error.
SENT: dict[tuple[str, str], tuple[list[bytes], str]] = {
    ("HELLO", "leave"): ([], "CLOSED"),
    ("ANSWERED", "leave"): ([FAREWELL], "LEAVING"),
    ("IDLE", "leave"): ([FAREWELL], "LEAVING"),
    ("IDLE", "fail"): ([ERROR], "LEAVING"),
    ("ACTIVE", "reply"): ([REPLY], "REPLYING"),
    ("ACTIVE", "cancel"): ([], "CANCELLING"),
    ("ACTIVE", "leave"): ([FAREWELL], "LEAVING"),
    ("CANCELLING", "reply"): ([REPLY], "REPLYING"),
    ("REPLYING", "reply taken"): ([], "IDLE"),
    ("LEAVING", "leave"): ([FAREWELL], "LEAVING"),
    **{(state, "close"): ([], "CLOSED") for state in STATES},
}

# Frames of a client in each state: the events, and the new state.
RECEIVED: list[tuple[str, list[bytes], list[Any], str]] = [
    ("HELLO", [CHALLENGE + NONCE], [], "ANSWERED"),
    ("IDLE", [REQUEST], [MESSAGE], "ACTIVE"),
    ("IDLE", [REQUEST, REQUEST], [MESSAGE], "ACTIVE"),
    ("ACTIVE", [REQUEST], [], "ACTIVE"),
    ("CANCELLING", [REQUEST], [], "CANCELLING"),
    ("REPLYING", [REQUEST], [], "REPLYING"),
    ("LEAVING", [REQUEST], [], "LEAVING"),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_server_calls_in_each_state(state: str, call: str) -> None:
    server = server_in(state)
    if (state, call) in SENT:
        CALLS[call](server)
        assert (sent(server), server.state) == SENT[state, call]
    else:
        with pytest.raises(RuntimeError, match=state):
            CALLS[call](server)
        assert (sent(server), server.state) == ([], state)


@pytest.mark.parametrize(("state", "frames", "expected", "afterwards"), RECEIVED)
def test_server_events_in_each_state(state: str, frames: list[bytes], expected: list[Any], afterwards: str) -> None:
    data = stream(*frames)
    for cut in range(len(data) + 1):
        server = server_in(state)
        found = []
        for piece in (data[:cut], data[cut:]):
            server.receive_data(piece)
            found += events(server)
        assert (found, server.state) == (expected, afterwards)


def test_the_rows_cover_every_transition() -> None:
    reached = {
        *SENT,
        *((state, "request") for state, _, found, _ in RECEIVED if found),
        ("HELLO", "answer"),
        ("ANSWERED", "proof"),
    }
    assert reached == set(session.SERVER_TRANSITIONS)


@pytest.mark.parametrize("state", [state for state, call in SENT if call == "leave"])
def test_requests_after_a_goodbye_are_discarded(state: str) -> None:
    server = server_in(state)
    server.leave()
    server.receive_data(stream(REQUEST))
    assert (server.next_event(), server.buffered) == (None, 0)


def test_a_goodbye_replaces_the_verdict() -> None:
    server = ServerProtocol(KEYS, StreamFraming(), LIMIT)
    server.receive_data(stream(CHALLENGE + NONCE))
    assert server.next_event() is None
    server.receive_data(answer_to(sent(server)))
    assert server.next_event() == PROVED
    server.leave()
    assert sent(server) == [FAREWELL]


def test_the_handshake_and_a_request_may_be_split_at_any_byte() -> None:
    first = stream(CHALLENGE + NONCE)
    for cut in range(len(first) + 1):
        server = ServerProtocol(KEYS, StreamFraming(), LIMIT)
        for data in (first[:cut], first[cut:]):
            server.receive_data(data)
            assert server.next_event() is None
        assert server.state == "ANSWERED"
        frames = sent(server)
        second = answer_to(frames) + stream(REQUEST)
        place = cut * len(second) // len(first)
        found: list[Any] = []
        for data in (second[:place], second[place:]):
            server.receive_data(data)
            while (event := server.next_event()) is not None:
                found.append(event)
        assert found == [PROVED, MESSAGE]
        server.send_reply(REPLY)
        assert sent(server) == [WELCOME, REPLY]


@pytest.mark.parametrize(
    ("state", "frame"),
    [
        ("HELLO", WELCOME),
        ("HELLO", REQUEST),
        ("HELLO", bytes(257)),
        ("ANSWERED", FAILURE),
        ("ANSWERED", REQUEST),
        ("ANSWERED", bytes(257)),
    ],
)
def test_a_client_that_does_not_prove_itself_is_refused(state: str, frame: bytes) -> None:
    server = server_in(state)
    server.receive_data(stream(frame))
    with pytest.raises(AuthenticationFailed):
        server.next_event()
    assert (server.state, server.next_event()) == ("CLOSED", None)


def test_a_client_with_a_wrong_proof_gets_a_verdict() -> None:
    server = server_in("ANSWERED")
    server.receive_data(stream(WELCOME, b"{sha256}" + bytes(32)))
    with pytest.raises(AuthenticationFailed):
        server.next_event()
    assert (server.state, sent(server)) == ("CLOSED", [FAILURE])


@pytest.mark.parametrize(
    ("data", "kind"),
    [(stream(bytes(LIMIT + 1)), MessageTooLarge), (b"\xff\xff\xff\xfe", ProtocolError)],
    ids=["large", "negative"],
)
def test_an_oversized_frame_ends_the_session_with_a_reason(data: bytes, kind: type[HarnessIPCError]) -> None:
    server = server_in("IDLE")
    server.receive_data(data)
    with pytest.raises(kind):
        server.next_event()
    (frame,) = sent(server)
    error = json.loads(frame)["error"]
    assert (error["type"], error["executed"], server.state) == (kind.__name__, False, "LEAVING")


@pytest.mark.parametrize("frame", [b"{", b"[1]", b"", b"\xff"])
def test_an_invalid_request_is_answered_and_the_next_one_served(frame: bytes) -> None:
    server = server_in("IDLE")
    server.receive_data(stream(frame, REQUEST))
    assert isinstance(server.next_event(), ProtocolError)
    server.send_reply(REPLY)
    server.reply_taken()
    assert server.next_event() == MESSAGE


@pytest.mark.parametrize("state", ["ACTIVE", "CANCELLING", "REPLYING"])
def test_read_ahead_waits_for_the_reply(state: str) -> None:
    server = server_in(state)
    server.receive_data(stream(REQUEST))
    assert (server.next_event(), server.buffered) == (None, len(stream(REQUEST)))
    if state != "REPLYING":
        server.send_item(ITEM)
        server.send_reply(REPLY)
        assert sent(server) == [ITEM, REPLY]
        assert server.next_event() is None
    server.reply_taken()
    assert (server.next_event(), server.buffered) == (MESSAGE, 0)


def test_frame_limits_by_state() -> None:
    assert [server_in(state).max_frame for state in ("HELLO", "ANSWERED", "IDLE", "ACTIVE")] == [256, 256, LIMIT, LIMIT]
