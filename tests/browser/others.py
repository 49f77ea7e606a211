"""Browsers that a test starts itself, and servers that answer like none or only like a part of one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.client import connect
from websockets.sync.connection import Connection
from websockets.sync.server import ServerConnection, serve

from harness_ipc.browser.program import find_binary, has_display, is_root
from tests.support.processes import PATIENCE, wait_until

# No dialog of the browser and no traffic of its own.
FLAGS = ["--no-first-run", "--no-default-browser-check", "--disable-background-networking", "--password-store=basic"]


class OtherBrowser:
    """A browser that is not managed, with DevTools at `port`; 0 means any."""

    def __init__(self, process: psutil.Popen, profile: Path, port: int) -> None:
        self.process = process
        self.active_port = profile / "DevToolsActivePort"
        self.port = port
        wait_until(lambda: self._is_open() or process.poll() is not None)
        self.url = f"http://127.0.0.1:{self.port}"
        self.websocket = str(self._get("version")["webSocketDebuggerUrl"])
        self.path = self.websocket.partition(str(self.port))[2]

    def _is_open(self) -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            # Chrome does not write the file if the port was given.
            self.port = self.port or int(self.active_port.read_text().split()[0])
            return bool(self._get("version"))
        return False

    def _get(self, what: str) -> Any:
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with without_proxy.open(f"http://127.0.0.1:{self.port}/json/{what}", timeout=PATIENCE) as reply:
            return json.load(reply)

    def tabs(self) -> dict[str, str]:
        """Return the url of each tab by its targetId."""
        return {tab["id"]: tab["url"] for tab in self._get("list") if tab["type"] == "page"}

    def close_tabs(self) -> None:
        """Close all tabs but a new, empty one."""
        if set(self.tabs().values()) == {"about:blank"} and len(self.tabs()) == 1:
            return
        blank = self.call("Target.createTarget", url="about:blank")["targetId"]
        for tab in self.tabs().keys() - {blank}:
            self.call("Target.closeTarget", targetId=tab)
        wait_until(lambda: self.tabs() == {blank: "about:blank"})

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call `method` of the browser over a new connection."""
        with connect(self.websocket, max_size=None, proxy=None) as websocket:
            websocket.send(json.dumps({"id": 1, "method": method, "params": params}))
            while (message := json.loads(websocket.recv(PATIENCE))).get("id") != 1:
                pass
            return dict(message["result"])


@contextlib.contextmanager
def other_browser(base: Path, *, port: int = 0, profile: str = "theirs", **options: Any) -> Iterator[OtherBrowser]:
    """Start a browser with open DevTools, as a user does. It is killed at the end if it still runs.

    `options` are passed to `subprocess.Popen`.
    """
    binary = find_binary()
    assert binary is not None
    folder = base / profile
    (folder / "DevToolsActivePort").unlink(missing_ok=True)
    arguments = [binary, f"--remote-debugging-port={port}", f"--user-data-dir={folder}", *FLAGS, "about:blank"]
    arguments[1:1] = [] if has_display() else ["--headless=new"]
    arguments[1:1] = ["--no-sandbox"] if is_root() else []
    null = subprocess.DEVNULL
    process = psutil.Popen(arguments, stdin=null, stdout=null, stderr=null, **options)
    try:
        yield OtherBrowser(process, folder, port)
    finally:
        kill_browser(process)


def kill_browser(process: psutil.Process) -> None:
    """Kill the main process of a browser, and wait until it and its children have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, PATIENCE)


# Servers.


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"


class _Server6(_Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def _serving(handler: type[socketserver.BaseRequestHandler], port: int = 0, host: str = "127.0.0.1") -> Iterator[int]:
    with (_Server6 if ":" in host else _Server)((host, port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def answering(
    answer: bytes | None, *, version: bytes | None = None, requests: list[bytes] | None = None, port: int = 0
) -> Iterator[int]:
    """Yield a port of a server that answers each request with `answer`, or never if it is None.

    `version` is the answer to ``/json/version`` instead. `requests` collects the requests. `port` is the port; 0 means any.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                asked = b""
                while not asked.endswith(b"\r\n\r\n") and (piece := self.request.recv(65536)):
                    asked += piece
                if requests is not None:
                    requests.append(asked)
                reply = version if version is not None and b"/json/version " in asked else answer
                if reply is not None:
                    self.request.sendall(reply)
                while reply is None and self.request.recv(65536):
                    pass

    with _serving(Handler, port) as served:
        yield served


def http(status: str, body: str = "") -> bytes:
    """Return a complete HTTP response."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def has_ipv6() -> bool:
    """Return whether this machine has ``::1``."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """Yield a bound port that does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Relay:
    """A port that relays to another one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sockets: list[socket.socket] = []

    def cut(self) -> None:
        """Close all connections. New ones are relayed."""
        while self.sockets:
            with contextlib.suppress(OSError):
                self.sockets.pop().shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relaying(target: int, host: str = "127.0.0.1") -> Iterator[Relay]:
    """Yield a port of `host` that relays to the port `target` of 127.0.0.1."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", target)) as other:
                relay.sockets += [self.request, other]
                back = threading.Thread(target=self.pump, args=(other, self.request))
                back.start()
                self.pump(self.request, other)
                back.join()

        @staticmethod
        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    with _serving(Handler, host=host) as port:
        relay = Relay(port)
        try:
            yield relay
        finally:
            relay.cut()


@contextlib.contextmanager
def without_http(browser: OtherBrowser) -> Iterator[int]:
    """Yield a port like that of a Chrome with its default profile: 404 for HTTP, a WebSocket at /devtools/browser."""

    def answer(connection: ServerConnection, request: Request) -> Response | None:
        return None if request.path == "/devtools/browser" else connection.respond(404, "")

    def pump(source: Connection, sink: Connection) -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in source:
                sink.send(message)
        sink.close()

    def relay(websocket: ServerConnection) -> None:
        with connect(browser.websocket, max_size=None, proxy=None) as other:
            back = threading.Thread(target=pump, args=(other, websocket))
            back.start()
            pump(websocket, other)
            back.join()

    with serve(relay, "127.0.0.1", 0, process_request=answer, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()
