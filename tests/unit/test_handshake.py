"""The handshake as rows of frames: in, out, and errors."""

from __future__ import annotations

import ast
import hmac
from pathlib import Path

import pytest

import harness_ipc._protocol
from harness_ipc._protocol.handshake import ClientHandshake, Keys, ServerHandshake, receive_verdict, role_key
from harness_ipc.errors import AuthenticationFailed

ADDRESS = "/run/user/1000/harness-ipc/0123456789abcdef.sock"
KEYS = Keys(bytes(range(32)), ADDRESS)
CHALLENGE, WELCOME, FAILURE = b"#CHALLENGE#", b"#WELCOME#", b"#FAILURE#"
NONCE = b"{sha256}" + bytes(32)
LEGACY_NONCE = bytes(20)


def mac(key: bytes, nonce: bytes, digest: str = "sha256", prefix: str = "{%s}") -> bytes:
    return (prefix % digest if prefix else "").encode() + hmac.digest(key, nonce, digest)


def sent(handshake: ClientHandshake | ServerHandshake) -> list[bytes]:
    frames = handshake.output.copy()
    handshake.output.clear()
    return frames


def nonce_in(frame: bytes) -> bytes:
    assert frame.startswith(CHALLENGE + b"{sha256}")
    assert len(frame) == len(CHALLENGE) + 8 + 32
    return frame.removeprefix(CHALLENGE)


def test_the_handshake_takes_two_round_trips() -> None:
    client, server = ClientHandshake(KEYS), ServerHandshake(KEYS)
    turns = 0
    while not (client.may_send and server.done):
        for frame in sent(client):
            server.receive_frame(frame)
        for frame in sent(server):
            receive_verdict(frame) if client.may_send else client.receive_frame(frame)
        turns += 1
    assert turns == 2


def test_every_handshake_has_new_nonces() -> None:
    challenges = [sent(ClientHandshake(KEYS))[0] for _ in range(100)]
    for _ in range(100):
        server = ServerHandshake(KEYS)
        server.receive_frame(CHALLENGE + NONCE)
        challenges.append(sent(server)[1])
    assert len(set(challenges)) == 200


# The digests that a challenge may request, as in multiprocessing.connection.
DIGESTS = pytest.mark.parametrize(
    ("nonce", "digest", "prefix"),
    [
        pytest.param(LEGACY_NONCE, "md5", "", id="3.11"),
        *(
            pytest.param(f"{{{digest}}}".encode() + bytes(32), digest, "{%s}", id=digest)
            for digest in ("md5", "sha256", "sha384", "sha3_256", "sha3_384")
        ),
    ],
)


@DIGESTS
def test_a_challenge_is_answered_with_the_requested_digest(nonce: bytes, digest: str, prefix: str) -> None:
    server = ServerHandshake(KEYS)
    server.receive_frame(CHALLENGE + nonce)
    assert sent(server)[0] == mac(KEYS.daemon, nonce, digest, prefix)

    client = ClientHandshake(KEYS)
    client.receive_frame(mac(KEYS.daemon, nonce_in(sent(client)[0])))
    client.receive_frame(CHALLENGE + nonce)
    assert sent(client) == [WELCOME, mac(KEYS.client, nonce, digest, prefix)]


@pytest.mark.parametrize(
    ("digest", "prefix", "accepted"),
    [("sha256", "{%s}", True), ("md5", "", True), ("md5", "{%s}", False), ("sha384", "{%s}", False), ("sha256", "", False)],
)
def test_an_answer_has_the_form_of_a_cpython_release(digest: str, prefix: str, accepted: bool) -> None:
    client, server = ClientHandshake(KEYS), ServerHandshake(KEYS)
    server.receive_frame(CHALLENGE + NONCE)
    server.receive_frame(WELCOME)
    to_client = mac(KEYS.daemon, nonce_in(sent(client)[0]), digest, prefix)
    to_server = mac(KEYS.client, nonce_in(sent(server)[1]), digest, prefix)
    if accepted:
        client.receive_frame(to_client)
        server.receive_frame(to_server)
        assert (sent(client), sent(server)) == ([WELCOME], [WELCOME])
        assert server.done
        return
    with pytest.raises(AuthenticationFailed):
        client.receive_frame(to_client)
    with pytest.raises(AuthenticationFailed):
        server.receive_frame(to_server)
    assert (sent(client), sent(server)) == ([FAILURE], [FAILURE])


INVALID_CHALLENGES = pytest.mark.parametrize(
    "frame",
    [
        b"",
        WELCOME,
        FAILURE,
        CHALLENGE,
        NONCE,
        CHALLENGE + bytes(19),
        CHALLENGE + bytes(21),
        CHALLENGE + b"{sha1}" + bytes(32),
        CHALLENGE + b"{}" + bytes(32),
        CHALLENGE + b"{sha256" + bytes(32),
        CHALLENGE + b"{\xff\xff}" + bytes(32),
        b'{"meta":"ping"}',
        bytes(256),
    ],
    ids=lambda frame: ascii(frame[:20]),
)


