"""The mutual challenge: each side proves to the other that it has the generation's key. It knows neither records nor JSON.

The proof is the standard library's `deliver_challenge` and `answer_challenge`, each direction under a key of its own. Under
one key for both, a process without it that holds the address could hand one client's challenge to another and pass the
answer on as the daemon's; and the address in the key makes an answer worthless at any other address. The client is
the first to challenge: it tells nothing before it knows the daemon.
"""

from __future__ import annotations

import contextlib
import hmac
from multiprocessing import AuthenticationError

from ._stock import connection as stock
from .errors import AuthenticationFailed, HarnessIPCError, MessageTooLarge
from .transport import lost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from .transport import Connection


class Keys:
    """The two keys of a generation: under `daemon` the daemon proves itself, under `client` its clients."""

    __slots__ = ("client", "daemon")

    def __init__(self, authkey: bytes, address: str) -> None:
        self.daemon = role_key(authkey, "daemon", address)
        self.client = role_key(authkey, "client", address)


def role_key(authkey: bytes, role: str, address: str) -> bytes:
    """Return the key under which `role` ("daemon" or "client") proves itself at `address`."""
    return hmac.digest(authkey, f"harness-ipc/1 {role} {address}".encode("utf-8", "surrogateescape"), "sha256")


def challenge_daemon(connection: Connection, keys: Keys) -> None:
    """Do the client's part before `connection.deadline`.

    When this returns, the daemon has proved itself and our own proof is held, to go out with the next frame that is sent.
    The daemon's verdict on it is the first frame to be received: give that to `confirm`.

    Raises `AuthenticationFailed`, `ConnectionLost` or `DaemonTimeout`; the connection can only be closed then.
    """
    link = _ClientLink(connection)
    try:
        stock.deliver_challenge(link, keys.daemon)  # type: ignore[arg-type]
        stock.answer_challenge(link, keys.client)  # type: ignore[arg-type]
    except _FAILURES as error:
        raise _typed(connection, error) from error


def confirm(connection: Connection) -> None:
    """Receive the daemon's verdict on our proof. Raises as `challenge_daemon` does."""
    try:
        verdict = connection.recv_bytes(MAX_FRAME)
    except _FAILURES as error:
        raise _typed(connection, error) from error
    if verdict != _WELCOME:
        raise AuthenticationFailed("the daemon refused our key: it may be of another generation; try again")


def challenge_client(connection: Connection, keys: Keys) -> None:
    """Do the daemon's part before `connection.deadline`. Raises as `challenge_daemon` does."""
    Examination(connection, keys).finish()


class Examination:
    """The daemon's part, one frame of the client's at a time: an event loop can't wait for the next one."""

    __slots__ = ("_connection", "_steps", "passed")

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._steps = self._examine(keys)
        next(self._steps)
        # The client has proved itself; our verdict is held, to go out with the next frame that is sent.
        self.passed = False

    def finish(self) -> None:
        """Wait for the client's frames until it has passed, before the connection's deadline. Raises as `challenge_daemon`."""
        while not self.passed:
            try:
                frame = self._connection.recv_bytes(MAX_FRAME)
            except _FAILURES as error:
                raise _typed(self._connection, error) from error
            self.take(frame)

    def take(self, frame: bytes) -> None:
        """Take the client's next frame, of up to `MAX_FRAME` bytes. Raises `AuthenticationFailed` or `ConnectionLost`."""
        try:
            self._steps.send(frame)
        except StopIteration:
            self.passed = True
        except _FAILURES as error:
            raise _typed(self._connection, error) from error

    def _examine(self, keys: Keys) -> Generator[None, bytes, None]:
        connection = self._connection
        challenge = yield
        connection.hold(_answer_to(challenge, keys.daemon))
        challenge = _new_challenge(keys.client)
        connection.hold(challenge)
        connection.try_flush()
        if (yield) != _WELCOME:
            raise AuthenticationError
        answer = yield
        if not _is_answer(answer, challenge, keys.client):
            connection.hold(_FAILURE)
            raise AuthenticationError
        connection.hold(_WELCOME)


# The stock functions, one after the other, change turns eight times before a reply, and a turn is a wake-up of the other
# process: most of what a one-shot request costs. The links let frames that follow each other travel together: four turns.
# Both sides still get along with a peer that takes the steps one by one. The stock functions ask no more of a connection than
# send_bytes and recv_bytes, whatever their annotations say.

# What they say (their constants have changed names since 3.11), how long it may be, and the length of 3.11's answer.
_CHALLENGE = b"#CHALLENGE#"
_WELCOME = b"#WELCOME#"
_FAILURE = b"#FAILURE#"
MAX_FRAME = 256
_LEGACY_ANSWER = 16


class _ClientLink:
    """Sends our challenge, holds the rest for the next frame, and leaves the daemon's verdict, its third, to `confirm`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._received = 0

    def send_bytes(self, frame: bytes) -> None:
        if self._received:
            self._connection.hold(frame)
        else:
            self._connection.send_bytes(frame)

    def recv_bytes(self, limit: int) -> bytes:
        self._received += 1
        return self._connection.recv_bytes(limit) if self._received < 3 else _WELCOME


class _Script:
    """What the stock functions take for a connection: gives them the frames that are to be received, and keeps what is sent."""

    def __init__(self, *frames: bytes) -> None:
        self._frames = [*frames]
        self.sent: list[bytes] = []

    def send_bytes(self, frame: bytes) -> None:
        self.sent.append(frame)

    def recv_bytes(self, limit: int) -> bytes:
        if not self._frames:
            raise _EndOfScript
        return self._frames.pop(0)


class _EndOfScript(Exception):
    pass


def _answer_to(challenge: bytes, key: bytes) -> bytes:
    script = _Script(challenge, _WELCOME)
    stock.answer_challenge(script, key)  # type: ignore[arg-type]
    return script.sent[0]


def _new_challenge(key: bytes) -> bytes:
    script = _Script()
    with contextlib.suppress(_EndOfScript):
        stock.deliver_challenge(script, key)  # type: ignore[arg-type]
    return script.sent[0]


def _is_answer(answer: bytes, challenge: bytes, key: bytes) -> bool:
    """Whether `answer` is what a holder of `key` says to our `challenge`: as we would, or as CPython 3.11 does."""
    if len(answer) == _LEGACY_ANSWER:
        return hmac.compare_digest(answer, hmac.digest(key, challenge.removeprefix(_CHALLENGE), "md5"))
    return hmac.compare_digest(answer, _answer_to(challenge, key))


# What the stock functions and a connection raise. 3.11 asserts that a challenge looks like one.
_FAILURES = (AuthenticationError, AssertionError, HarnessIPCError, ValueError, EOFError, OSError)


def _typed(connection: Connection, error: Exception) -> HarnessIPCError:
    if isinstance(error, AuthenticationError):
        # The peer is told that it was refused, if it still listens.
        connection.try_flush()
        # In our own words: the library's quote what the peer sent.
        return AuthenticationFailed("the peer has another key, or refused ours")
    if isinstance(error, (AssertionError, MessageTooLarge)):
        return AuthenticationFailed("the peer does not speak this protocol")
    if isinstance(error, HarnessIPCError):
        return error
    if isinstance(error, ValueError):
        return AuthenticationFailed(
            "this Python's OpenSSL refuses HMAC-MD5, the only digest of CPython 3.11 (FIPS): use 3.12 or later on both sides"
        )
    return lost(error)
