"""One connection to a browser's DevTools: calls and events over a transport. It knows neither tabs nor where a browser is.

A `Transport` carries messages: `WebSocketTransport` here, and `PipeTransport` in `pipe` for a managed browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from typing import TYPE_CHECKING, Any, Protocol

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidHandshake, InvalidStatus, InvalidURI, ProxyError

from . import CALL_TIMEOUT, MAX_MESSAGE
from .addresses import UnusableProxy, find_proxy, is_local, quote_reason, without_secret
from .errors import BrowserLost, BrowserNotFound, BrowserTimeout, CDPError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Container

    from websockets.asyncio.client import ClientConnection

    from .errors import BrowserError

    # Method, parameters, session, and the message that they were parsed from.
    OnEvent = Callable[[str, dict[str, Any], str | None, str | bytes], None]

# Bytes of one message, with the NUL of a pipe or the 14 bytes of a WebSocket's header. After a longer one the browser reads
# nothing more (tried on Chromium 156; it is kReceiveBufferSizeForDevTools in its devtools_pipe_handler.cc).
MAX_SENT = 100 * 1024 * 1024
_WEBSOCKET_HEADER = 14
# Seconds for the connection. A browser whose user has to click Allow keeps it waiting.
OPEN_TIMEOUT = 30.0
# Seconds between keepalive pings to a browser elsewhere. This machine says at once when one is gone, and one that is suspended
# must not be taken for that.
_KEEPALIVE = 30.0
# JSON-RPC code of "Session with given id not found." (content/browser/devtools): the call reached no page.
SESSION_NOT_FOUND = -32001
# Chrome's word for a Host header that is a name, against DNS rebinding (devtools_http_handler.cc).
_NAME_REFUSED = "Host header is specified"
# At lower levels it would have addresses with their secrets, and what is typed and read, in the log.
_websocket_logger = logging.getLogger(f"{__name__}.websocket")
_websocket_logger.setLevel(logging.WARNING)


class ConnectionFailed(BrowserNotFound):
    """A browser's endpoint could not be used. `status` is the HTTP status it answered with, or None."""

    def __init__(self, message: str, *, status: int | None = None, waiting: bool = False) -> None:
        super().__init__(message)
        self.status = status
        # It took the connection and has not answered.
        self.waiting = waiting

    @property
    def must_allow(self) -> bool:
        """Whether the browser's user may have to click Allow: it does not answer, or with 403."""
        return self.waiting or self.status == 403

    @property
    def refuses_name(self) -> bool:
        """Whether it is a Chrome that answers only to its address, not to a host name."""
        return self.status == 500 and _NAME_REFUSED in str(self)


class ProxyFailed(ConnectionFailed):
    """A browser elsewhere can't be reached by its proxy. The text says what to do."""


class TransportClosed(Exception):
    """No more messages can be sent or received. The text says why."""


class Transport(Protocol):
    """Carries whole messages in both directions, in order."""

    async def send(self, text: str) -> None:
        """Send one message, waiting while the browser reads slowly. Raises `TransportClosed`, or `CDPError` for a large one."""

    async def receive(self) -> str | bytes:
        """Return the next message. Raises `TransportClosed`, and `ValueError` for what is no message."""

    async def close(self) -> None:
        """Close it; `receive` then raises `TransportClosed`. Idempotent."""


