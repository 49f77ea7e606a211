"""Ends the daemon when its browser, if it is not a managed one, has ended. The next command then starts another daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from .addresses import is_local
from .connection import ConnectionFailed
from .part import Part

if TYPE_CHECKING:
    from .connection import Connection
    from .daemon import BrowserApp
    from .errors import BrowserError

logger = logging.getLogger(__name__)

# Seconds to connect to the browser's port.
_DIAL_TIMEOUT = 2.0
# Seconds before each check: a browser that ends closes its connections before its port.
_CHECK_DELAYS = (0.0, 0.1, 0.4, 1.5, 5.0)


class GoneBrowser(Part):
    """Checks the browser when its connection is lost. A managed browser is restarted by the next request instead."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._check: asyncio.Task[None] | None = None
        self._ending = False

    def on_connected(self, connection: Connection) -> None:
        """Check the browser when this connection is lost."""
        connection.when_lost(self._watch)

    def on_drain(self) -> None:
        """Stop checking, since the daemon stops."""
        self._ending = True

    def on_unreachable(self, error: BrowserError) -> None:
        """End the daemon if another program has the browser's port, or nothing listens there."""
        endpoint = self.app.connection.endpoint
        if isinstance(error, ConnectionFailed) and not error.must_allow and endpoint is not None and is_local(endpoint):
            self._end()
        self._watch()

    def _watch(self) -> None:
        if not self._ending and self.app.own_browser is None and (self._check is None or self._check.done()):
            self._check = self.start(self._end_if_gone())

    async def _end_if_gone(self) -> None:
        # The browser may still run. Do not reconnect without a request: its user may have to allow that.
        for seconds in _CHECK_DELAYS:
            await asyncio.sleep(seconds)
            if not self._ending and self.app.address is not None and await _refuses(*self.app.address):
                self._end()
                return

    def _end(self) -> None:
        if not self._ending and self.app.own_browser is None:
            self._ending = True
            logger.warning("the browser is gone: this daemon ends, and the next command starts another")
            # Requests in flight are answered with `BrowserLost`.
            signal.raise_signal(signal.SIGTERM)


async def _refuses(host: str, port: int) -> bool:
    """Return whether the port refuses connections."""
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False
