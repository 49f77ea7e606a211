"""The display that a browser's window would be on: whether what `DISPLAY` and `WAYLAND_DISPLAY` name can be reached."""

from __future__ import annotations

import os
import re
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

X11 = "DISPLAY"
WAYLAND = "WAYLAND_DISPLAY"

# Seconds for a display elsewhere (ssh -X has it on a port of this machine) to take a connection.
_TIMEOUT = 2.0
# TCP port of display 0 (X(7)).
_X11_PORT = 6000
# HOST:NUMBER.SCREEN, where a protocol may stand before the host.
_X11_NAME = re.compile(r"(?:(?:inet6?|tcp|unix|local)/)?(.*):(\d{1,5})(?:\.\d+)?\Z")


def find_broken(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those of both variables that name a display that can't be reached, and why: one of a session that has ended."""
    if sys.platform in ("win32", "darwin"):
        return {}
    found = {}
    for variable, connect in ((X11, _connect_x11), (WAYLAND, _connect_wayland)):
        if environment.get(variable):
            try:
                connect(environment)
            except (OSError, ValueError, OverflowError) as error:
                found[variable] = getattr(error, "strerror", None) or str(error)
    return found


def _connect_x11(environment: Mapping[str, str]) -> None:
    match = _X11_NAME.match(environment[X11])
    if match is None:
        raise ValueError("it is no name of a display")
    host, number = match[1], int(match[2])
    if host.startswith("/"):
        _connect_unix(host)
    elif host in ("", "unix") or host.endswith("/unix"):
        path = f"/tmp/.X11-unix/X{number}"  # noqa: S108 - its place
        try:
            # Linux' abstract one, which outlives a cleaned /tmp.
            _connect_unix(f"\0{path}")
        except OSError:
            _connect_unix(path)
    else:
        socket.create_connection((host.strip("[]"), _X11_PORT + number), _TIMEOUT).close()


def _connect_wayland(environment: Mapping[str, str]) -> None:
    name = environment[WAYLAND]
    if not os.path.isabs(name):
        if not (directory := environment.get("XDG_RUNTIME_DIR")):
            raise ValueError("XDG_RUNTIME_DIR is not set")
        name = os.path.join(directory, name)
    _connect_unix(name)


def _connect_unix(path: str) -> None:
    if sys.platform != "win32":
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_TIMEOUT)
            probe.connect(path)
