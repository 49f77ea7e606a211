"""TCP connections to this machine, and the owner of the other end, determined before the first byte is sent.

Any user of a machine may listen on a loopback port. The owner is looked up after connecting, because the listener may be
replaced between a lookup and the connect.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import psutil

LOOPBACKS = ("127.0.0.1", "::1")
# Seconds to connect. The kernel accepts at once, unless the listener's queue is full.
CONNECT_TIMEOUT = 2.0

ROOT = 0
# The TCP sockets of this network namespace, by their family (proc_net_tcp.rst in the kernel's documentation).
TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
# States of a socket (include/net/tcp_states.h), as /proc/net/tcp prints them.
_ESTABLISHED, _SYN_RECV, _LISTEN = "01", "03", "0A"
# An IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2).
_MAPPED = bytes(10) + b"\xff\xff"


class NotOurs(PermissionError):
    """The other end belongs to another user, or its owner is unknown. Nothing was sent to it."""

    def __init__(self, message: str, uids: frozenset[int]) -> None:
        super().__init__(message)
        self.uids = uids


def connect_to_any(host: str, port: int) -> tuple[socket.socket, frozenset[int]]:
    """Connect to a TCP port. Return the socket and the foreign uids that own its other end.

    There are none if the other end is ours, remote, or unknown. Raises `OSError`, and `ValueError` or `OverflowError` for an
    invalid address.
    """
    sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
    return sock, find_owners(sock) - {_own_uid()}


def connect_to_ours(host: str, port: int) -> socket.socket:
    """Connect to a TCP port of this machine that belongs to this user or to root.

    Raises `NotOurs` if it does not, or if that is unknown, and what `connect_to_any` does.
    """
    sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
    try:
        uids = find_owners(sock)
        untrusted = uids - _trusted()
        if strangers := untrusted - {_own_uid()}:
            raise NotOurs(f"{host}:{port} belongs to another user, {describe_users(strangers)}", uids)
        if untrusted or not uids:
            raise NotOurs(f"{host}:{port} is not known to belong to you or to root", uids)
    except BaseException:
        sock.close()
        raise
    return sock


def is_here(host: str, port: int) -> bool:
    """Return whether the name or address `host` is local. Resolves it, which may take seconds."""
    return any(_is_own_address(family, address) for family, address in _resolve(host, port))


def to_address(host: str, port: int) -> str:
    """Return the first address of `host` and `port`. Raises `OSError`."""
    found = _resolve(host, port)
    if not found:
        raise OSError(f"{host} can't be resolved")
    return found[0][1]


def _resolve(host: str, port: int) -> list[tuple[int, str]]:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError):
        return []
    return [(family, str(address[0])) for family, _, _, _, address in infos]


def _is_own_address(family: int, address: str) -> bool:
    # Only an address of this machine can be bound.
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
            return True
    except OSError:
        return False


def is_browser(port: int) -> bool | None:
    """Return whether the listener at `port` has children like a Chromium; None if no listener is visible.

    A user sees only its own processes; on macOS, only root sees any.
    """
    try:
        found = psutil.net_connections("tcp")
        listening = [one for one in found if one.status == psutil.CONN_LISTEN and tuple(one.laddr)[1:2] == (port,)]
        pids = {one.pid for one in listening if one.pid is not None}
        children = [child for pid in pids for child in psutil.Process(pid).children()]
        # Chromium may overwrite its arguments with one string.
        return any(" --type=" in " ".join(["", *child.cmdline()]) for child in children) if pids else None
    except (psutil.Error, OSError):
        return None


def describe_users(uids: frozenset[int]) -> str:
    """Return the uids as text, with user names."""
    return " and ".join(map(_describe_user, sorted(uids)))


def find_owners(sock: socket.socket) -> frozenset[int]:
    """Return the uids that own the other end of the connected `sock`; empty if unknown."""
    try:
        here, there = sock.getsockname()[:2], sock.getpeername()[:2]
        if sys.platform == "linux":
            # Without IPv6, there is no second table.
            tables = [TABLES[0], *filter(os.path.exists, TABLES[1:])]
            return frozenset().union(*(owners_in_table(Path(table).read_text("utf-8"), here, there) for table in tables))
        return frozenset({_own_uid()} if is_held_by_us(here, there) else ())
    except (OSError, ValueError):
        return frozenset()


def owners_in_table(table: str, here: tuple[str, int], there: tuple[str, int]) -> frozenset[int]:
    """Return the owners of the other end, at `there`, of a connection from `here`. `table` is the text of /proc/net/tcp[6].

    An accepted socket has an inode, and the uid of the process that accepted it. Before the accept it has neither, and kernels
    before 6.17 print the uid of root. Until then, the owners are all listeners in this table on an address that covers `there`:
    a listener and its pending connections are in the same table. Empty if unknown. Raises `ValueError` for an invalid table.
    """
    ends, listening = _spellings(here, there)
    pending = False
    accepted: set[int] = set()
    listeners: set[int] = set()
    header, *lines = table.splitlines() or [""]
    if header.split()[:2] != ["sl", "local_address"]:
        raise ValueError("not a table of TCP sockets")
    for line in lines:
        fields = line.split()
        if len(fields) < 10:
            raise ValueError(f"not a row of a TCP socket: {line!a}")
        local, remote, state, uid, inode = fields[1], fields[2], fields[3], int(fields[7]), int(fields[9])
        if state == _LISTEN and local in listening:
            listeners.add(uid)
        elif (local, remote) in ends:
            if inode and state != _ESTABLISHED:
                # The closing socket can still read, and another process may listen on its port now.
                return frozenset()
            if inode:
                accepted.add(uid)
            pending = pending or state in (_ESTABLISHED, _SYN_RECV)
    # During the accept, a row may already have an inode, but still the uid of root.
    if accepted and ROOT not in accepted:
        return frozenset(accepted)
    return frozenset(accepted | listeners if pending else ())


def is_held_by_us(here: tuple[str, int], there: tuple[str, int]) -> bool:
    """Return whether a process of this user has accepted the connection from `here` to `there`, or listens exactly there.

    Exactly: on macOS and Windows, another process may listen on a more specific address than ours, and would get the
    connections. For systems that show a user only its own sockets.
    """
    remotes = {psutil.CONN_ESTABLISHED: here, psutil.CONN_LISTEN: ()}
    for process in psutil.process_iter():
        try:
            if not _is_own_process(process):
                continue
            for connection in process.net_connections("tcp"):
                if tuple(connection.laddr) == there and tuple(connection.raddr) == remotes.get(connection.status):
                    return True
        except (psutil.Error, OSError):
            continue
    return False


def _is_own_process(process: psutil.Process) -> bool:
    if sys.platform == "win32":
        return process.username() == psutil.Process().username()
    return process.uids().effective == os.geteuid()


def _own_uid() -> int:
    if sys.platform == "win32":
        # Windows has no uids: an owner is this user, or unknown.
        return -1
    return os.geteuid()


def _trusted() -> set[int]:
    uids = {ROOT, _own_uid()}
    if sys.platform == "linux":
        # A user namespace shows all unmapped users as this uid (user_namespaces(7)), so it identifies nobody.
        uids.discard(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return uids


def _describe_user(uid: int) -> str:
    if sys.platform != "win32":
        import pwd

        try:
            return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
        except (KeyError, OSError):
            pass
    return f"uid {uid}"


def _spellings(here: tuple[str, int], there: tuple[str, int]) -> tuple[set[tuple[str, str]], set[str]]:
    """Return the spellings, in the tables, of the connection's addresses, and of those where the other end may listen."""
    family = socket.AF_INET6 if ":" in there[0] else socket.AF_INET
    ours, theirs = socket.inet_pton(family, here[0]), socket.inet_pton(family, there[0])
    anywhere = bytes(len(theirs))
    ends = {(_spell(theirs, there[1]), _spell(ours, here[1]))}
    listening = {theirs, anywhere, bytes(16)}
    if family == socket.AF_INET:
        ends.add((_spell(_MAPPED + theirs, there[1]), _spell(_MAPPED + ours, here[1])))
        listening |= {_MAPPED + theirs, _MAPPED + anywhere}
    return ends, {_spell(address, there[1]) for address in listening}


def _spell(address: bytes, port: int) -> str:
    # Groups of 32 bits in native byte order (get_tcp4_sock in net/ipv4/tcp_ipv4.c, get_tcp6_sock).
    words = (int.from_bytes(address[start : start + 4], sys.byteorder) for start in range(0, len(address), 4))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
