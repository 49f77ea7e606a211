"""Who is let in: pending handshakes, connections, descriptors, and their limits. Every method may be called from any thread."""

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

# Past this number the oldest are dropped to make room, once they had a second; until then nothing more is accepted. So silent
# clients can't keep an honest one out, nor a burst of honest ones.
MAX_PENDING_HANDSHAKES = 256
MIN_HANDSHAKE_TIME = 1.0
# Seconds to wait for room, for descriptors or for memory, which nothing announces, before accept is tried again.
PAUSE = 0.1


class Deadlines:
    """Closes the connections of one event loop that do not go on in time: see `Session.due`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sessions: Callable[[], list[Session]]) -> None:
        self._loop = loop
        self._sessions = sessions
        self._timer: asyncio.TimerHandle | None = None
        # The monotonic time at which the timer is due.
        self._next = inf

    def set(self, session: Session, seconds: float) -> None:
        """Close `session` in so many seconds, unless it has a deadline already, or sets `due` to infinity before."""
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
                session.close(DaemonTimeout("it did not prove itself, or send the rest of a message, in time"))
        if (due := min((session.due for session in sessions if session.due > now), default=inf)) < inf:
            self._schedule(due)


class Admission:
    """The listener and all connections: those that have not proved themselves, and those that are served."""

    def __init__(self, listener: Listener, max_connections: int) -> None:
        self.listener = listener
        # How many clients were accepted or refused: a loop that accepts is not blocked.
        self.accepted = 0
        self._max_connections = max_connections
        self._log = RateLimitedLogger(logger)
        self._lock = threading.Lock()
        self._pending: dict[Session, None] = {}
        self._sessions: dict[Session, None] = {}
        self._paused_until = 0.0
        close_in_child(self)

    def close_inherited(self) -> None:
        """Close a forked child's copies of the connections. Without the lock, which a thread may have had that is not there."""
        for session in (*self._pending, *self._sessions):
            session.connection.close_inherited()

    def accept(self) -> tuple[Accepted, str | None] | None:
        """Accept a client without waiting; None if nobody is there, or `is_paused`.

        With the connection comes the limit that keeps the client out, if the last descriptor is the spare one.
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
            if error.errno == errno.EBADF:  # the server has been closed meanwhile
                return None
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._log.error("can't accept connections for now: %s", error)
                self._pause()
                return None
            return self._accept_spare()
        self.accepted += 1
        return client, None

    def _accept_spare(self) -> tuple[Accepted, str | None] | None:
        """Accept a client though no descriptor is free, to tell it so."""
        with self._lock:
            if self._drop_silent() or (full := lacking_descriptors()) is None:
                self._pause()
                return None
            self._log.error("can't accept connections for now: %s; raise it, or close files", full)
            try:
                return self.listener.accept_spare(), full
            except (HarnessIPCError, OSError):
                # Nobody is there, or another thread of the app has taken the descriptor.
                self.listener.keep_spare()
                self._pause()
                return None

    def make_room(self) -> bool:
        """Return whether there is room for one more client that has to prove itself; drop silent ones if there is not."""
        with self._lock:
            if len(self._pending) < MAX_PENDING_HANDSHAKES:
                return True
            self._drop_silent()
            return False

    def _drop_silent(self) -> bool:
        """End the clients that have not proved themselves and had their time. Return whether there were any."""
        latest = time.monotonic() - MIN_HANDSHAKE_TIME
        silent = [session for session in self._pending if session.accepted_at <= latest]
        for session in silent:
            session.connection.abort()
        return bool(silent)

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + PAUSE

    def is_paused(self) -> bool:
        """Whether nobody is accepted for a moment on purpose."""
        return time.monotonic() < self._paused_until

    def add(self, session: Session) -> None:
        """Take note of a connection that was just accepted."""
        with self._lock:
            self._pending[session] = None

    def admit(self, session: Session) -> None:
        """Let a client in that has proved itself, or set `session.full`: the limit that keeps it out."""
        with self._lock:
            if session.full is None and len(self._sessions) >= self._max_connections:
                session.full = f"all {self._max_connections} connections are taken (max_connections)"
            if session.full is None:
                self._pending.pop(session, None)
                self._sessions[session] = None

    def remove(self, session: Session, close: Callable[[], None]) -> None:
        """Call `close`, which closes its connection, and forget it."""
        with self._lock:
            self._pending.pop(session, None)
            self._sessions.pop(session, None)
            # Under the lock, so that nobody aborts a descriptor that has become another file's.
            with contextlib.suppress(OSError):
                close()
            self.listener.keep_spare()

    @property
    def connections(self) -> int:
        """How many clients have proved themselves and are served."""
        return len(self._sessions)

    def log_end(self, session: Session, error: Exception | None) -> None:
        """Log why a connection ends, at a level that tells whose fault it is."""
        pid = session.peer.pid
        if error is None:
            logger.debug("the client with pid %s is gone", pid)
        elif isinstance(error, AuthenticationFailed):
            self._log.warning("refused the client with pid %s: %s", pid, error)
        elif isinstance(error, MessageTooLarge):
            self._log.warning("dropped the client with pid %s: %s", pid, error)
        elif isinstance(error, (HarnessIPCError, EOFError, OSError)):
            logger.debug("the client with pid %s is gone: %s", pid, error)
        else:
            self._log.exception("a connection failed", error)

    def log_full(self, session: Session) -> None:
        """Log that a client is turned away, and by which limit."""
        self._log.warning("turned the client with pid %s away: %s", session.peer.pid, session.full)

    def all(self) -> list[Session]:
        """Return all connections."""
        with self._lock:
            return [*self._pending, *self._sessions]

    def hosted_by(self, host: Host) -> list[Session]:
        """Return the connections of `host`, in its own thread."""
        return [session for session in self.all() if session.host is host]
