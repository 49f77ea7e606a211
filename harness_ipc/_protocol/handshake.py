"""The handshake: client and daemon prove to each other that they have the generation's key. Frames in, frames out, no I/O.

    client                                  daemon
    #CHALLENGE# and a nonce          ->
                                     <-     the nonce's MAC under the daemon's key; #CHALLENGE# and another nonce
    #WELCOME#; the MAC under the client's key; its first request
                                     ->
                                     <-     #WELCOME#, and the first reply

The frames are those of `deliver_challenge` and `answer_challenge` in `multiprocessing.connection` of CPython 3.12. The form of
3.11 (MD5) is supported in both directions. Each direction has its own key. With a shared key, a process that has taken over
the address could relay one client's challenge to another client, and pass the answer off as the daemon's. The keys depend on
the address, so an answer is useless at any other address. The client challenges first, and sends nothing else to a daemon that
is not authenticated.
"""

from __future__ import annotations

import hmac
import os

from ..errors import AuthenticationFailed

CHALLENGE = b"#CHALLENGE#"
WELCOME = b"#WELCOME#"
FAILURE = b"#FAILURE#"
# The limit of a handshake frame in bytes, as in multiprocessing.connection.
MAX_FRAME = 256

# Lengths in bytes: the nonces of CPython 3.11 and 3.12, and the answer of 3.11, an MD5 digest without a prefix.
_LEGACY_NONCE = 20
_NONCE = 32
_LEGACY_ANSWER = 16
_PREFIX = b"{sha256}"
# The digests that a challenge of CPython 3.12 or later may request.
_DIGESTS = frozenset({b"md5", b"sha256", b"sha384", b"sha3_256", b"sha3_384"})


class Keys:
    """The two keys of a generation: `daemon` authenticates the daemon, `client` its clients."""

    __slots__ = ("client", "daemon")

    def __init__(self, authkey: bytes, address: str) -> None:
        self.daemon = role_key(authkey, "daemon", address)
        self.client = role_key(authkey, "client", address)


def role_key(authkey: bytes, role: str, address: str) -> bytes:
    """Return the key that authenticates `role` ("daemon" or "client") at `address`."""
    return hmac.digest(authkey, f"harness-ipc/1 {role} {address}".encode("utf-8", "surrogateescape"), "sha256")


class ClientHandshake:
    """The client's side. Send `output`, and pass each received frame to `receive_frame`, until `may_send` is true.

    Then send `output` and the first request. The frame before the first reply is the daemon's verdict: pass it to
    `receive_verdict`.
    """

    __slots__ = ("_keys", "_nonce", "may_send", "output")

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        # None once the daemon is authenticated.
        self._nonce: bytes | None = _PREFIX + os.urandom(_NONCE)
        # Frames to send, in order; the caller empties it.
        self.output = [CHALLENGE + self._nonce]
        self.may_send = False

    def receive_frame(self, frame: bytes) -> None:
        """Process the daemon's next frame. Raises `AuthenticationFailed`; send `output` even then."""
        if self._nonce is not None:
            nonce, self._nonce = self._nonce, None
            if not _is_answer(frame, nonce, self._keys.daemon):
                self.output.append(FAILURE)
                raise AuthenticationFailed("the daemon has another key than its record: it may have been replaced; try again")
            self.output.append(WELCOME)
        else:
            self.output.append(_answer(frame, self._keys.client))
            self.may_send = True


def receive_verdict(frame: bytes) -> None:
    """Process the daemon's verdict on the client's answer. Raises `AuthenticationFailed`."""
    if frame != WELCOME:
        raise AuthenticationFailed("the daemon refused our key: it may be of another generation; try again")


class ServerHandshake:
    """The daemon's side. Pass each received frame to `receive_frame` and send `output`, until `done` is true.

    The last output is the verdict, which may be sent together with the first reply.
    """

    __slots__ = ("_expect", "_keys", "_nonce", "done", "output")

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._nonce = b""
        self._expect = "challenge"
        self.output: list[bytes] = []
        self.done = False

    def receive_frame(self, frame: bytes) -> None:
        """Process the client's next frame. Raises `AuthenticationFailed`; send `output` even then."""
        if self._expect == "challenge":
            self._nonce = _PREFIX + os.urandom(_NONCE)
            self.output += [_answer(frame, self._keys.daemon), CHALLENGE + self._nonce]
            self._expect = "welcome"
        elif self._expect == "welcome":
            if frame != WELCOME:
                raise AuthenticationFailed("the client refused our key")
            self._expect = "answer"
        elif self._expect == "answer" and _is_answer(frame, self._nonce, self._keys.client):
            self.output.append(WELCOME)
            self._expect = "nothing"
            self.done = True
        else:
            self._expect = "nothing"
            self.output.append(FAILURE)
            raise AuthenticationFailed("the client has another key")


def _answer(challenge: bytes, key: bytes) -> bytes:
    """Return the answer to a challenge, with the digest that it requests. Raises `AuthenticationFailed`."""
    nonce = challenge.removeprefix(CHALLENGE)
    if len(nonce) == len(challenge) or len(nonce) < _LEGACY_NONCE:
        raise AuthenticationFailed("the peer does not speak this protocol")
    if len(nonce) == _LEGACY_NONCE:
        return _mac(key, nonce, "md5")
    name = nonce[1 : nonce.find(b"}")] if nonce.startswith(b"{") else b""
    if name not in _DIGESTS:
        raise AuthenticationFailed("the peer requests an unsupported digest")
    return b"{%s}" % name + _mac(key, nonce, name.decode())


def _is_answer(answer: bytes, nonce: bytes, key: bytes) -> bool:
    """Return whether `answer` is the answer to `nonce` under `key`."""
    if len(answer) == _LEGACY_ANSWER:
        return hmac.compare_digest(answer, _mac(key, nonce, "md5"))
    return hmac.compare_digest(answer, _PREFIX + _mac(key, nonce, "sha256"))


def _mac(key: bytes, text: bytes, digest: str) -> bytes:
    try:
        return hmac.digest(key, text, digest)
    except ValueError:
        raise AuthenticationFailed(
            "this OpenSSL refuses HMAC-MD5 (FIPS mode), the only digest of CPython 3.11: use 3.12 or later on both sides"
        ) from None
