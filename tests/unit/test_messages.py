"""Messages: JSON survives a round trip, and anything else is a typed error, in both directions."""

from __future__ import annotations

import json.encoder
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import PurePosixPath
from typing import Any, ClassVar

import pytest

from harness_ipc import escape_control
from harness_ipc._protocol import messages
from harness_ipc.errors import MessageTooLarge, ProtocolError, RemoteError

LIMIT = messages.DEFAULT_MAX_MESSAGE

# json recurses, and so would the ids of these parameters.
NESTED: list[Any] = []
for _ in range(100_000):
    NESTED = [NESTED]
CIRCULAR: dict[str, Any] = {}
CIRCULAR["self"] = CIRCULAR


@pytest.mark.parametrize(
    "text",
    ["", "plain", "\0", "\ud800", "\udc00\ud800", "a\ud83dz", "\U0001f600", "\U0010ffff", '\u2028 \x7f "\\\r\n\t'],
    ids=ascii,
)
def test_any_text_survives_as_a_key_and_as_a_value(text: str) -> None:
    frame = messages.encode({text: [text, None, True, 1.5, -(2**70)]}, LIMIT)
    assert messages.decode(frame) == {text: [text, None, True, 1.5, -(2**70)]}
    # So the limit in bytes is the same on both sides, and lone surrogates can be sent.
    assert frame.isascii()


def test_an_interpreter_without_the_c_encoder_sends_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    message = {"\ud800": [1, 1.5, None, True, {"é": b"bytes"}]}
    sent = messages.encode(message)
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    assert messages.encode(message, encoder=messages.Encoder(messages.to_json)) == sent
    with pytest.raises(ProtocolError):
        messages.encode({"v": float("nan")}, encoder=messages.Encoder(messages.to_json))


@pytest.mark.parametrize("message", [None, [], "{}", b"{}", 1, {1}, ("a", 1)], ids=repr)
def test_a_message_must_be_a_dict(message: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"\b{type(message).__name__}\b"):
        messages.encode(message, LIMIT)


@pytest.mark.parametrize("value", [{1}, object(), 1j, frozenset(), date(2024, 1, 1)], ids=lambda value: type(value).__name__)
def test_an_unsendable_value_is_refused_with_its_type(value: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"\b{type(value).__name__}\b"):
        messages.encode({"deep": [{"er": value}]}, LIMIT)


@dataclass
class Point:
    x: Any
    y: int = 2
    kind: ClassVar[str] = "not a field"


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (b"\xff\0", "/wA="),
        (bytearray(b""), ""),
        (PurePosixPath("a/b"), "a/b"),
        (datetime(2024, 2, 29, 12, tzinfo=UTC), "2024-02-29T12:00:00+00:00"),
        (Point([Point(b"a")]), {"x": [{"x": "YQ==", "y": 2}], "y": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bytes_paths_times_and_dataclasses_are_converted(value: Any, sent: Any) -> None:
    assert messages.decode(messages.encode({"v": [value]})) == {"v": [sent]}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"result": {"items": [0, 1, 2, Point({1})]}}, "result.items[3].x: set is not JSON"),
        ({"result": ({"a b": 1j},)}, "result[0]['a b']: complex is not JSON"),
        ({"result": [1.0, float("inf")]}, "result[1]: Out of range"),
        ({"result": {"a": {(1, 2): 3}}}, "result.a: keys must be str"),
        ({"v": Point}, "v: type is not JSON"),
        ({(1, 2): 3}, "JSON: keys must be str"),
        ({"v": NESTED}, "JSON: maximum recursion depth"),
    ],
)
def test_the_error_has_the_path_of_the_unsendable_value(message: dict[Any, Any], text: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(text)):
        messages.encode(message)


@pytest.mark.parametrize(
    "message",
    [
        {"v": float("nan")},
        {"v": [float("inf")]},
        {"v": -float("inf")},
        {float("nan"): 1},
        {(1, 2): 1},
        {"v": 10**5000},
        {"v": NESTED},
        CIRCULAR,
    ],
    ids=["nan", "infinity", "-infinity", "nan as key", "tuple as key", "huge integer", "nested too deep", "circular"],
)
def test_invalid_json_is_never_sent(message: dict[Any, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.encode(message, LIMIT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b" ",
        b"{",
        b'{"v": }',
        b'{"v": 1} trailing',
        b"\xff\xfe{}",
        b'{"v": "\xed\xa0\x80"}',
        b"\xef\xbb\xbf{}",
        b'{"v": NaN}',
        b'{"v": Infinity}',
        b'{"v": [-Infinity]}',
        b"[" * 100_000,
        b'{"v":' * 100_000,
        b'{"v": ' + b"1" * 5000 + b"}",
        b"null",
        b"[]",
        b'"{}"',
        b"NaN",
        b"1",
    ],
    ids=lambda frame: ascii(frame[:20]),
)
def test_an_invalid_frame_is_a_protocol_error_in_one_line(frame: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.decode(frame)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_the_limit_is_inclusive() -> None:
    size = len(messages.encode({"v": "x"}, LIMIT))
    assert messages.encode({"v": "x"}, size)
    with pytest.raises(MessageTooLarge) as caught:
        messages.encode({"v": "x"}, size - 1)
    assert (caught.value.size, caught.value.limit) == (size, size - 1)
    assert str(size) in str(caught.value)
    assert str(size - 1) in str(caught.value)


def test_control_characters_are_escaped_unless_allowed() -> None:
    text = "a\x1b]0;t\x07\n\t\x7f\x9b2J\u202e\u2028é日😀\ud800 "
    assert escape_control(text) == r"a\x1b]0;t\x07\n\t\x7f\x9b2J\u202e\u2028é日😀\ud800 "
    assert escape_control(text, allow="\n\t") == "a\\x1b]0;t\\x07\n\t\\x7f\\x9b2J\\u202e\\u2028é日😀\\ud800 "


@pytest.mark.parametrize("error", [KeyError("k"), ValueError("lone \ud800\0\n"), Exception()], ids=ascii)
def test_any_exception_makes_a_reply_that_can_be_sent(error: Exception) -> None:
    reply = messages.decode(messages.encode(messages.error_reply(error), LIMIT))
    assert reply == {"error": {"type": type(error).__name__, "message": str(error)}}


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (RemoteError("text"), {"type": "RemoteError", "message": "text"}),
        (RemoteError("text", type="Locked"), {"type": "Locked", "message": "text"}),
        (RemoteError("text", type="Locked", data=[1]), {"type": "Locked", "message": "text", "data": [1]}),
        (type("Locked", (RemoteError,), {})("text", data=0), {"type": "Locked", "message": "text", "data": 0}),
    ],
    ids=["message", "type", "data", "subclass"],
)
def test_a_remote_error_makes_a_reply_with_its_own_message(error: RemoteError, content: dict[str, Any]) -> None:
    assert messages.error_reply(error) == {"error": content}
