"""Connections until their first request that is the app's: an event loop in a thread has them, whatever the server's loop does.

On POSIX it stands by: it accepts while the server's loop does not. On Windows every connection begins here.
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

# Seconds that a ping waits for the server's loop. One that takes longer blocks everybody: it is unresponsive.
_PATIENCE = 0.25


class Greeter(threading.Thread):
    """The host of sessions that have asked the app nothing yet. It does the handshake, and answers `ping` and `shutdown`.

    Its methods belong to its own loop's thread; `for_each` and `stop` may be called from any.
    """

    def __init__(self, server: DaemonServer) -> None:
        super().__init__(name="harness-ipc-greeter", daemon=True)
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop()
        self.deadlines = Deadlines(self.loop, lambda: server.admission.hosted_by(self))
        self._server = server
        # Pings that wait for the server's loop, until when; when it was asked what it has not answered yet.
        self._pings: dict[Session, asyncio.TimerHandle] = {}
        self._asked_at: float | None = None
        # When the server's loop was last seen to be responsive, if `DaemonServer.beat` is called.
        self.beat_at: float | None = None

    def run(self) -> None:
        """Serve until `stop`."""
        with contextlib.closing(self.loop):
            self.loop.run_forever()

    def stop(self) -> None:
        """Have the thread end."""
        if not self.is_alive():
            self.loop.close()
            return
        with contextlib.suppress(RuntimeError):  # it has ended meanwhile
            self.loop.call_soon_threadsafe(self.loop.stop)

    def for_each(self, do: Callable[[Session], None]) -> None:
        """Call `do` in the thread, with each connection that it has then."""

        def do_all() -> None:
            for session in self._server.admission.hosted_by(self):
                do(session)

        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(do_all)

    def start_request(self, session: Session, message: Message) -> None:
        """Hand `session` over to the server's loop, with its first request that is the app's, or `health`."""
        session.move(self._server, message)

    def start_ping(self, session: Session) -> None:
        """Answer a ping when the server's loop has answered, or has not for 0.25 s."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._server.loop.call_soon_threadsafe(self.loop.call_soon_threadsafe, self._on_answer, self._asked_at)
        self._pings[session] = self.loop.call_later(_PATIENCE, self._give_up, session)

    def _on_answer(self, asked_at: float) -> None:
        self._asked_at = None
        pings, self._pings = self._pings, {}
        for session, timer in pings.items():
            timer.cancel()
            send_pong(self._server, session, asked_at)

    def _give_up(self, session: Session) -> None:
        del self._pings[session]
        assert self._asked_at is not None
        send_pong(self._server, session, self.beat_at or self._asked_at, responsive=False)
