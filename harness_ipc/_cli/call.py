"""The commands `call` and `describe`. Heavy imports are local, to keep each call fast."""

from __future__ import annotations

import os
import sys

from .. import client
from .._protocol import messages
from ..errors import HarnessIPCError, InvalidParams, ProtocolError
from .output import escape, print_error, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from .._protocol.messages import Message
    from ..client import Client

# The width of the progress bar, in characters.
_BAR_WIDTH = 30


def call(options: argparse.Namespace) -> int:
    """Send a message and print the reply, or call a method and print its result."""
    is_json = options.what == "-" or options.what[:1] in ("{", "[")
    try:
        message = _read_message(options) if is_json else {"method": options.what, "params": _parse_params(options.params)}
    except ProtocolError as error:
        print_error(f"the message is invalid: {error}")
        return 2
    if is_json and "more" not in message:
        reply = client.request(options.name, message, timeout=options.timeout, namespace=options.namespace)
        print_json(reply)
        return 1 if "error" in reply else 0
    params = message["params"]
    with client.Client(options.name, request_timeout=options.timeout, namespace=options.namespace) as daemon:
        try:
            _call_method(daemon, message["method"], params)
        except InvalidParams as error:
            hint = any(isinstance(value, str) for value in params.values()) and not is_json
            print_error(f"{error}{' (write KEY:=JSON for a value that is not text)' if hint else ''}")
            return 1
    return 0


def describe(options: argparse.Namespace) -> int:
    """Print the methods of a daemon."""
    with client.Client(options.name, request_timeout=options.timeout, namespace=options.namespace) as daemon:
        found = daemon.describe()
    if options.json:
        print_json(found)
        return 0
    app = f"app {found['app_version']}, " if found["app_version"] else ""
    print(escape(f"{found['name']}: {app}harness_ipc {found['version']}, Python {found['python']}"))
    for method in found["methods"]:
        print(escape(f"  {method['signature']}"))
        if method["doc"]:
            print(escape(f"      {method['doc']}"))
    return 0


def _read_message(options: argparse.Namespace) -> Message:
    if options.params:
        raise ProtocolError("a JSON message takes no further arguments")
    message = messages.decode(sys.stdin.buffer.read() if options.what == "-" else os.fsencode(options.what))
    if "more" in message:
        message.setdefault("params", {})
        if not isinstance(message.get("method"), str) or not isinstance(message["params"], dict):
            raise ProtocolError('a message with "more" needs a "method" (text) and "params" (an object)')
    return message


def _parse_params(words: list[str]) -> Message:
    params: Message = {}
    for word in words:
        key, equals, text = word.partition("=")
        is_json = key.endswith(":")
        key = key.removesuffix(":")
        if not equals or not key:
            raise ProtocolError(f"{word!a} is not KEY=TEXT or KEY:=JSON")
        if key in params:
            raise ProtocolError(f"the parameter {key!a} is given twice")
        # Wrapped in an object, so that it is validated as a message.
        params[key] = messages.decode(b'{"v":%s}' % os.fsencode(text))["v"] if is_json else text
    return params


def _call_method(daemon: Client, method: str, params: Message) -> None:
    progress = _Progress()
    has_items = is_stream = False
    try:
        with daemon.stream(method, params) as stream:
            for item in stream:
                if not has_items:
                    # Items are results, unless the daemon says that the method has only one.
                    has_items, is_stream = True, _is_stream(daemon, method, default=True)
                if is_stream:
                    print_json(item)
                else:
                    progress.show(item)
    finally:
        progress.clear()
    # A stream ends with null.
    if stream.result is not None or not (is_stream if has_items else _is_stream(daemon, method, default=False)):
        print_json(stream.result)


def _is_stream(daemon: Client, method: str, *, default: bool) -> bool:
    """Return whether the daemon describes `method` as a stream, or `default` if it does not describe it."""
    try:
        return bool(next((found["stream"] for found in daemon.describe()["methods"] if found["name"] == method), default))
    except HarnessIPCError:
        return default


class _Progress:
    """Progress on stderr: a bar if stderr is a terminal and the value has "done" and "total", otherwise a line of JSON."""

    def __init__(self) -> None:
        self._width = 0

    def show(self, value: Any) -> None:
        bar = _draw_bar(value) if sys.stderr.isatty() else None
        self.clear()
        if bar is None:
            import json

            print(json.dumps(value), file=sys.stderr, flush=True)
        else:
            self._width = len(bar)
            print(f"\r{bar}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the bar."""
        if self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
            self._width = 0


def _draw_bar(value: Any) -> str | None:
    done, total = (value.get("done"), value.get("total")) if isinstance(value, dict) else (None, None)
    if not isinstance(done, (int, float)) or not isinstance(total, (int, float)) or not 0 <= done <= total or not total:
        return None
    share = done / total
    return f"[{'#' * int(share * _BAR_WIDTH):{_BAR_WIDTH}}] {share:4.0%}  {done:.10g} of {total:.10g}"
