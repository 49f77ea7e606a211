"""One authenticated, race-free, cross-platform channel between a long-lived local daemon and short-lived processes.

Importing this imports what a client needs. The daemon's side, which imports asyncio, is loaded when it is first named.
"""

from __future__ import annotations

__version__ = "0.1.0"

from .client import AsyncClient, Client, aconnect_daemon, connect_daemon, identify, ping, request
from .endpoint import cleanup_endpoint
from .errors import (
    AlreadyRunning,
    AuthenticationFailed,
    Busy,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    StartFailed,
    UnsafeDirectory,
)
from .paths import log_path, runtime_dir, runtime_path
from .transport import PeerCredentials

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bridge import current_peer
    from .daemon import App, run_daemon
    from .server import DaemonServer, start_daemon_server

_DAEMON_SIDE = {
    "App": "daemon",
    "DaemonServer": "server",
    "current_peer": "bridge",
    "run_daemon": "daemon",
    "start_daemon_server": "server",
}

__all__ = [
    "AlreadyRunning",
    "App",
    "AsyncClient",
    "AuthenticationFailed",
    "Busy",
    "Client",
    "ConnectionLost",
    "DaemonNotRunning",
    "DaemonServer",
    "DaemonTimeout",
    "HarnessIPCError",
    "IncompatibleDaemon",
    "InvalidName",
    "MessageTooLarge",
    "PeerCredentials",
    "ProtocolError",
    "RemoteError",
    "StartFailed",
    "UnsafeDirectory",
    "__version__",
    "aconnect_daemon",
    "cleanup_endpoint",
    "connect_daemon",
    "current_peer",
    "identify",
    "log_path",
    "ping",
    "request",
    "run_daemon",
    "runtime_dir",
    "runtime_path",
    "start_daemon_server",
]


def __getattr__(name: str) -> object:
    if name in _DAEMON_SIDE:
        from importlib import import_module

        return getattr(import_module(f".{_DAEMON_SIDE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
