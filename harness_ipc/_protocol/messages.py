"""Messages: a JSON object in one frame, and the requests reserved for the channel itself. No I/O."""

from __future__ import annotations

import json

from ..errors import ProtocolError
from .framing import check_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Message = dict[str, Any]

# Tens of megabytes are real: a screenshot or a DOM dump in base64.
DEFAULT_MAX_MESSAGE = 64 * 1024 * 1024

# Requests of the form {"meta": verb} that the channel answers. Any other verb is the application's own.
PING = "ping"
HEALTH = "health"
SHUTDOWN = "shutdown"
# What a daemon that leaves says, unasked: all that it has not answered on this connection has not run and will not run.
GOODBYE_FRAME = b'{"meta":"goodbye"}'
# The keys of a message and of a reply that belong to the channel.
_CHANNELS_OWN = ("meta", "continues")


def _reject_constant(constant: str) -> NoReturn:
    raise ProtocolError(f"{constant} is not JSON: send null, or a string")


# Made once: json.loads() with parse_constant builds a decoder for each call. ensure_ascii carries lone surrogates, which
# page text has and UTF-8 has not.
_encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=True, separators=(",", ":"))
_decoder = json.JSONDecoder(parse_constant=_reject_constant)
_WHITESPACE = " \t\n\r"


def encode(message: Message, limit: int | None = None) -> bytes:
    """Return `message` as the bytes of one frame.

    Raises `ProtocolError` for anything that is not a JSON object, naming the offending type, and `MessageTooLarge` above
    `limit` bytes, if there is one.
    """
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a dict, not {type(message).__name__}")
    try:
        frame = _encoder.encode(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"this message can't be sent as JSON: {_one_line(error)}") from error
    if limit is not None and len(frame) > limit:
        check_size(len(frame), limit)
    return frame


def decode(frame: bytes) -> Message:
    """Return the JSON object in `frame`. Raises `ProtocolError` for anything else."""
    try:
        text = frame.decode("utf-8").strip(_WHITESPACE)
        message, end = _decoder.raw_decode(text)  # without the two searches for whitespace of decode()
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is not a message: {_one_line(error)}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a JSON object, not {type(message).__name__}")
    return message


def error_reply(error: BaseException) -> Message:
    """Return the reply that carries `error` to the client."""
    try:
        text = str(error)
    except BaseException as failure:
        text = f"(its text failed with {type(failure).__name__})"
    return {"error": {"type": type(error).__name__, "message": text}}


def not_executed(error: BaseException) -> Message:
    """Return the reply that carries `error`, and says that the request did not run. Only the channel says so."""
    reply = error_reply(error)
    reply["error"]["executed"] = False
    return reply


def stopping_reply() -> Message:
    """Return the reply to a request that was cancelled because the daemon stops."""
    text = "the daemon stopped while the request was running"
    return {"error": {"type": "DaemonStopping", "message": text, "executed": True}}


def item_reply(value: Any) -> Message:
    """Return the reply that carries one item of a stream, or progress; another reply follows."""
    return {"continues": True, "result": value}


def check_reply(reply: Any) -> Message:
    """Return a handler's `reply`. Raises `TypeError` unless it is a dict, `ProtocolError` for a key of the channel."""
    if not isinstance(reply, dict):
        raise TypeError(f"the handler returned {type(reply).__name__}, a reply is a dict")
    for key in _CHANNELS_OWN:
        if key in reply:
            raise ProtocolError(f'a reply has no "{key}": that key belongs to the channel')
    error = reply.get("error")
    if isinstance(error, dict) and "executed" in error:
        raise ProtocolError('an error has no "executed": that key belongs to the channel')
    return reply


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
