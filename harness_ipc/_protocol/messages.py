"""Messages, one JSON object in each frame, and the requests reserved for the channel. No I/O."""

from __future__ import annotations

import json

from ..errors import ProtocolError, RemoteError
from .framing import check_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    Message = dict[str, Any]

# Tens of megabytes occur: screenshots and DOM dumps in base64.
DEFAULT_MAX_MESSAGE = 64 * 1024 * 1024

# Requests of the form {"meta": verb} that the channel answers. Other verbs belong to the application.
PING = "ping"
HEALTH = "health"
DESCRIBE = "describe"
SHUTDOWN = "shutdown"
# Sent unsolicited by a daemon that closes: unanswered requests on this connection have not run and will not run.
GOODBYE_FRAME = b'{"meta":"goodbye"}'
# The keys of a reply that are reserved for the channel.
_RESERVED_KEYS = ("meta", "continues")


def _reject_constant(constant: str) -> NoReturn:
    raise ProtocolError(f"{constant} is not valid JSON: send null, or a string")


def to_json(value: Any) -> Any:
    """Convert a value that is not JSON: the default conversion of results. Raises `TypeError` for other types.

    Bytes become base64, a dataclass an object of its fields, a path its text, and a datetime ISO 8601.
    """
    if isinstance(value, (bytes, bytearray)):
        from binascii import b2a_base64

        return b2a_base64(value, newline=False).decode("ascii")
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        from dataclasses import fields

        return {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(value, "__fspath__") and not isinstance(value, type):
        return value.__fspath__()
    from datetime import datetime

    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


class Encoder(json.JSONEncoder):
    """An encoder of messages; `convert` converts values that are not JSON."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        # ensure_ascii preserves lone surrogates, which occur in page text and have no UTF-8.
        super().__init__(allow_nan=False, ensure_ascii=True, separators=(",", ":"), default=convert)
        # c_make_encoder is private. The base class calls it for each message, which takes half of the time of a short message.
        make = getattr(json.encoder, "c_make_encoder", None)
        quote = json.encoder.encode_basestring_ascii
        self._encode = make and make(None, convert, quote, None, ":", ",", False, False, False)

    def encode(self, o: Any) -> str:
        return "".join(self._encode(o, 0)) if self._encode else super().encode(o)


# Created once: json.loads() with parse_constant would create a decoder for each call.
_encoder = Encoder(to_json)
_decoder = json.JSONDecoder(parse_constant=_reject_constant)
_WHITESPACE = " \t\n\r"


def encode(message: Message, limit: int | None = None, encoder: json.JSONEncoder = _encoder) -> bytes:
    """Return `message` as the bytes of one frame.

    Raises `ProtocolError` for anything that is not a JSON object, naming the offending key and type, and `MessageTooLarge`
    above `limit` bytes, if given.
    """
    if not isinstance(message, dict):
        raise ProtocolError(f"a message must be a dict, not {type(message).__name__}")
    try:
        frame = encoder.encode(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        where = _find_unsendable(message, encoder)
        raise ProtocolError(f"this message can't be sent as JSON: {where and f'{where}: '}{_one_line(error)}") from error
    if limit is not None and len(frame) > limit:
        check_size(len(frame), limit)
    return frame


def _find_unsendable(message: Message, encoder: json.JSONEncoder) -> str:
    """Return the path of the first value that `encoder` refuses, as in "result.items[3].when", or "" if unknown."""
    try:
        return next(_unsendable(message, "", encoder), "")[:200]
    except (TypeError, ValueError, RecursionError):
        return ""


def _unsendable(value: Any, path: str, encoder: json.JSONEncoder) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            name = f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!a}]"
            yield from _unsendable(item, (path + name).removeprefix("."), encoder)
        value = dict.fromkeys(value)  # check the keys
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _unsendable(item, f"{path}[{i}]", encoder)
        return
    try:
        encoder.encode(value)
    except (TypeError, ValueError):
        try:
            plain = encoder.default(value)
        except TypeError:
            plain = None
        yield from _unsendable(plain, path, encoder)
        yield path


def decode(frame: bytes) -> Message:
    """Return the JSON object in `frame`. Raises `ProtocolError` for anything else."""
    try:
        text = frame.decode("utf-8").strip(_WHITESPACE)
        message, end = _decoder.raw_decode(text)  # decode() would scan for whitespace twice
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is not valid JSON: {_one_line(error)}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a message must be a JSON object, not {type(message).__name__}")
    return message


def error_reply(error: BaseException) -> Message:
    """Return the reply for `error`: a `RemoteError` with its attributes, any other exception as its name and text."""
    try:
        if isinstance(error, RemoteError):
            data = {} if error.data is None else {"data": error.data}
            return {"error": {"type": str(error.type), "message": str(error.message), **data}}
        text = str(error)
    except BaseException as failure:
        text = f"(its text failed with {type(failure).__name__})"
    return {"error": {"type": type(error).__name__, "message": text}}


def not_executed(error: BaseException) -> Message:
    """Return the reply for `error` that says that the request did not run. Only the channel may say so."""
    reply = error_reply(error)
    reply["error"]["executed"] = False
    return reply


def stopping_reply() -> Message:
    """Return the reply to a request that was cancelled because the daemon stops."""
    text = "the daemon stopped while the request was running"
    return {"error": {"type": "DaemonStopping", "message": text, "executed": True}}


def item_reply(value: Any) -> Message:
    """Return the reply for one item of a stream, or progress; another reply follows."""
    return {"continues": True, "result": value}


def check_reply(reply: Any) -> Message:
    """Return a handler's `reply`. Raises `TypeError` unless it is a dict, and `ProtocolError` for a reserved key."""
    if not isinstance(reply, dict):
        raise TypeError(f"the handler returned {type(reply).__name__}: a reply must be a dict")
    for key in _RESERVED_KEYS:
        if key in reply:
            raise ProtocolError(f'the key "{key}" of a reply is reserved')
    error = reply.get("error")
    if isinstance(error, dict) and "executed" in error:
        raise ProtocolError('the key "executed" of an error is reserved')
    return reply


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
