"""A round trip over a connection of this process to itself."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

from .. import _transport
from .._protocol.handshake import Keys
from .._protocol.session import READY, ClientProtocol, ServerProtocol
from .._registry import records
from .._transport import Framing, listen
from ..errors import ConnectionLost, HarnessIPCError
from .finding import Finding, describe

if sys.platform != "win32":
    from .directories import socket_length

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._registry.namespace import Namespace

# Seconds for the round trip, which takes milliseconds.
ROUND_TRIP_TIMEOUT = 5.0
_QUESTION, _ANSWER = b'{"question":1}', b'{"answer":1}'
_MAX_MESSAGE = 64


def round_trip(_: Namespace) -> Iterator[Finding]:
    """Check a request over a connection of this process to itself, in a private temporary directory."""
    errors: list[Exception] = []
    with tempfile.TemporaryDirectory(prefix="hi-", dir=_trial_parent(), ignore_cleanup_errors=True) as directory:
        try:
            seconds = _timed_round_trip(directory, errors)
        except (HarnessIPCError, OSError) as error:
            # Often only one side knows why the connection failed.
            text = "; the other side: ".join(map(describe, [error, *errors]))
            yield Finding("failure", "round trip", f"over {listen.FAMILY} it failed: {text}")
            return
    text = f"over {listen.FAMILY}, connected, authenticated and answered in {seconds * 1000:.1f} ms"
    yield Finding("ok", "round trip", text)


def _timed_round_trip(directory: str, errors: list[Exception]) -> float:
    address = listen.new_address(directory, records.new_generation_id())
    keys = Keys(os.urandom(32), address)
    deadline = _transport.deadline_after(ROUND_TRIP_TIMEOUT)
    listener = listen.Listener(address)
    daemon = threading.Thread(target=_answer, args=(listener, keys, deadline, errors), name="harness-ipc-doctor", daemon=True)
    daemon.start()
    try:
        start = time.perf_counter()
        _ask(address, keys, deadline)
        return time.perf_counter() - start
    finally:
        if daemon.is_alive():
            listener.wake()
            daemon.join(ROUND_TRIP_TIMEOUT)
        listener.close()


def _ask(address: str, keys: Keys, deadline: float) -> None:
    connection = _transport.connect(address, deadline)
    try:
        connection.deadline = deadline
        protocol = ClientProtocol(keys, _transport.Framing(), _MAX_MESSAGE)
        while not isinstance(event := protocol.next_event(), dict):
            if event == READY:
                protocol.send_request(_QUESTION)
            connection.send(protocol.data_to_send())
            if event is None:
                protocol.receive_data(connection.receive(protocol.frame_limit))
        if event != json.loads(_ANSWER):
            raise HarnessIPCError("the reply differs from the request")
    finally:
        connection.close()


def _answer(listener: listen.Listener, keys: Keys, deadline: float, errors: list[Exception]) -> None:
    try:
        with contextlib.closing(listener.accept_port()) as port:
            protocol = ServerProtocol(keys, Framing(), _MAX_MESSAGE)
            while not isinstance(event := protocol.next_event(), dict):
                if event is None:
                    write(port, protocol, deadline)
                    data = port.wait(deadline, reading=True, limit=protocol.max_frame)
                    if data == b"":
                        raise ConnectionLost("the peer closed the connection")
                    if data is not None:
                        protocol.receive_data(data)
                    _transport.remaining(deadline)
            protocol.send_reply(_ANSWER)
            write(port, protocol, deadline)
    except (HarnessIPCError, OSError) as error:
        errors.append(error)


def write(port: listen.Port, protocol: ServerProtocol, deadline: float) -> None:
    """Send the output of `protocol`."""
    for chunk in protocol.data_to_send():
        port.begin_write(chunk)
        while port.is_writing:
            _transport.remaining(deadline)
            port.wait(deadline, reading=False, limit=0)


def _trial_parent() -> str | None:
    # The round trip must not fail because of a long TMPDIR, which daemons need not use.
    if sys.platform == "win32" or socket_length(os.path.join(tempfile.gettempdir(), "hi-12345678")) <= listen.MAX_ADDRESS:
        return None
    return "/tmp"  # noqa: S108
