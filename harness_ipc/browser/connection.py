"""A CDP connection to a browser: calls and events.

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

    # Method, parameters, session, and the original JSON.
    OnEvent = Callable[[str, dict[str, Any], str | None, str | bytes], None]

# Bytes of one message, including the NUL of a pipe or the 14 bytes of a WebSocket's header. After a longer one the browser
# stops reading (tested with Chromium 156; kReceiveBufferSizeForDevTools in devtools_pipe_handler.cc).
MAX_SENT = 100 * 1024 * 1024
_WEBSOCKET_HEADER = 14
# Seconds to connect, including a click on Allow by the browser's user.
OPEN_TIMEOUT = 30.0
# Seconds between keepalive pings to a remote browser. A local one that ends is noticed at once, and one that is suspended must
# not time out.
_KEEPALIVE = 30.0
# JSON-RPC code of "Session with given id not found." (content/browser/devtools): the call did not run.
SESSION_NOT_FOUND = -32001
# Chrome's error for a host name in the Host header, against DNS rebinding (devtools_http_handler.cc).
_NAME_REFUSED = "Host header is specified"
# At lower levels it would log addresses with secrets, and all data.
_websocket_logger = logging.getLogger(f"{__name__}.websocket")
_websocket_logger.setLevel(logging.WARNING)


class ConnectionFailed(BrowserNotFound):
    """Connecting to a browser failed. `status` is the HTTP status of its response, or None."""

    def __init__(self, message: str, *, status: int | None = None, waiting: bool = False) -> None:
        super().__init__(message)
        self.status = status
        # Whether it has accepted the connection but not answered.
        self.waiting = waiting

    @property
    def must_allow(self) -> bool:
        """Whether the browser's user may have to click Allow: there is no answer, or status 403."""
        return self.waiting or self.status == 403

    @property
    def refuses_name(self) -> bool:
        """Whether it is a Chrome that accepts only an IP address, not a host name."""
        return self.status == 500 and _NAME_REFUSED in str(self)


class ProxyFailed(ConnectionFailed):
    """A remote browser can't be reached through its proxy. The text says what to do."""


class TransportClosed(Exception):
    """No more messages can be sent or received. The text says why."""


class Transport(Protocol):
    """Carries whole messages in both directions, in order."""

    async def send(self, text: str) -> None:
        """Send one message, waiting while the browser reads slowly. Raises `TransportClosed`, or `CDPError` for a large one."""

    async def receive(self) -> str | bytes:
        """Return the next message. Raises `TransportClosed`, and `ValueError` for an invalid message."""

    async def close(self) -> None:
        """Close the transport; `receive` then raises `TransportClosed`. Idempotent."""