@INVALID_CHALLENGES
def test_the_daemon_does_not_answer_an_invalid_challenge(frame: bytes) -> None:
    server = ServerHandshake(KEYS)
    with pytest.raises(AuthenticationFailed):
        server.receive_frame(frame)
    assert sent(server) == []
    assert not server.done


@INVALID_CHALLENGES
def test_the_client_does_not_answer_an_invalid_challenge(frame: bytes) -> None:
    client = ClientHandshake(KEYS)
    client.receive_frame(mac(KEYS.daemon, nonce_in(sent(client)[0])))
    sent(client)
    with pytest.raises(AuthenticationFailed):
        client.receive_frame(frame)
    assert sent(client) == []
    assert not client.may_send


def test_a_client_answers_no_challenge_before_the_daemons_proof() -> None:
    client = ClientHandshake(KEYS)
    sent(client)
    with pytest.raises(AuthenticationFailed):
        client.receive_frame(CHALLENGE + NONCE)
    assert sent(client) == [FAILURE]


@pytest.mark.parametrize("verdict", [FAILURE, b"", WELCOME + b" ", b'{"result":1}'])
def test_only_welcome_is_a_welcome(verdict: bytes) -> None:
    with pytest.raises(AuthenticationFailed):
        receive_verdict(verdict)
    server = ServerHandshake(KEYS)
    server.receive_frame(CHALLENGE + NONCE)
    with pytest.raises(AuthenticationFailed):
        server.receive_frame(verdict)


def test_a_finished_server_handshake_takes_no_further_frame() -> None:
    for key in (KEYS.client, bytes(32)):
        server = ServerHandshake(KEYS)
        server.receive_frame(CHALLENGE + NONCE)
        server.receive_frame(WELCOME)
        answer = mac(key, nonce_in(sent(server)[1]))
        right = mac(KEYS.client, NONCE)
        if key is KEYS.client:
            server.receive_frame(answer)
        else:
            with pytest.raises(AuthenticationFailed):
                server.receive_frame(answer)
        for frame in (answer, right, WELCOME, CHALLENGE + NONCE):
            with pytest.raises(AuthenticationFailed):
                server.receive_frame(frame)
        assert server.done is (key is KEYS.client)


def test_md5_that_openssl_refuses_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise ValueError("[digital envelope routines] unsupported")

    monkeypatch.setattr(hmac, "digest", refuse)
    with pytest.raises(AuthenticationFailed, match="FIPS"):
        ServerHandshake(KEYS).receive_frame(CHALLENGE + LEGACY_NONCE)


def test_the_protocol_imports_nothing_that_does_io() -> None:
    # collections.abc and typing: for type checkers only, as a test of the client's imports sees.
    allowed = {"__future__", "collections", "collections.abc", "hmac", "json", "os", "struct", "typing"}
    # For values that are not JSON.
    allowed |= {"binascii", "dataclasses", "datetime"}
    for path in Path(harness_ipc._protocol.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module in allowed
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr == "urandom"


@pytest.mark.parametrize(
    ("key", "accepted"),
    [
        (KEYS.daemon, True),
        (KEYS.client, False),
        (bytes(range(32)), False),
        (Keys(bytes(range(32)), ADDRESS + "x").daemon, False),
    ],
    ids=["the daemon's own", "another client's", "the bare key's", "a daemon's elsewhere"],
)
def test_a_squatter_cannot_relay_an_answer_as_the_daemons(key: bytes, accepted: bool) -> None:
    client = ClientHandshake(KEYS)
    answer = mac(key, nonce_in(sent(client)[0]))
    if accepted:
        client.receive_frame(answer)
    else:
        with pytest.raises(AuthenticationFailed):
            client.receive_frame(answer)


@pytest.mark.parametrize("one_key_for_both_roles", [True, False])
def test_a_client_cannot_let_the_daemon_answer_its_own_challenge(one_key_for_both_roles: bool) -> None:
    keys = Keys(bytes(range(32)), ADDRESS)
    if one_key_for_both_roles:
        keys.client = keys.daemon
    first, second = ServerHandshake(keys), ServerHandshake(keys)
    first.receive_frame(CHALLENGE + NONCE)
    first.receive_frame(WELCOME)
    second.receive_frame(sent(first)[1])
    answer = sent(second)[0]
    # With one key for both roles the attack succeeds, which shows that it is one.
    if one_key_for_both_roles:
        first.receive_frame(answer)
        assert first.done
    else:
        with pytest.raises(AuthenticationFailed):
            first.receive_frame(answer)


def test_every_role_address_and_generation_has_its_own_key() -> None:
    derived = [
        role_key(key, role, address)
        for key in (bytes(range(32)), bytes(32))
        for role in ("daemon", "client")
        for address in (ADDRESS, ADDRESS + "x", r"\\.\pipe\harness-ipc-0", "/tmp/\udcff.sock")
    ]
    assert len(set(derived)) == len(derived)
    assert {len(key) for key in derived} == {32}


def test_keys_are_not_shown() -> None:
    for key in (bytes(range(32)), KEYS.daemon, KEYS.client):
        assert repr(key) not in repr(KEYS)
        assert key.hex() not in repr(KEYS)
