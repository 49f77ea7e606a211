"""A user of this machine who listens at a port. It requires root: ``UID HOST PORT TARGET ACCEPTS IPV6_ONLY BACKLOG``.

It relays to the port `TARGET` if that is not 0. It imports little, since many tests start it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from typing import Any


def become(uid: int) -> None:
    if sys.platform == "win32":
        raise AssertionError("for POSIX")
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def squat(uid: str, host: str, port: str, target: str, accepts: str, ipv6_only: str, backlog: str) -> None:
    become(int(uid))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(ipv6_only))
        listener.bind((host, int(port)))
        listener.listen(int(backlog))
        print(listener.getsockname()[1], flush=True)
        if accepts == "0":
            sys.stdin.read()
        print(json.dumps([data.decode("latin-1") for data in receive(listener, int(target))]), flush=True)


def receive(listener: socket.socket, target: int) -> list[bytes]:
    """Accept and relay until standard input and all connections are closed. Return the data of each connection."""
    received: dict[socket.socket, bytes] = {}
    others: dict[socket.socket, socket.socket | None] = {}
    asked = False
    while True:
        watched = [listener, *others, *([] if asked else [sys.stdin])]
        ready = select.select(watched, [], [], 0 if asked and not others else None)[0]
        if not ready:
            return list(received.values())
        for source in ready:
            if source is sys.stdin:
                asked = True
            elif source is listener:
                client = listener.accept()[0]
                received[client] = b""
                others[client] = None
                if target:
                    # Not create_connection: it imports a module for names, which this user may have no access to.
                    other = others[client] = socket.socket()
                    other.connect(("127.0.0.1", target))
                    others[other] = client
            elif source in others:
                relay(source, others, received)


def relay(source: Any, others: dict[socket.socket, socket.socket | None], received: dict[socket.socket, bytes]) -> None:
    other = others[source]
    with contextlib.suppress(OSError):
        if data := source.recv(65536):
            if source in received:
                received[source] += data
            if other is not None:
                other.sendall(data)
            return
    for end in filter(None, (source, other)):
        end.close()
        others.pop(end, None)


if __name__ == "__main__":
    squat(*sys.argv[1:])
