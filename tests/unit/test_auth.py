"""The mutual challenge: both keys right or nothing, no way to reflect it, and no peer that can hold it up."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection as stock
from typing import Any

import pytest

from harness_ipc import auth, transport
from harness_ipc.errors import AuthenticationFailed, ConnectionLost, DaemonTimeout
from tests.marks import needs_posix

from .test_transport import SHORT, connected, header, in_thread, raw_frame, raw_peer

KEY = bytes(range(32))
ADDRESS = "/run/user/1000/harness-ipc/0123456789abcdef.sock"
CHALLENGE = b"#CHALLENGE#"
WELCOME = b"#WELCOME#"

Side = Callable[[transport.Connection, auth.Keys], bytes]


def keys(*, daemon: bytes | None = None, client: bytes | None = None) -> auth.Keys:
    made = auth.Keys(KEY, ADDRESS)
    made.daemon = daemon or made.daemon
    made.client = client or made.client
    return made


# Each side of a whole exchange, a question and an answer after the handshake: ours, and the stock functions step by step.


def ask(connection: transport.Connection, mine: auth.Keys) -> bytes:
    auth.challenge_daemon(connection, mine)
    transport.send(connection, b"question")
    auth.confirm(connection)
    return transport.receive(connection, 100)


def answer(connection: transport.Connection, mine: auth.Keys) -> bytes:
    auth.challenge_client(connection, mine)
    question = transport.receive(connection, 100)
    transport.send(connection, b"answer")
    return question


def stock_ask(connection: Any, mine: auth.Keys) -> bytes:
    stock.deliver_challenge(connection, mine.daemon)
    stock.answer_challenge(connection, mine.client)
    transport.send(connection, b"question")
    return transport.receive(connection, 100)


def stock_answer(connection: Any, mine: auth.Keys) -> bytes:
    stock.answer_challenge(connection, mine.daemon)
    stock.deliver_challenge(connection, mine.client)
    question = transport.receive(connection, 100)
    transport.send(connection, b"answer")
    return question


def exchange(
    client_side: Side, client_keys: auth.Keys, daemon_side: Side, daemon_keys: auth.Keys
) -> tuple[bytes | BaseException, bytes | BaseException]:
    """Run both sides and return what each of them returned or raised."""
    with connected() as (client, daemon), ThreadPoolExecutor(2) as executor:

        def run(side: Side, connection: transport.Connection, mine: auth.Keys) -> bytes | BaseException:
            try:
                return side(connection, mine)
            except Exception as error:
                return error
            finally:
                # As after every failure: the other side sees the end of it.
                connection.finish_receiving()

        asked = executor.submit(run, client_side, client, client_keys)
        answered = executor.submit(run, daemon_side, daemon, daemon_keys)
        return asked.result(), answered.result()


def test_every_role_address_and_generation_has_a_key_of_its_own() -> None:
    derived = [
        auth.role_key(key, role, address)
        for key in (KEY, bytes(32))
        for role in ("daemon", "client")
        for address in (ADDRESS, ADDRESS + "x", r"\\.\pipe\harness-ipc-0", "/tmp/\udcff.sock")
    ]
    assert len({*derived, KEY}) == len(derived) + 1
    assert {len(key) for key in derived} == {32}
    both = auth.Keys(KEY, ADDRESS)
    assert (both.daemon, both.client) == (auth.role_key(KEY, "daemon", ADDRESS), auth.role_key(KEY, "client", ADDRESS))


def test_keys_are_not_shown() -> None:
    made = auth.Keys(KEY, ADDRESS)
    for key in (KEY, made.daemon, made.client):
        assert repr(key) not in repr(made)
        assert key.hex() not in repr(made)


@pytest.mark.parametrize("client_side", [ask, stock_ask])
@pytest.mark.parametrize("daemon_side", [answer, stock_answer])
def test_the_right_keys_open_the_connection_also_to_the_stock_functions(client_side: Side, daemon_side: Side) -> None:
    assert exchange(client_side, keys(), daemon_side, keys()) == (b"answer", b"question")


@pytest.mark.parametrize(
    "wrong",
    [
        auth.Keys(bytes(32), ADDRESS),
        auth.Keys(KEY, ADDRESS + "x"),
        keys(daemon=keys().client, client=keys().daemon),
        keys(daemon=bytes(32)),
        keys(client=bytes(32)),
    ],
    ids=["other key", "other address", "roles swapped", "other daemon key", "other client key"],
)
@pytest.mark.parametrize("whose", ["client", "daemon"])
def test_a_wrong_key_of_either_side_is_refused_on_both(wrong: auth.Keys, whose: str) -> None:
    pair = (wrong, keys()) if whose == "client" else (keys(), wrong)
    for error in exchange(ask, pair[0], answer, pair[1]):
        assert type(error) is AuthenticationFailed
        for key in (KEY, *(getattr(some, role) for some in pair for role in ("daemon", "client"))):
            assert repr(key)[2:-1] not in str(error)
            assert key.hex() not in str(error)


def test_the_client_tells_nothing_before_it_knows_the_daemon() -> None:
    with connected() as (client, daemon), in_thread(auth.challenge_daemon, client, keys()) as proved:
        assert transport.receive(daemon, 256).startswith(CHALLENGE)
        daemon.send_bytes(CHALLENGE + bytes(20))
        with pytest.raises(AuthenticationFailed):
            proved.result()
        # Not even an answer to a challenge that came too early.
        client.close()
        assert transport.receive(daemon, 256) == b"#FAILURE#"
        with pytest.raises(ConnectionLost):
            transport.receive(daemon, 256)


# Reflection: a process without any key that gets the answer it needs from somebody who has one.


class Eavesdropped:
    """A connection that the stock functions read `frame` from and write what they send to."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.sent: list[bytes] = []

    def recv_bytes(self, limit: int) -> bytes:
        frame, self.frame = self.frame, WELCOME
        return frame

    def send_bytes(self, frame: bytes) -> None:
        self.sent.append(frame)


