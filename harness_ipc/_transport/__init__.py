"""Connections between processes of one user, with deadlines: AF_UNIX in `dial.py`, AF_PIPE in `windows.py`.

The daemon's side is not imported here: see `listen.py` and `windows_listen.py`.
"""

from __future__ import annotations

import sys

from .base import PeerCredentials, deadline_after, remaining, serving_threads

if sys.platform == "win32":
    from .._protocol.framing import PipeFraming as Framing
    from .windows import Connection, connect
else:
    from .._protocol.framing import StreamFraming as Framing
    from .dial import Connection, connect

__all__ = [
    "Connection",
    "Framing",
    "PeerCredentials",
    "connect",
    "deadline_after",
    "remaining",
    "serving_threads",
]
