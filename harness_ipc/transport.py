"""Connections between processes of one user: listen, dial, and frames with a limit and a deadline.

One platform switch: AF_UNIX in `_posix.py`, AF_PIPE in `_windows.py`. It knows neither keys nor what a frame says.
"""

from __future__ import annotations

import sys

from .errors import ConnectionLost, HarnessIPCError

if sys.platform == "win32":
    from ._windows import FAMILY, Connection, Listener, dial, lacking_descriptors, new_address
else:
    from ._posix import FAMILY, Connection, Listener, dial, lacking_descriptors, new_address

from ._base import PeerCredentials, deadline_after, remaining

__all__ = [
    "FAMILY",
    "Connection",
    "Listener",
    "PeerCredentials",
    "deadline_after",
    "dial",
    "flush",
    "lacking_descriptors",
    "lost",
    "new_address",
    "receive",
    "remaining",
    "send",
]


def receive(connection: Connection, limit: int) -> bytes:
    """Return the next frame, of up to `limit` bytes, before `connection.deadline`.

    Raises `ConnectionLost` at the end of the stream, `DaemonTimeout` at the deadline and `MessageTooLarge` above the limit;
    after each of them the connection can only be closed.
    """
    try:
        return connection.recv_bytes(limit)
    except HarnessIPCError:
        raise
    except (EOFError, OSError) as error:
        raise lost(error) from error


def send(connection: Connection, frame: bytes) -> None:
    """Send one frame before `connection.deadline`. Raises `ConnectionLost` and `DaemonTimeout`."""
    try:
        connection.send_bytes(frame)
    except HarnessIPCError:
        raise
    except OSError as error:
        raise lost(error) from error


def flush(connection: Connection) -> None:
    """Send what is held, before `connection.deadline`. Raises `ConnectionLost` and `DaemonTimeout`."""
    try:
        connection.flush()
    except HarnessIPCError:
        raise
    except OSError as error:
        raise lost(error) from error


def lost(error: BaseException) -> ConnectionLost:
    """Return the one error for the many ways in which a socket or a pipe breaks."""
    if isinstance(error, EOFError):
        return ConnectionLost("the peer closed the connection")
    return ConnectionLost(f"the connection broke: {str(error) or type(error).__name__}")
