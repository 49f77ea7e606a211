"""Marks for tests that need something that a machine may lack.

Such a test is skipped, unless ``HARNESS_TEST_REQUIRE`` (words separated by spaces or commas) names the need: then it fails, so
that it can't be skipped by mistake.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import sysconfig

import psutil
import pytest

REQUIRED = frozenset(os.environ.get("HARNESS_TEST_REQUIRE", "").replace(",", " ").split())


def _need(name: str, met: bool, reason: str) -> pytest.MarkDecorator:
    if name in REQUIRED and not met:
        raise RuntimeError(f"HARNESS_TEST_REQUIRE names {name}, but this machine does not have it: {reason}")
    return pytest.mark.skipif(not met, reason=f"{name}: {reason}")


_POSIX = sys.platform != "win32"

# AF_UNIX, file modes, SIGSTOP.
needs_posix = _need("posix", _POSIX, "sockets in the file system, modes and signals exist only on POSIX")
# Named pipes, sharing violations, flags of new processes.
needs_windows = _need("windows", not _POSIX, "named pipes and their handles exist only on Windows")
# Switching to another uid.
needs_root = _need("root", _POSIX and os.geteuid() == 0, "only root can become another user")
# /proc/self/fd, SO_PEERCRED.
needs_linux = _need("linux", sys.platform == "linux", "the test reads /proc")
# RLIMIT_AS limits the memory of a process. (mimalloc, the allocator of free-threaded builds, reserves 1 GiB of address space.)
needs_address_limit = _need(
    "address-limit",
    sys.platform == "linux" and not sysconfig.get_config_var("Py_GIL_DISABLED"),
    "RLIMIT_AS does not bound the memory of a free-threaded build (mimalloc reserves 1 GiB), nor of other systems' processes",
)


def _shows_sockets() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return any(found.laddr == listener.getsockname() for found in psutil.Process().net_connections("tcp"))


# Finding the process that owns a port.
needs_socket_table = _need("socket-table", _shows_sockets(), "the system does not show a process's sockets (Wine)")


def _has_browser() -> bool:
    from harness_ipc.browser.program import find_binary

    return importlib.util.find_spec("websockets") is not None and find_binary() is not None


# A real browser, and the extra `browser`.
needs_chromium = _need("chromium", _has_browser(), "there is no Chrome or Chromium, or harness-ipc[browser] is not installed")
# pip, to install the package as a user does.
needs_network = _need(
    "network", "network" in REQUIRED, "it installs from a package index; set HARNESS_TEST_REQUIRE=network to run it"
)
