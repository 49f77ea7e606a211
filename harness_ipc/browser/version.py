"""Gets the address of a DevTools server's WebSocket over HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from .addresses import UnusableProxy, find_proxy, quote_reason, without_secret
from .connection import ConnectionFailed, ProxyFailed

if TYPE_CHECKING:
    from urllib.parse import SplitResult

# Seconds for a DevTools server to answer. A local one takes milliseconds.
TIMEOUT = 5.0
# The limit of the response in bytes. Chrome's has about 400.
_MAX_ANSWER = 1024 * 1024


async def ask_websocket_url(base: str, sock: socket.socket | None = None, *, timeout: float | None = None) -> str:
    """Return the `webSocketDebuggerUrl` of the DevTools server at the URL `base`, in `timeout` seconds (`TIMEOUT`).

    The connected `sock` is used and closed; without one, a connection is opened, through the environment's proxy if any.
    Redirects are not followed, and the user name and password in `base` are sent only to its host. Raises `ConnectionFailed`.
    """
    timeout = TIMEOUT if timeout is None else timeout
    place = without_secret(base)
    proxy, through = None, ""
    try:
        if sock is None and (proxy := find_proxy(base)) is not None:
            through = f" through the proxy {without_secret(proxy)}"
        async with asyncio.timeout(timeout):
            status, answer = await asyncio.to_thread(_get, base, sock, proxy, timeout)
        if status != 200:
            text = f"{place} answered {status} to /json/version{through}{quote_reason(answer, base)}"
            raise ConnectionFailed(text, status=status if proxy is None else None)
        if len(answer) > _MAX_ANSWER:
            raise ConnectionFailed(f"{place} is not a DevTools server (it answered more than {_MAX_ANSWER} bytes)")
        return str(json.loads(answer)["webSocketDebuggerUrl"])
    except ConnectionFailed:
        raise
    except UnusableProxy as error:
        raise ProxyFailed(f"{place} can't be reached: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            text = f"{place} has not answered for {timeout:g} s{through}"
            raise ConnectionFailed(text, waiting=proxy is None) from None
        if reason is not error:
            reason = getattr(reason, "strerror", None) or reason
            raise ConnectionFailed(f"{place} can't be reached{through} ({reason})") from None
        # Without the error's text, which may contain the address.
        raise ConnectionFailed(f"{place} is not a DevTools server ({type(error).__name__})") from None
    finally:
        if sock is not None:
            # The thread may still be reading: interrupt it, so that it closes the socket.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _get(base: str, sock: socket.socket | None, proxy: str | None, timeout: float) -> tuple[int, bytes]:
    """Request /json/version. Return the status, and the body up to the limit."""
    with contextlib.ExitStack() as stack:
        if sock is not None:
            stack.callback(sock.close)
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConnectionFailed(f"{without_secret(base)} is not a DevTools address: it must begin with http:// or https://")
        host = parts.netloc.rpartition("@")[2]
        target = urlunsplit(("", "", f"{parts.path.rstrip('/')}/json/version", parts.query, ""))
        headers = {}
        if parts.username is not None:
            words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
        if sock is None:
            request = urllib.request.Request(f"{parts.scheme}://{host}{target}", headers=headers)  # noqa: S310 - checked above
            reply = stack.enter_context(_opener(proxy).open(request, timeout=timeout))
        else:
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection(host)))
            connection.sock = _with_tls(sock, parts, timeout)
            connection.request("GET", target, headers=headers)
            reply = stack.enter_context(connection.getresponse())
        return reply.status, reply.read(_MAX_ANSWER + 1)


def _opener(proxy: str | None) -> urllib.request.OpenerDirector:
    """Return an opener that follows no redirect: the default one would send the password to the new address."""
    opener = urllib.request.OpenerDirector()
    proxies = {} if proxy is None else {"http": proxy, "https": proxy}
    for handler in (urllib.request.ProxyHandler(proxies), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _with_tls(sock: socket.socket, parts: SplitResult, timeout: float) -> socket.socket:
    sock.settimeout(timeout)
    if parts.scheme == "https":
        return ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
    return sock
