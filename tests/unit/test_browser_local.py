"""The owner of the other end of a local connection, from the kernel's tables and from our own processes."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness_ipc.browser import local
from tests.support.marks import needs_linux, needs_socket_table

pytestmark = pytest.mark.skipif(sys.byteorder == "big", reason="the addresses below are as little-endian machines print them")

HERE, THERE = ("127.0.0.1", 54321), ("127.0.0.1", 9222)
# Their spelling in the tables.
OURS, PORT = "0100007F:D431", "2406"
MAPPED = "0000000000000000FFFF0000"
US, OTHER = 1000, 54322

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
HEADER_6 = "  sl  local_address                         remote_address                        st tx_queue rx_queue"


def row(local_address: str, remote: str, state: str, uid: int, inode: int) -> str:
    return f"   0: {local_address} {remote} {state} 00000000:00000000 00:00000000 00000000 {uid:5} 0 {inode} 1"


def listen(address: str, uid: int) -> str:
    return row(f"{address}:{PORT}", f"{'0' * len(address)}:0000", "0A", uid, 7)


def end(state: str, uid: int, inode: int) -> str:
    return row(f"0100007F:{PORT}", OURS, state, uid, inode)


def mapped_end(state: str, uid: int, inode: int) -> str:
    return row(f"{MAPPED}0100007F:{PORT}", f"{MAPPED}{OURS}", state, uid, inode)


LOOPBACK, ANY, ANY_6 = "0100007F", "00000000", "0" * 32
CLIENT = row(OURS, f"0100007F:{PORT}", "01", US, 8)


@pytest.mark.parametrize(
    ("rows", "owners"),
    [
        pytest.param([], set(), id="nothing"),
        pytest.param([CLIENT, listen(LOOPBACK, US)], set(), id="our own end is not the other one"),
        pytest.param([listen(LOOPBACK, OTHER), end("01", US, 9)], {US}, id="accepted by another process than the listener"),
        pytest.param([listen(LOOPBACK, US), end("01", OTHER, 9)], {OTHER}, id="accepted by another user"),
        pytest.param([end("01", US, 9)], {US}, id="accepted, the listener is closed"),
        pytest.param([listen(LOOPBACK, US), end("01", 0, 0)], {US}, id="not accepted, said to be root's"),
        pytest.param([listen(LOOPBACK, OTHER), end("01", 0, 0)], {OTHER}, id="another's, not accepted, said to be root's"),
        pytest.param([listen(LOOPBACK, OTHER), end("01", OTHER, 0)], {OTHER}, id="another's, not accepted"),
        pytest.param([listen(LOOPBACK, OTHER), end("01", 0, 9)], {0, OTHER}, id="another's, read while it is accepted"),
        pytest.param([listen(LOOPBACK, 0), end("01", 0, 9)], {0}, id="root's"),
        pytest.param([listen(LOOPBACK, OTHER), end("03", 0, 0)], {OTHER}, id="before the last step of the handshake"),
        pytest.param([listen(ANY, OTHER), end("01", 0, 0)], {OTHER}, id="wildcard"),
        pytest.param([listen(LOOPBACK, US), listen(ANY, OTHER), end("01", 0, 0)], {US, OTHER}, id="wildcard beside it"),
        pytest.param([listen(LOOPBACK, US), listen(LOOPBACK, OTHER), end("01", 0, 0)], {US, OTHER}, id="several listeners"),
        pytest.param([listen("0200007F", US), end("01", 0, 0)], set(), id="listener of another address"),
        pytest.param([listen(LOOPBACK, US).replace(PORT, "2407"), end("01", 0, 0)], set(), id="listener of another port"),
        pytest.param([end("01", 0, 0)], set(), id="not accepted, and no listener"),
        pytest.param([listen(LOOPBACK, US)], set(), id="listener without the connection"),
        pytest.param([listen(LOOPBACK, US), end("05", OTHER, 9)], set(), id="half closed by the one that accepted it"),
        pytest.param([listen(LOOPBACK, US), end("06", 0, 0)], set(), id="closed"),
        pytest.param([listen(LOOPBACK, US), end("01", US, 9).replace(OURS, "0100007F:D432")], set(), id="another connection"),
    ],
)
def test_owners_in_the_table_of_ipv4(rows: list[str], owners: set[int]) -> None:
    assert local.owners_in_table("\n".join([HEADER, *rows, ""]), HERE, THERE) == owners


@pytest.mark.parametrize(
    ("rows", "owners"),
    [
        pytest.param([mapped_end("01", OTHER, 9)], {OTHER}, id="accepted"),
        pytest.param([listen(ANY_6, OTHER), mapped_end("01", 0, 0)], {OTHER}, id="wildcard"),
        pytest.param([listen(f"{MAPPED}{LOOPBACK}", OTHER), mapped_end("01", 0, 0)], {OTHER}, id="mapped"),
        pytest.param([listen(f"{MAPPED}{ANY}", OTHER), mapped_end("01", 0, 0)], {OTHER}, id="mapped wildcard"),
        pytest.param([listen(f"{'0' * 24}01000000", OTHER), mapped_end("01", 0, 0)], set(), id="another address"),
        pytest.param([listen(ANY_6, OTHER)], set(), id="a wildcard that did not take the connection"),
    ],
)
def test_owners_in_the_table_of_ipv6(rows: list[str], owners: set[int]) -> None:
    assert local.owners_in_table("\n".join([HEADER_6, *rows, ""]), HERE, THERE) == owners


def test_owners_of_an_ipv6_connection() -> None:
    loopback = f"{'0' * 24}01000000"
    table = "\n".join([HEADER_6, listen(loopback, US), row(f"{loopback}:{PORT}", f"{loopback}:D431", "01", 0, 0)])
    assert local.owners_in_table(table, ("::1", 54321), ("::1", 9222)) == {US}
    assert local.owners_in_table(table, HERE, THERE) == set()


@pytest.mark.parametrize(
    "table",
    [
        "",
        "\n",
        "<html>",
        listen(LOOPBACK, US),
        f"{HEADER}\n   0: 0100007F:2406",
        f"{HEADER}\n\n{end('01', US, 9)}",
        f"{HEADER}\n{end('01', US, 9).replace(' 1000 ', ' root ')}",
        f"{HEADER}\n{end('01', US, 9)}\ngarbage",
    ],
)
def test_an_invalid_table(table: str) -> None:
    with pytest.raises(ValueError, match=r"not a table|not a row|invalid literal"):
        local.owners_in_table(table, HERE, THERE)


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """A connection to a listener of this process that has not accepted it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        yield client


