"""The mutual challenge: each side proves to the other that it has the generation's key. Frames in, frames out, no I/O.

    client                                  daemon
    #CHALLENGE# and a nonce          ->
                                     <-     the nonce's MAC under the daemon's key; #CHALLENGE# and another nonce
    #WELCOME#; the MAC under the client's key; its first request
                                     ->
                                     <-     #WELCOME#, and the first reply

These are the frames of `deliver_challenge` and `answer_challenge` of `multiprocessing.connection`, in CPython 3.12's form; an
answer in 3.11's form (MD5) is accepted and, to a challenge in that form, given. Each direction has a key of its own: under one
key for both, a process without it that holds the address could forward one client's challenge to another client, and pass
the answer on as the daemon's. The address is part of the keys, so an answer is worthless at any other address. The client
challenges first: it sends nothing else to a daemon that has not proved itself.
"""

from __future__ import annotations

import hmac
import os

from ..errors import AuthenticationFailed

CHALLENGE = b"#CHALLENGE#"
WELCOME = b"#WELCOME#"
FAILURE = b"#FAILURE#"
# Bytes of the longest frame of a handshake, as multiprocessing.connection has it.
MAX_FRAME = 256

# Bytes of the nonces of CPython 3.11 and of 3.12, and of 3.11's answer: an MD5 digest without a prefix.
_LEGACY_NONCE = 20
_NONCE = 32
_LEGACY_ANSWER = 16
_PREFIX = b"{sha256}"
# The digests that a challenge may ask for in CPython 3.12 and later.
_DIGESTS = frozenset({b"md5", b"sha256", b"sha384", b"sha3_256", b"sha3_384"})


class Keys:
    """The two keys of a generation: the daemon proves itself under `daemon`, its clients under `client`."""

    __slots__ = ("client", "daemon")

    def __init__(self, authkey: bytes, address: str) -> None:
        self.daemon = role_key(authkey, "daemon", address)
        self.client = role_key(authkey, "client", address)


def role_key(authkey: bytes, role: str, address: str) -> bytes:
    """Return the key under which `role` ("daemon" or "client") proves itself at `address`."""
    return hmac.digest(authkey, f"harness-ipc/1 {role} {address}".encode("utf-8", "surrogateescape"), "sha256")


class ClientHandshake:
    """The client's side. Send `output`, and give each frame that comes to `receive_frame`, until `may_send` is true.

    The first request can be sent then, after `output`. The daemon's verdict is the frame before the first reply:
    `receive_verdict`.
    """

    __slots__ = ("_keys", "_nonce", "may_send", "output")

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        # None once the daemon has proved itself.
        self._nonce: bytes | None = _PREFIX + os.urandom(_NONCE)
        # Frames to send, in order; the caller empties it.
        self.output = [CHALLENGE + self._nonce]
        self.may_send = False

    def receive_frame(self, frame: bytes) -> None:
        """Process the daemon's next frame. Raises `AuthenticationFailed`; send `output` also then."""
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
    """Process the daemon's verdict on our proof. Raises `AuthenticationFailed`."""
    if frame != WELCOME:
        raise AuthenticationFailed("the daemon refused our key: it may be of another generation; try again")


class ServerHandshake:
    """The daemon's side. Give each frame that comes to `receive_frame` and send `output`, until `done` is true.

    The last output is the verdict, which may travel with the first reply.
    """

    __slots__ = ("_expect", "_keys", "_nonce", "done", "output")

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._nonce = b""
        self._expect = "challenge"
        self.output: list[bytes] = []
        self.done = False

    def receive_frame(self, frame: bytes) -> None:
        """Process the client's next frame. Raises `AuthenticationFailed`; send `output` also then."""
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
    """Return the answer to a challenge, in the form that it asks for. Raises `AuthenticationFailed`."""
    nonce = challenge.removeprefix(CHALLENGE)
    if len(nonce) == len(challenge) or len(nonce) < _LEGACY_NONCE:
        raise AuthenticationFailed("the peer does not speak this protocol")
    if len(nonce) == _LEGACY_NONCE:
        return _mac(key, nonce, "md5")
    name = nonce[1 : nonce.find(b"}")] if nonce.startswith(b"{") else b""
    if name not in _DIGESTS:
        raise AuthenticationFailed("the peer asks for a digest that this protocol does not have")
    return b"{%s}" % name + _mac(key, nonce, name.decode())


def _is_answer(answer: bytes, nonce: bytes, key: bytes) -> bool:
    """Return whether `answer` is what a holder of `key` answers to our `nonce`."""
    if len(answer) == _LEGACY_ANSWER:
        return hmac.compare_digest(answer, _mac(key, nonce, "md5"))
    return hmac.compare_digest(answer, _PREFIX + _mac(key, nonce, "sha256"))


def _mac(key: bytes, text: bytes, digest: str) -> bytes:
    try:
        return hmac.digest(key, text, digest)
    except ValueError:
        raise AuthenticationFailed(
            "this Python's OpenSSL refuses HMAC-MD5, the only digest of CPython 3.11 (FIPS): use 3.12 or later on both sides"
        ) from None