class WebSocketTransport:
    """Messages by a WebSocket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket

    @classmethod
    async def open(cls, url: str, sock: socket.socket | None = None) -> WebSocketTransport:
        """Connect to the ``ws://`` or ``wss://`` address `url`, over the connected `sock` if there is one, closed by us.

        No redirect is followed. Raises `ConnectionFailed`.
        """
        place = without_secret(url)
        local = sock is not None or is_local(url)
        connected: dict[str, Any] = {} if sock is None else {"sock": sock}
        proxy = None
        try:
            proxy = None if local else find_proxy(url)
            websocket = await _ConnectWithoutRedirect(
                url,
                open_timeout=OPEN_TIMEOUT,
                max_size=MAX_MESSAGE,
                # Deflate costs more than the loopback does.
                compression=None if local else "deflate",
                ping_interval=None if local else _KEEPALIVE,
                proxy=proxy,
                logger=_websocket_logger,
                **connected,
            )
        except InvalidStatus as error:
            status, reason = error.response.status_code, quote_reason(error.response.body or b"", url)
            text = f"{place} answered {status} instead of opening a WebSocket{reason}"
            raise ConnectionFailed(text, status=status) from None
        except TimeoutError:
            text = f"{place} has not answered for {OPEN_TIMEOUT:g} s{_through(proxy)}"
            raise ConnectionFailed(text, waiting=proxy is None) from None
        except UnusableProxy as error:
            raise ProxyFailed(f"{place} can't be reached: {error}") from None
        except (OSError, EOFError, ProxyError) as error:
            raise ConnectionFailed(f"{place} can't be reached{_through(proxy)} ({reason_of(error)})") from None
        except InvalidHandshake as error:
            raise ConnectionFailed(f"{place} is no DevTools server ({reason_of(error)})") from None
        except (InvalidURI, ValueError):
            if sock is not None:
                sock.close()
            # Not its text: that has the address in it.
            raise ConnectionFailed(f"{place} is no address of DevTools: it begins with ws:// or wss://") from None
        return cls(websocket)

    async def send(self, text: str) -> None:
        """Send one message."""
        check_size(len(text.encode()) + _WEBSOCKET_HEADER)
        try:
            await self._websocket.send(text)
        except ConnectionClosed as error:
            raise TransportClosed(_closed(error)) from None

    async def receive(self) -> str | bytes:
        """Return the next message."""
        try:
            return await self._websocket.recv()
        except ConnectionClosed as error:
            raise TransportClosed(_closed(error)) from None

    async def close(self) -> None:
        """Close the WebSocket, and return when it is closed."""
        await self._websocket.close()


class Connection:
    """Calls and events. Calls run at once; each event goes to `on_event` in the order of its arrival."""

    def __init__(self, transport: Transport, on_event: OnEvent | None, *, adopted: bool = False) -> None:
        """Read from `transport`: `adopted` from an earlier connection, it may begin and end within a message.

        Without `on_event`, events are dropped until `enter_root_session`.
        """
        # The address of its WebSocket, if it has one.
        self.endpoint: str | None = None
        self._transport = transport
        self._on_event = on_event
        self._adopted = adopted
        self._at_start = True
        self._root: str | None = None
        self._calls: dict[int, _Call] = {}
        # An adopted browser may still answer calls of the daemon that was killed: their ids are not ours. Chrome takes int32.
        self._last_id = secrets.randbelow(2**30)
        self._lost: BrowserLost | None = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, url: str, on_event: OnEvent, sock: socket.socket | None = None) -> Connection:
        """Connect by a WebSocket, as `WebSocketTransport.open` does."""
        connection = cls(await WebSocketTransport.open(url, sock), on_event)
        connection.endpoint = url
        return connection

    @property
    def lost(self) -> BrowserLost | None:
        """Why the connection is at its end, or None while it is there."""
        return self._lost

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop once the connection is at its end."""
        self._reader.add_done_callback(lambda _: callback())

    async def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        session: str | None = None,
        timeout: float = CALL_TIMEOUT,
        outlasting: bool = False,
    ) -> dict[str, Any]:
        """Have the browser run `method` and return its result; `timeout` in seconds.

        An `outlasting` one runs outside the root session: what it sets stays when that ends.

        Raises `CDPError` for the browser's own, `BrowserTimeout`, `BrowserLost`, and what `fail_calls` was given.
        """
        if self._lost is not None:
            raise BrowserLost(str(self._lost))
        self._last_id += 1
        number = self._last_id
        message = {"id": number, "method": method, "params": params or {}}
        if (addressed := session or self._root) is not None and not outlasting:
            message["sessionId"] = addressed
        call = self._calls[number] = _Call(method, session)
        try:
            async with asyncio.timeout(timeout):
                with contextlib.suppress(TransportClosed):  # the reader notices too, and fails what was in flight
                    await self._transport.send(json.dumps(message))
                return await call.reply
        except TimeoutError:
            raise BrowserTimeout(
                f"the browser has not answered {method} within {timeout:g} s: it may still run; allow a longer timeout"
            ) from None
        finally:
            del self._calls[number]

    def fail_calls(self, session: str, error: BrowserError, *, but: Container[str]) -> None:
        """End the calls of `session` that are in flight with `error`, except those of the methods `but`."""
        for call in self._calls.values():
            if call.session == session and call.method not in but and not call.reply.done():
                call.reply.set_exception(error)

    async def enter_root_session(self, stale: str | None, on_event: OnEvent) -> str:
        """Run all further calls in a new session with the browser, and return its id; end `stale`, which an earlier daemon had.

        A pipe lasts as long as the browser, whichever daemon uses it. Whatever a daemon attached to, enabled or intercepted
        ends with its root session, as it ends with a WebSocket. Events before that are of others, and dropped.
        """
        if self._adopted:
            # An end for the message that the daemon may have been writing when it was killed.
            with contextlib.suppress(TransportClosed):
                await self._transport.send("")
        if stale is not None:
            with contextlib.suppress(CDPError):
                await self.call("Target.detachFromTarget", {"sessionId": stale})
        self._root = str((await self.call("Target.attachToBrowserTarget"))["sessionId"])
        self._on_event = on_event
        return self._root

    async def close(self) -> None:
        """Close the connection, and return when it is closed."""
        await self._transport.close()
        await asyncio.wait({self._reader})

    async def _read(self) -> None:
        reason = "the connection was given up"
        try:
            while True:
                if (received := await self._next_message()) is not None:
                    self._receive(*received)
        except TransportClosed as error:
            reason = str(error)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it sent what is no message: {reason_of(error)}"
            await self._transport.close()
        finally:
            self._lost = BrowserLost(f"the connection to the browser was lost ({reason}): what was in flight may have run")
            for call in self._calls.values():
                if not call.reply.done():
                    call.reply.set_exception(BrowserLost(str(self._lost)))

    async def _next_message(self) -> tuple[dict[str, Any], str | bytes] | None:
        """Return the next message, and its JSON as it came."""
        at_start, self._at_start = self._at_start, False
        try:
            frame = await self._transport.receive()
            message = json.loads(frame)
        except (ValueError, RecursionError):
            # The rest of a message that the earlier connection has not read to its end. A part of a JSON object is none.
            if self._adopted and at_start:
                return None
            raise
        if not isinstance(message, dict):
            raise TypeError(f"a JSON {type(message).__name__}")
        return message, frame

    def _receive(self, message: dict[str, Any], frame: str | bytes) -> None:
        session = message.get("sessionId")
        if session == self._root:
            session = None
        if "id" not in message:
            # Without a method: the answer to something that was no message, such as half of one.
            if "method" in message:
                self._receive_event(message["method"], message.get("params") or {}, session, frame)
            return
        call = self._calls.get(message["id"])
        if call is None or call.reply.done() or session not in (None, call.session):
            return
        error = message.get("error")
        if error is None:
            call.reply.set_result(message.get("result") or {})
            return
        text = f"{call.method}: {error.get('message')}"
        if data := error.get("data"):
            text += f" ({data})"
        call.reply.set_exception(CDPError(text, code=error.get("code")))

    def _receive_event(self, method: Any, params: Any, session: Any, frame: str | bytes) -> None:
        if not isinstance(method, str) or not isinstance(params, dict) or not isinstance(session, str | None):
            raise TypeError("an event of another shape")
        if self._on_event is not None:
            self._on_event(method, params, session, frame)


class _ConnectWithoutRedirect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        """Return the error instead of the address that it redirects to: that is not the server that was chosen."""
        return exc


class _Call:
    __slots__ = ("method", "reply", "session")

    def __init__(self, method: str, session: str | None) -> None:
        self.method = method
        self.session = session
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()


def check_size(size: int) -> None:
    """Raise `CDPError` for a message of so many bytes that the browser does not take."""
    if size > MAX_SENT:
        # JSON-RPC's "Invalid Request": nothing was sent.
        raise CDPError(f"a message of {size} bytes is too large: the browser takes {MAX_SENT}", code=-32600)


def _through(proxy: str | None) -> str:
    return "" if proxy is None else f" through the proxy {without_secret(proxy)}"


def _closed(error: ConnectionClosed) -> str:
    return "it closed the connection" if isinstance(error, ConnectionClosedOK) else reason_of(error)


def reason_of(error: BaseException) -> str:
    """Return the reason of an error in one line: the system's, its text, or its class."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
