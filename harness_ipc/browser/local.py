"""TCP connections to this machine, and who owns their other end, known before the first byte is sent. Not about browsers.

Any user of a machine may listen on a loopback port. The owner is looked up after the connect, because a listener can be
replaced between a look at the port and the connect.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import psutil

LOOPBACKS = ("127.0.0.1", "::1")
# Seconds for a port to take a connection. The kernel does that at once, unless the listener's queue is full.
CONNECT_TIMEOUT = 2.0

ROOT = 0
# The TCP sockets of this network namespace, by their family (proc_net_tcp.rst in the kernel's documentation).
TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
# States of a socket (include/net/tcp_states.h), as /proc/net/tcp prints them.
_ESTABLISHED, _SYN_RECV, _LISTEN = "01", "03", "0A"
# RFC 4291, 2.5.5.2: how an IPv6 socket spells an IPv4 address.
_MAPPED = bytes(10) + b"\xff\xff"


class NotOurs(PermissionError):
    """The other end belongs to another user, or its owner can't be told. It was sent nothing."""

    def __init__(self, message: str, uids: frozenset[int]) -> None:
        super().__init__(message)
        self.uids = uids


def connect_to_any(host: str, port: int) -> tuple[socket.socket, frozenset[int]]:
    """Connect to a TCP port, and return the socket and the uids other than ours that own its other end.

    There are none where it is ours, on another machine, or can't be told. Raises `OSError`, and `ValueError` or `OverflowError`
    for what is no address.
    """
    sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
    return sock, find_owners(sock) - {_own_uid()}


def connect_to_ours(host: str, port: int) -> socket.socket:
    """Connect to a TCP port of this machine, if the other end belongs to this user or to root.

    Raises `NotOurs` if it does not, or if that can't be told; else what `connect_to_any` does.
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
    """Return whether the name or address `host` is of this machine. Resolves it, which may take seconds."""
    return any(_is_own_address(family, address) for family, address in _resolve(host, port))


def to_address(host: str, port: int) -> str:
    """Return the address that a connection to `host` and `port` would go to first. Raises `OSError`."""
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
    """Return whether a process that listens at `port` has children as a Chromium has them; None if none is seen that listens.

    A user sees only processes of its own, and on macOS only root does.
    """
    try:
        found = psutil.net_connections("tcp")
        listening = [one for one in found if one.status == psutil.CONN_LISTEN and tuple(one.laddr)[1:2] == (port,)]
        pids = {one.pid for one in listening if one.pid is not None}
        children = [child for pid in pids for child in psutil.Process(pid).children()]
        # One word or many: Chromium writes its title there.
        return any(" --type=" in " ".join(["", *child.cmdline()]) for child in children) if pids else None
    except (psutil.Error, OSError):
        return None


def describe_users(uids: frozenset[int]) -> str:
    """Return these uids for people, with the names of those that have one."""
    return " and ".join(map(_describe_user, sorted(uids)))


def find_owners(sock: socket.socket) -> frozenset[int]:
    """Return the uids that own the other end of the connected `sock`: none where that can't be told."""
    try:
        here, there = sock.getsockname()[:2], sock.getpeername()[:2]
        if sys.platform == "linux":
            # Where IPv6 is disabled, the second is not there.
            tables = [TABLES[0], *filter(os.path.exists, TABLES[1:])]
            return frozenset().union(*(owners_in_table(Path(table).read_text("utf-8"), here, there) for table in tables))
        return frozenset({_own_uid()} if is_held_by_us(here, there) else ())
    except (OSError, ValueError):
        return frozenset()


def owners_in_table(table: str, here: tuple[str, int], there: tuple[str, int]) -> frozenset[int]:
    """Return who owns the other end, at `there`, of a connection from `here`, by the text of /proc/net/tcp or /proc/net/tcp6.

    An accepted socket has an inode, and the uid of the process that accepted it. Before the accept it has neither: some kernels
    (before 6.17) print root's uid then. Until it is accepted, all who listen in this table on an address that covers `there`
    are its owners; a listener and the connections that it has not accepted yet are in the same table. None: it can't be told.
    Raises `ValueError` for what is no such table.
    """
    ends, listening = _spellings(here, there)
    pending = False
    accepted: set[int] = set()
    listeners: set[int] = set()
    header, *lines = table.splitlines() or [""]
    if header.split()[:2] != ["sl", "local_address"]:
        raise ValueError("no table of TCP sockets")
    for line in lines:
        fields = line.split()
        if len(fields) < 10:
            raise ValueError(f"no row of a TCP socket: {line!a}")
        local, remote, state, uid, inode = fields[1], fields[2], fields[3], int(fields[7]), int(fields[9])
        if state == _LISTEN and local in listening:
            listeners.add(uid)
        elif (local, remote) in ends:
            if inode and state != _ESTABLISHED:
                # It can still read from us, and another may listen on its port by now.
                return frozenset()
            if inode:
                accepted.add(uid)
            pending = pending or state in (_ESTABLISHED, _SYN_RECV)
    # A row that is read while the socket is accepted may have an inode already, and still root's uid.
    if accepted and ROOT not in accepted:
        return frozenset(accepted)
    return frozenset(accepted | listeners if pending else ())


def is_held_by_us(here: tuple[str, int], there: tuple[str, int]) -> bool:
    """Return whether a process of this user has accepted the connection from `here` to `there`, or listens exactly there.

    Exactly, since where one may listen on a wildcard address and another on one that it covers (macOS, Windows), connections go
    to the latter. For systems that don't tell the owners of all sockets: it takes no privilege to see one's own.
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
        # It has none: there, an owner is this user or unknown.
        return -1
    return os.geteuid()


def _trusted() -> set[int]:
    uids = {ROOT, _own_uid()}
    if sys.platform == "linux":
        # A user namespace shows all users that it does not map as this uid (user_namespaces(7)): ours would be one of many.
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
    """Return how the tables spell the other end's two addresses, and the addresses where it may have been listening."""
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
    # Each 32 bits as an integer of this machine's byte order (get_tcp4_sock in net/ipv4/tcp_ipv4.c, get_tcp6_sock).
    words = (int.from_bytes(address[start : start + 4], sys.byteorder) for start in range(0, len(address), 4))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
