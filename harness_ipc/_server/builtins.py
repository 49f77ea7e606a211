"""Requests answered without the handler: built-in ones, and all those of a client above a limit."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from .. import __version__
from .._protocol import messages
from ..errors import Busy

if TYPE_CHECKING:
    from .._protocol.messages import Message
    from .server import DaemonServer
    from .session import Host, Session

logger = logging.getLogger(__name__)


def answer_builtin(server: DaemonServer, host: Host, session: Session, message: Message) -> bool:
    """Answer a built-in request, or any request of a client above a limit, now or later. Return False for other requests.

    Call it in the thread of the session's host.
    """
    verb = message.get("meta")
    if verb == messages.PING:
        host.start_ping(session)
    elif verb == messages.SHUTDOWN:
        logger.info("shutdown requested by pid %s", session.peer.pid)
        server.loop.call_soon_threadsafe(server.on_shutdown)
        session.send_reply(messages.encode({"shutdown": True}))
    elif session.full is not None:
        server.admission.log_full(session)
        session.send_reply(messages.encode(messages.not_executed(Busy(session.full))))
    elif verb == messages.DESCRIBE:
        record = server.record.public()
        versions = {key: record.get(key) for key in ("name", "app_version", "version", "python")}
        session.send_reply(messages.encode({"describe": {**versions, "methods": server.requests.describe()}}))
    else:
        return False
    return True


def send_pong(server: DaemonServer, session: Session, since: float, responsive: bool = True) -> None:
    """Reply to a ping, in the thread of the session's host.

    `since` is the monotonic time at which the server's loop was asked, or if it is not `responsive`, last ran.
    """
    counters = server.requests.counters
    pong = {
        "pong": True,
        "pid": server.record.pid,
        "generation": server.record.generation,
        "version": __version__,
        "responsive": responsive,
        "loop_lag": time.monotonic() - since,
        "connections": server.admission.connections,
        "requests": counters.requests,
        "errors": counters.errors,
        "idle": counters.idle,
        "full": session.full,
    }
    session.send_reply(messages.encode(pong))
