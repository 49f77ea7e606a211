"""Checks whether the displays in `DISPLAY` and `WAYLAND_DISPLAY` can be reached."""

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

# Seconds to connect to a remote display (with ssh -X, a local port).
_TIMEOUT = 2.0
# TCP port of display 0 (X(7)).
_X11_PORT = 6000
# [PROTOCOL/]HOST:NUMBER[.SCREEN]
_X11_NAME = re.compile(r"(?:(?:inet6?|tcp|unix|local)/)?(.*):(\d{1,5})(?:\.\d+)?\Z")


def find_broken(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose display can't be reached (perhaps of an ended session), each with the reason."""
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
        raise ValueError("it is not a display name")
    host, number = match[1], int(match[2])
    if host.startswith("/"):
        _connect_unix(host)
    elif host in ("", "unix") or host.endswith("/unix"):
        path = f"/tmp/.X11-unix/X{number}"  # noqa: S108 - its place
        try:
            # The abstract socket of Linux, which survives a cleaned /tmp.
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
