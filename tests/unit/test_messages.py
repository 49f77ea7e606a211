"""Messages: what is JSON goes through whole, what is not is refused in one typed error, both ways."""

from __future__ import annotations

from typing import Any

import pytest

from harness_ipc import escape_control
from harness_ipc._protocol import messages
from harness_ipc.errors import MessageTooLarge, ProtocolError

LIMIT = messages.DEFAULT_MAX_MESSAGE

# json recurses, and so would building these as parameters' ids.
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
    # So the limit in bytes is the same on both sides, and a lone surrogate can travel.
    assert frame.isascii()


@pytest.mark.parametrize("message", [None, [], "{}", b"{}", 1, {1}, ("a", 1)], ids=repr)
def test_a_message_that_is_no_dict_is_refused_by_its_type(message: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"\b{type(message).__name__}\b"):
        messages.encode(message, LIMIT)


@pytest.mark.parametrize(
    "value", [{1}, b"bytes", object(), 1j, frozenset(), bytearray()], ids=lambda value: type(value).__name__
)
def test_a_value_that_json_has_not_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"\b{type(value).__name__}\b"):
        messages.encode({"deep": [{"er": value}]}, LIMIT)


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
def test_what_would_not_be_json_is_never_sent(message: dict[Any, Any]) -> None:
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
def test_a_frame_that_is_no_message_is_a_protocol_error_in_one_short_line(frame: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.decode(frame)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_the_limit_is_the_last_size_that_goes() -> None:
    size = len(messages.encode({"v": "x"}, LIMIT))
    assert messages.encode({"v": "x"}, size)
    with pytest.raises(MessageTooLarge) as caught:
        messages.encode({"v": "x"}, size - 1)
    assert (caught.value.size, caught.value.limit) == (size, size - 1)
    assert str(size) in str(caught.value)
    assert str(size - 1) in str(caught.value)


def test_control_characters_are_escaped_but_for_those_that_are_allowed() -> None:
    text = "a\x1b]0;t\x07\n\t\x7f\x9b2J\u202e\u2028é日😀\ud800 "
    assert escape_control(text) == r"a\x1b]0;t\x07\n\t\x7f\x9b2J\u202e\u2028é日😀\ud800 "
    assert escape_control(text, allow="\n\t") == "a\\x1b]0;t\\x07\n\t\\x7f\\x9b2J\\u202e\\u2028é日😀\\ud800 "


@pytest.mark.parametrize("error", [KeyError("k"), ValueError("lone \ud800\0\n"), Exception()], ids=ascii)
def test_any_exception_makes_a_reply_that_can_be_sent(error: Exception) -> None:
    reply = messages.decode(messages.encode(messages.error_reply(error), LIMIT))
    assert reply == {"error": {"type": type(error).__name__, "message": str(error)}}
