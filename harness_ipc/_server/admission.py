"""Admission of clients: the limits of pending handshakes, connections and descriptors. All methods are thread-safe."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from math import inf
from typing import TYPE_CHECKING

from .._descriptors import close_in_child
from .._rate_limit import RateLimitedLogger
from .._transport.listen import lacking_descriptors
from ..errors import AuthenticationFailed, DaemonTimeout, HarnessIPCError, MessageTooLarge

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from .._transport.listen import Accepted, Listener
    from .session import Host, Session

logger = logging.getLogger(__name__)

# At this number nothing more is accepted until those that are older than a second have been dropped. So neither silent clients
# nor a burst of honest ones can keep an honest client out.
MAX_PENDING_HANDSHAKES = 256
MIN_HANDSHAKE_TIME = 1.0
# Seconds before accept is retried without room, descriptors or memory.
PAUSE = 0.1


class Deadlines:
    """The deadlines of one event loop's connections, with one timer. A deadline is `Session.due`, a monotonic time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sessions: Callable[[], list[Session]]) -> None:
        self._loop = loop
        self._sessions = sessions
        self._timer: asyncio.TimerHandle | None = None
        # The monotonic time at which the timer is due.
        self._next = inf

    def set(self, session: Session, seconds: float) -> None:
        """Set a deadline in `seconds`, unless `session` has one. It is closed then, unless it has set `due` to infinity."""
        if session.due == inf and seconds < inf:
            session.due = time.monotonic() + seconds
            if session.due < self._next:
                self._schedule(session.due)

    def _schedule(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = due
        self._timer = self._loop.call_later(due - time.monotonic(), self._expire)

    def _expire(self) -> None:
        self._next = inf
        now = time.monotonic()
        sessions = self._sessions()
        for session in sessions:
            if session.due <= now:
                session.close(DaemonTimeout("it did not complete the handshake, or a message, in time"))
        if (due := min((session.due for session in sessions if session.due > now), default=inf)) < inf:
            self._schedule(due)


class Admission:
    """The listener and all connections, before and after the handshake."""

    def __init__(self, listener: Listener, max_connections: int) -> None:
        self.listener = listener
        # The number of clients accepted or refused: it shows whether the loop is blocked.
        self.accepted = 0
        self._max_connections = max_connections
        self._log = RateLimitedLogger(logger)
        self._lock = threading.Lock()
        self._pending: dict[Session, None] = {}
        self._sessions: dict[Session, None] = {}
        self._paused_until = 0.0
        close_in_child(self)

    def close_inherited(self) -> None:
        """Close a forked child's copies of the connections. Without the lock: a thread of the parent may have held it."""
        for session in (*self._pending, *self._sessions):
            session.connection.close_inherited()

    def accept(self) -> tuple[Accepted, str | None] | None:
        """Accept a client without waiting, and return the connection; None if no client is waiting, or if `is_paused`.

        If the connection uses the spare descriptor, the limit that was reached is returned with it.
        """
        try:
            if not self.make_room():
                self._pause()
                return None
            client = self.listener.accept()
        except BlockingIOError:
            return None
        except HarnessIPCError as error:
            self.accepted += 1
            self._log.warning("refused a client: %s", error)
            return None
        except OSError as error:
            if error.errno == errno.EBADF:  # the server was closed meanwhile
                return None
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._log.error("can't accept connections for now: %s", error)
                self._pause()
                return None
            return self._accept_spare()
        self.accepted += 1
        return client, None

    def _accept_spare(self) -> tuple[Accepted, str | None] | None:
        """Accept a client with the spare descriptor, to tell it that the limit is reached."""
        with self._lock:
            if self._drop_silent() or (full := lacking_descriptors()) is None:
                self._pause()
                return None
            self._log.error("can't accept connections for now: %s; raise it, or close files", full)
            try:
                return self.listener.accept_spare(), full
            except (HarnessIPCError, OSError):
                # No client is waiting, or another thread has taken the descriptor.
                self.listener.keep_spare()
                self._pause()
                return None

    def make_room(self) -> bool:
        """Return whether there is room for one more pending handshake, after dropping silent clients if necessary."""
        with self._lock:
            if len(self._pending) < MAX_PENDING_HANDSHAKES:
                return True
            self._drop_silent()
            return False

    def _drop_silent(self) -> bool:
        """Abort pending handshakes that are older than a second. Return whether there were any."""
        latest = time.monotonic() - MIN_HANDSHAKE_TIME
        silent = [session for session in self._pending if session.accepted_at <= latest]
        for session in silent:
            session.connection.abort()
        return bool(silent)

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + PAUSE

    def is_paused(self) -> bool:
        """Whether accepting is paused."""
        return time.monotonic() < self._paused_until

    def add(self, session: Session) -> None:
        """Register a connection that was just accepted."""
        with self._lock:
            self._pending[session] = None

    def admit(self, session: Session) -> None:
        """Admit an authenticated client, or set `session.full` to the limit that was reached."""
        with self._lock:
            if session.full is None and len(self._sessions) >= self._max_connections:
                session.full = f"all {self._max_connections} connections are taken (max_connections)"
            if session.full is None:
                self._pending.pop(session, None)
                self._sessions[session] = None

    def remove(self, session: Session, close: Callable[[], None]) -> None:
        """Call `close`, which closes the connection, and unregister it."""
        with self._lock:
            self._pending.pop(session, None)
            self._sessions.pop(session, None)
            # Under the lock: otherwise an abort may hit a descriptor that has been reused.
            with contextlib.suppress(OSError):
                close()
            self.listener.keep_spare()

    @property
    def connections(self) -> int:
        """The number of authenticated clients."""
        return len(self._sessions)

    def log_end(self, session: Session, error: Exception | None) -> None:
        """Log why a connection ends: debug for a normal end, a warning for a fault of the client, an error for a bug."""
        pid = session.peer.pid
        if error is None:
            logger.debug("the client with pid %s has disconnected", pid)
        elif isinstance(error, AuthenticationFailed):
            self._log.warning("refused the client with pid %s: %s", pid, error)
        elif isinstance(error, MessageTooLarge):
            self._log.warning("dropped the client with pid %s: %s", pid, error)
        elif isinstance(error, (HarnessIPCError, EOFError, OSError)):
            logger.debug("the client with pid %s has disconnected: %s", pid, error)
        else:
            self._log.exception("a connection failed", error)

    def log_full(self, session: Session) -> None:
        """Log that a client is rejected, and by which limit."""
        self._log.warning("rejected the client with pid %s: %s", session.peer.pid, session.full)

    def all(self) -> list[Session]:
        """Return all connections."""
        with self._lock:
            return [*self._pending, *self._sessions]

    def hosted_by(self, host: Host) -> list[Session]:
        """Return the connections of `host`. Call it in the thread of `host`."""
        return [session for session in self.all() if session.host is host]