@needs_linux
def test_unknown_owners_of_a_port(connection: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = local.TABLES
    assert local.find_owners(connection) == {os.geteuid()}
    monkeypatch.setattr(local, "TABLES", (tables[0], str(tmp_path / "nothing")))
    assert local.find_owners(connection) == {os.geteuid()}
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\xff\n")
    address, port = connection.getpeername()
    for unknown in ((str(tmp_path / "nothing"), tables[1]), (tables[0], str(garbage)), (str(garbage),), (str(tmp_path),)):
        monkeypatch.setattr(local, "TABLES", unknown)
        assert local.find_owners(connection) == set()
        with pytest.raises(local.NotOurs, match=f"{address}:{port} is not known to belong to you or to root") as caught:
            local.connect_to_ours(address, port)
        assert caught.value.uids == set()


@needs_linux
def test_the_overflow_uid_is_not_trusted(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    many = int(Path("/proc/sys/kernel/overflowuid").read_text())
    monkeypatch.setattr(local, "find_owners", lambda _: frozenset({many}))
    monkeypatch.setattr(os, "geteuid", lambda: many)
    with pytest.raises(local.NotOurs, match="is not known to belong to you"):
        local.connect_to_ours(*connection.getpeername())


def test_a_connection_that_has_ended_has_no_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.close()
        assert local.find_owners(client) == set()


@pytest.fixture
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all processes but this one and its parent: for each one, psutil reads all sockets of the machine."""
    pids, every = {os.getpid(), os.getppid()}, psutil.process_iter
    monkeypatch.setattr(psutil, "process_iter", lambda: (process for process in every() if process.pid in pids))


@needs_socket_table
@pytest.mark.usefixtures("few_processes")
def test_ports_of_our_own_processes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = listener.getsockname()
        with socket.create_connection(there) as client:
            assert local.is_held_by_us(client.getsockname(), there)
            server = listener.accept()[0]
            listener.close()
            assert local.is_held_by_us(client.getsockname(), there)
            assert not local.is_held_by_us(("127.0.0.1", 1), there)
            server.close()
            assert not local.is_held_by_us(client.getsockname(), there)


@needs_socket_table
@pytest.mark.usefixtures("few_processes")
def test_another_user_may_listen_on_a_more_specific_address() -> None:
    with socket.create_server(("", 0)) as listener:
        there = ("127.0.0.1", listener.getsockname()[1])
        with socket.create_connection(there) as client:
            assert not local.is_held_by_us(client.getsockname(), there)
            server = listener.accept()[0]
            assert local.is_held_by_us(client.getsockname(), there)
            server.close()
