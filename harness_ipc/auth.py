"""The handshake over a connection: sends and receives what `_protocol.handshake` decides. It knows neither records nor JSON."""

from __future__ import annotations

from ._protocol.handshake import MAX_FRAME, ClientHandshake, Keys, ServerHandshake, receive_verdict, role_key
from .errors import AuthenticationFailed, HarnessIPCError, MessageTooLarge
from .transport import lost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .transport import Connection

    Handshake = ClientHandshake | ServerHandshake

__all__ = ["Keys", "challenge_client", "challenge_daemon", "confirm", "finish", "receive_now", "role_key"]


def challenge_daemon(connection: Connection, keys: Keys) -> None:
    """Prove each side to the other, as the client, before `connection.deadline`.

    The daemon has proved itself when this returns. Our own proof is held, to be sent together with the next frame. The first
    frame that the daemon sends after it is its verdict: see `confirm`.

    Raises `AuthenticationFailed`, `ConnectionLost` or `DaemonTimeout`; the connection can only be closed then.
    """
    handshake = ClientHandshake(keys)
    try:
        connection.send_bytes(handshake.output.pop())
    except (HarnessIPCError, OSError) as error:
        raise _typed(error) from error
    while not handshake.may_send:
        _feed(connection, handshake, _receive(connection))


def confirm(connection: Connection) -> None:
    """Receive the daemon's verdict on our proof. Raises as `challenge_daemon` does."""
    receive_verdict(_receive(connection))


def challenge_client(connection: Connection, keys: Keys) -> None:
    """Prove each side to the other, as the daemon, before `connection.deadline`.

    Our verdict is held, to be sent together with the next frame. Raises as `challenge_daemon` does.
    """
    finish(connection, ServerHandshake(keys))


def finish(connection: Connection, handshake: ServerHandshake) -> None:
    """Do what is left of `handshake`, as `challenge_client` does."""
    while not handshake.done:
        _feed(connection, handshake, _receive(connection))


def receive_now(connection: Connection, handshake: ServerHandshake) -> bool:
    """Do what is left of `handshake` as far as that goes without waiting, and return whether it is done."""
    while not handshake.done:
        frame = connection.receive_now(MAX_FRAME)
        if frame is None:
            return False
        _feed(connection, handshake, frame)
    return True


def _receive(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes(MAX_FRAME)
    except (HarnessIPCError, EOFError, OSError) as error:
        raise _typed(error) from error


def _feed(connection: Connection, handshake: Handshake, frame: bytes) -> None:
    try:
        handshake.receive_frame(frame)
    except AuthenticationFailed:
        _hold_output(connection, handshake)
        # The peer is told that it was refused, if it still listens.
        connection.try_flush()
        raise
    _hold_output(connection, handshake)
    if isinstance(handshake, ServerHandshake) and not handshake.done:
        # The client waits for it.
        connection.try_flush()


def _hold_output(connection: Connection, handshake: Handshake) -> None:
    # Frames that follow each other travel together: 4 context switches before the first reply instead of 8.
    for frame in handshake.output:
        connection.hold(frame)
    handshake.output.clear()


def _typed(error: Exception) -> HarnessIPCError:
    if isinstance(error, MessageTooLarge):
        return AuthenticationFailed("the peer does not speak this protocol")
    return error if isinstance(error, HarnessIPCError) else lost(error)