class WebSocketTransport:
    """Messages over a WebSocket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket

    @classmethod
    async def open(cls, url: str, sock: socket.socket | None = None) -> WebSocketTransport:
        """Connect to the ``ws://`` or ``wss://`` address `url`, over the connected `sock` if given, which is closed at the end.

        Redirects are not followed. Raises `ConnectionFailed`.
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
                # On the loopback interface, compressing takes longer than sending.
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
            raise ConnectionFailed(f"{place} is not a DevTools server ({reason_of(error)})") from None
        except (InvalidURI, ValueError):
            if sock is not None:
                sock.close()
            # Without the error's text, which contains the address.
            raise ConnectionFailed(f"{place} is not a DevTools address: it must begin with ws:// or wss://") from None
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
    """Calls, which may run concurrently, and events, passed to `on_event` in order."""

    def __init__(self, transport: Transport, on_event: OnEvent | None, *, adopted: bool = False) -> None:
        """Start reading from `transport`. An `adopted` one was used by an earlier daemon, and may start within a message.

        Without `on_event`, events are dropped until `enter_root_session`.
        """
        # The address of its WebSocket, or None for a pipe.
        self.endpoint: str | None = None
        self._transport = transport
        self._on_event = on_event
        self._adopted = adopted
        self._at_start = True
        self._root: str | None = None
        self._calls: dict[int, _Call] = {}
        # Random: an adopted browser may still answer calls of the killed daemon. Chrome requires int32.
        self._last_id = secrets.randbelow(2**30)
        self._lost: BrowserLost | None = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, url: str, on_event: OnEvent, sock: socket.socket | None = None) -> Connection:
        """Connect by WebSocket: see `WebSocketTransport.open`."""
        connection = cls(await WebSocketTransport.open(url, sock), on_event)
        connection.endpoint = url
        return connection

    @property
    def lost(self) -> BrowserLost | None:
        """Why the connection was lost, or None."""
        return self._lost

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop when the connection is lost."""
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
        """Call `method` and return its result; `timeout` in seconds.

        With `outlasting`, the call runs outside the root session: its effects persist when that ends.

        Raises `CDPError` for an error of the browser, `BrowserTimeout`, `BrowserLost`, and the error passed to `fail_calls`.
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
                with contextlib.suppress(TransportClosed):  # the reader notices too, and fails all calls in flight
                    await self._transport.send(json.dumps(message))
                return await call.reply
        except TimeoutError:
            raise BrowserTimeout(
                f"the browser has not answered {method} within {timeout:g} s: it may still run; allow a longer timeout"
            ) from None
        finally:
            del self._calls[number]

    def fail_calls(self, session: str, error: BrowserError, *, but: Container[str]) -> None:
        """Fail the calls of `session` in flight with `error`, except those of the methods `but`."""
        for call in self._calls.values():
            if call.session == session and call.method not in but and not call.reply.done():
                call.reply.set_exception(error)

    async def enter_root_session(self, stale: str | None, on_event: OnEvent) -> str:
        """Create a root session for all further calls, and return its id. End the root session `stale` of an earlier daemon.

        A pipe outlives the daemons that use it. Attachments, enabled domains and interceptions of a daemon end with its root
        session, as they end with a WebSocket. Events of other root sessions are dropped.
        """
        if self._adopted:
            # Terminate the message that the earlier daemon may have been writing when it was killed.
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
        reason = "it was closed by the daemon"
        try:
            while True:
                if (received := await self._next_message()) is not None:
                    self._receive(*received)
        except TransportClosed as error:
            reason = str(error)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it sent an invalid message: {reason_of(error)}"
            await self._transport.close()
        finally:
            self._lost = BrowserLost(f"the connection to the browser was lost ({reason}): what was in flight may have run")
            for call in self._calls.values():
                if not call.reply.done():
                    call.reply.set_exception(BrowserLost(str(self._lost)))

    async def _next_message(self) -> tuple[dict[str, Any], str | bytes] | None:
        """Return the next message and its original JSON."""
        at_start, self._at_start = self._at_start, False
        try:
            frame = await self._transport.receive()
            message = json.loads(frame)
        except (ValueError, RecursionError):
            # Skip the rest of a message that the earlier daemon read partially: it is not a JSON object.
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
            # Without a method, it is the reply to an invalid message, such as a partial one.
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
            raise TypeError("an invalid event")
        if self._on_event is not None:
            self._on_event(method, params, session, frame)


class _ConnectWithoutRedirect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        """Return the error instead of following the redirect to another server."""
        return exc


class _Call:
    __slots__ = ("method", "reply", "session")

    def __init__(self, method: str, session: str | None) -> None:
        self.method = method
        self.session = session
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()


def check_size(size: int) -> None:
    """Raise `CDPError` for a message of `size` bytes that is too large for the browser."""
    if size > MAX_SENT:
        # JSON-RPC's "Invalid Request": nothing was sent.
        raise CDPError(f"a message of {size} bytes is too large: the browser accepts {MAX_SENT}", code=-32600)


def _through(proxy: str | None) -> str:
    return "" if proxy is None else f" through the proxy {without_secret(proxy)}"


def _closed(error: ConnectionClosed) -> str:
    return "it closed the connection" if isinstance(error, ConnectionClosedOK) else reason_of(error)


def reason_of(error: BaseException) -> str:
    """Return the reason of an error in one line: its strerror, text or class name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
