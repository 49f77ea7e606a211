"""One authenticated, race-free, cross-platform channel between a long-lived local daemon and short-lived processes.

Importing the package imports only what a client needs. The daemon's side, which imports asyncio, and the manager are imported
on first access.
"""

from __future__ import annotations

__version__ = "0.1.0"

from ._calls import AsyncStream, Stream
from ._registry.files import check_private_dir, create_private_dir
from ._registry.namespace import Namespace, log_path, runtime_dir, runtime_path
from ._text import escape_control
from ._transport import PeerCredentials
from .client import Client, connect_daemon, identify, ping, request
from .errors import (
    AlreadyRunning,
    AuthenticationFailed,
    Busy,
    ClientClosed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    ExpectedMore,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    InvalidParams,
    MessageTooLarge,
    MethodNotFound,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    StartFailed,
    UnsafeDirectory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._aclient import AsyncClient, aconnect_daemon
    from ._registry.lifetime import cleanup_endpoint
    from ._registry.processes import is_same_process, process_identity
    from ._server.requests import CurrentRequest, current_request, report
    from ._server.server import DaemonServer, start_daemon_server
    from ._status import DaemonStatus, daemon_alive, daemon_status, list_daemons
    from .daemon import App, run_daemon
    from .manager import ensure_daemon, restart_daemon, stop_daemon
    from .service import Service, method
    from .startup import spawn_kwargs

_LOADED_WHEN_NAMED = {
    "App": "daemon",
    "AsyncClient": "_aclient",
    "CurrentRequest": "_server.requests",
    "DaemonServer": "_server.server",
    "DaemonStatus": "_status",
    "Service": "service",
    "aconnect_daemon": "_aclient",
    "cleanup_endpoint": "_registry.lifetime",
    "current_request": "_server.requests",
    "daemon_alive": "_status",
    "daemon_status": "_status",
    "ensure_daemon": "manager",
    "is_same_process": "_registry.processes",
    "list_daemons": "_status",
    "method": "service",
    "process_identity": "_registry.processes",
    "report": "_server.requests",
    "restart_daemon": "manager",
    "run_daemon": "daemon",
    "spawn_kwargs": "startup",
    "start_daemon_server": "_server.server",
    "stop_daemon": "manager",
}

__all__ = [
    "AlreadyRunning",
    "App",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationFailed",
    "Busy",
    "Client",
    "ClientClosed",
    "ConnectionLost",
    "CurrentRequest",
    "DaemonNotRunning",
    "DaemonServer",
    "DaemonStatus",
    "DaemonTimeout",
    "ExpectedMore",
    "HarnessIPCError",
    "IncompatibleDaemon",
    "InvalidName",
    "InvalidParams",
    "MessageTooLarge",
    "MethodNotFound",
    "Namespace",
    "PeerCredentials",
    "ProtocolError",
    "RemoteError",
    "ResourceExhausted",
    "Service",
    "StartFailed",
    "Stream",
    "UnsafeDirectory",
    "__version__",
    "aconnect_daemon",
    "check_private_dir",
    "cleanup_endpoint",
    "connect_daemon",
    "create_private_dir",
    "current_request",
    "daemon_alive",
    "daemon_status",
    "ensure_daemon",
    "escape_control",
    "identify",
    "is_same_process",
    "list_daemons",
    "log_path",
    "method",
    "ping",
    "process_identity",
    "report",
    "request",
    "restart_daemon",
    "run_daemon",
    "runtime_dir",
    "runtime_path",
    "spawn_kwargs",
    "start_daemon_server",
    "stop_daemon",
]


def __getattr__(name: str) -> object:
    if name in _LOADED_WHEN_NAMED:
        from importlib import import_module

        return getattr(import_module(f".{_LOADED_WHEN_NAMED[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