def answer_to(challenge: bytes, key: bytes) -> bytes:
    link: Any = Eavesdropped(challenge)
    stock.answer_challenge(link, key)
    return bytes(link.sent[0])


@pytest.mark.parametrize(
    ("reply", "accepted"),
    [
        (lambda challenge: answer_to(challenge, keys().daemon), True),
        (lambda challenge: answer_to(challenge, keys().client), False),
        (lambda challenge: answer_to(challenge, KEY), False),
        (lambda challenge: answer_to(challenge, auth.Keys(KEY, ADDRESS + "x").daemon), False),
        (lambda challenge: challenge, False),
    ],
    ids=["the daemon's own", "another client's", "the bare key's", "a daemon's elsewhere", "the challenge itself"],
)
def test_a_squatter_cannot_pass_anothers_answer_on_as_the_daemons(reply: Callable[[bytes], bytes], accepted: bool) -> None:
    with connected() as (client, squatter), in_thread(auth.challenge_daemon, client, keys()) as proved:
        squatter.send_bytes(reply(squatter.recv_bytes(256)))
        if accepted:
            squatter.send_bytes(CHALLENGE + os.urandom(20))
            proved.result()
        else:
            with pytest.raises(AuthenticationFailed):
                proved.result()


@pytest.mark.parametrize("one_key_for_both_roles", [True, False])
def test_a_client_cannot_let_the_daemon_answer_its_own_challenge(one_key_for_both_roles: bool) -> None:
    mine = keys(client=keys().daemon) if one_key_for_both_roles else keys()
    with connected() as (intruder, first), connected() as (accomplice, second), ThreadPoolExecutor(2) as executor:
        admitted = executor.submit(auth.challenge_client, first, mine)
        executor.submit(auth.challenge_client, second, mine)
        intruder.send_bytes(CHALLENGE + os.urandom(20))
        intruder.recv_bytes(256)
        intruder.send_bytes(WELCOME)
        accomplice.send_bytes(intruder.recv_bytes(256))
        intruder.send_bytes(accomplice.recv_bytes(256))
        accomplice.close()
        # Under one key the trick works: which shows that this is the trick.
        if one_key_for_both_roles:
            admitted.result()
        else:
            with pytest.raises(AuthenticationFailed):
                admitted.result()


# Peers that do not play.


def confirm(connection: transport.Connection, _: auth.Keys) -> None:
    auth.confirm(connection)


STEPS = pytest.mark.parametrize("step", [auth.challenge_daemon, auth.challenge_client, confirm])


@STEPS
def test_a_silent_peer_is_a_timeout_at_the_deadline(step: Callable[..., None]) -> None:
    with connected() as (connection, _silent):
        connection.deadline = time.monotonic() + SHORT
        with pytest.raises(DaemonTimeout):
            step(connection, keys())
        assert time.monotonic() >= connection.deadline


@STEPS
def test_a_peer_that_leaves_at_once_is_a_lost_connection(step: Callable[..., None]) -> None:
    with connected() as (connection, peer):
        peer.close()
        with pytest.raises(ConnectionLost):
            step(connection, keys())


@needs_posix
@STEPS
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        header(2**31 - 1),
        header(257),
        header(-1) + struct.pack("!Q", 2**63),
        header(-2),
        header(20) + b"torn",
        raw_frame(b""),
        raw_frame(bytes(256)),
        raw_frame(CHALLENGE),
        raw_frame(CHALLENGE + bytes(20)),
        raw_frame(b"#FAILURE#"),
        raw_frame(b"{md5}" + bytes(16)),
        raw_frame(b'{"meta":"ping"}'),
    ],
    ids=lambda garbage: ascii(garbage[:14]),
)
def test_a_peer_that_sends_garbage_is_refused_in_one_typed_error(step: Callable[..., None], garbage: bytes) -> None:
    with raw_peer() as (raw, connection):
        raw.sendall(garbage)
        raw.shutdown(1)
        with pytest.raises((AuthenticationFailed, ConnectionLost)) as caught:
            step(connection, keys())
    assert "localhost" not in str(caught.value)
    assert "\0" not in str(caught.value)
