"""An event loop in a thread, for connections before their first request to the app, even if the server's loop is blocked.

On POSIX it accepts only while the server's loop is blocked. On Windows every connection starts here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING

from .admission import Deadlines
from .builtins import send_pong

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._protocol.messages import Message
    from .server import DaemonServer
    from .session import Session

# Seconds that a ping waits for the server's loop. A loop that takes longer is unresponsive.
_LOOP_TIMEOUT = 0.25


class Greeter(threading.Thread):
    """The host of sessions before their first request to the app: the handshake, `ping` and `shutdown`.

    Call its methods in its own thread, except `for_each` and `stop`, which are thread-safe.
    """

    def __init__(self, server: DaemonServer) -> None:
        super().__init__(name="harness-ipc-greeter", daemon=True)
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop()
        self.deadlines = Deadlines(self.loop, lambda: server.admission.hosted_by(self))
        self._server = server
        # Pings that wait for the server's loop, and their timers.
        self._pings: dict[Session, asyncio.TimerHandle] = {}
        # When the callback that the server's loop has not run yet was scheduled.
        self._asked_at: float | None = None
        # When the server's loop was last responsive, if `DaemonServer.beat` is called.
        self.beat_at: float | None = None

    def run(self) -> None:
        """Serve until `stop`."""
        with contextlib.closing(self.loop):
            self.loop.run_forever()

    def stop(self) -> None:
        """Tell the thread to end."""
        if not self.is_alive():
            self.loop.close()
            return
        with contextlib.suppress(RuntimeError):  # it has ended meanwhile
            self.loop.call_soon_threadsafe(self.loop.stop)

    def for_each(self, do: Callable[[Session], None]) -> None:
        """Call `do` in the thread with each of its connections."""

        def do_all() -> None:
            for session in self._server.admission.hosted_by(self):
                do(session)

        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(do_all)

    def start_request(self, session: Session, message: Message) -> None:
        """Hand `session` over to the server's loop, with its first request to the app, or `health`."""
        session.move(self._server, message)

    def start_ping(self, session: Session) -> None:
        """Answer a ping when the server's loop has run a callback, or after 0.25 s."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._server.loop.call_soon_threadsafe(self.loop.call_soon_threadsafe, self._on_answer, self._asked_at)
        self._pings[session] = self.loop.call_later(_LOOP_TIMEOUT, self._on_timeout, session)

    def _on_answer(self, asked_at: float) -> None:
        self._asked_at = None
        pings, self._pings = self._pings, {}
        for session, timer in pings.items():
            timer.cancel()
            send_pong(self._server, session, asked_at)

    def _on_timeout(self, session: Session) -> None:
        del self._pings[session]
        assert self._asked_at is not None
        send_pong(self._server, session, self.beat_at or self._asked_at, responsive=False)
