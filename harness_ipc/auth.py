"""The mutual challenge: each side proves to the other that it has the generation's key. It knows neither records nor JSON.

The proof is the standard library's `deliver_challenge` and `answer_challenge`, each direction under a key of its own. Under
one key for both, a process without it that holds the address could hand one client's challenge to another and pass the
answer on as the daemon's; and the address in the key makes an answer worthless at any other address. The client is
the first to challenge: it tells nothing before it knows the daemon.
"""

from __future__ import annotations

import hmac
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge

from .errors import AuthenticationFailed, HarnessIPCError, MessageTooLarge
from .transport import lost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .transport import Connection


def role_key(authkey: bytes, role: str, address: str) -> bytes:
    """Return the key under which `role` ("daemon" or "client") proves itself at `address`."""
    return hmac.digest(authkey, f"harness-ipc/1 {role} {address}".encode("utf-8", "surrogateescape"), "sha256")


def challenge_daemon(connection: Connection, authkey: bytes, address: str) -> None:
    """Do the client's part before `connection.deadline`.

    Raises `AuthenticationFailed`, `ConnectionLost` or `DaemonTimeout`; the connection can only be closed then.
    """
    _prove(deliver_challenge, connection, role_key(authkey, "daemon", address))
    _prove(answer_challenge, connection, role_key(authkey, "client", address))


def challenge_client(connection: Connection, authkey: bytes, address: str) -> None:
    """Do the daemon's part before `connection.deadline`. Raises as `challenge_daemon` does."""
    _prove(answer_challenge, connection, role_key(authkey, "daemon", address))
    _prove(deliver_challenge, connection, role_key(authkey, "client", address))


def _prove(step: Callable[[Connection, bytes], None], connection: Connection, key: bytes) -> None:
    try:
        step(connection, key)
    except AuthenticationError as error:
        # In our own words: the library's quote what the peer sent.
        raise AuthenticationFailed("the peer has another key, or refused ours") from error
    except (AssertionError, MessageTooLarge) as error:
        # 3.11 asserts that a challenge looks like one.
        raise AuthenticationFailed("the peer does not speak this protocol") from error
    except HarnessIPCError:
        raise
    except ValueError as error:
        raise AuthenticationFailed(
            "this Python's OpenSSL refuses HMAC-MD5, the only digest of CPython 3.11 (FIPS): use 3.12 or later on both sides"
        ) from error
    except (EOFError, OSError) as error:
        raise lost(error) from error
