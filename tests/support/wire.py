"""Frames over a bare connection, for clients that behave unlike `Client`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from harness_ipc import _transport
from harness_ipc._protocol.handshake import MAX_FRAME, ClientHandshake, Keys, receive_verdict
from harness_ipc._registry import records
from harness_ipc._transport import deadline_after
from harness_ipc.errors import AuthenticationFailed, HarnessIPCError

if TYPE_CHECKING:
    from typing import Self

# Seconds: far above the time of any operation on a loaded machine.
PATIENCE = 60.0


class FrameConnection:
    """A client's end of a connection, with one deadline. Raises the errors of `_transport`."""

    def __init__(self, address: str, timeout: float = PATIENCE) -> None:
        self.connection = _transport.connect(address, deadline_after(timeout))
        self.connection.deadline = deadline_after(timeout)
        self.framing = _transport.Framing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()

    def fileno(self) -> int:
        """Return the descriptor, or the handle of a pipe."""
        return self.connection.fileno()

    def send_bytes(self, frame: bytes) -> None:
        """Send a frame. The name is that used by the standard library's challenge functions."""
        self.send_all([frame])

    def send_all(self, frames: list[bytes]) -> None:
        """Send frames together."""
        self.connection.send(self.framing.encode(frames))

    def recv_bytes(self, limit: int = 64 * 2**20) -> bytes:
        """Return the next frame."""
        while (frame := self.framing.next_frame(limit)) is None:
            self.framing.feed(self.connection.receive(limit))
        return frame

    def is_readable(self) -> bool:
        return self.framing.buffered > 0 or self.connection.is_readable()

    def prove(self, keys: Keys) -> None:
        """Do the handshake up to the daemon's verdict, which `confirm` receives. Raises `AuthenticationFailed`."""
        self.send_all(self.check_daemon(keys))

    def check_daemon(self, keys: Keys) -> list[bytes]:
        """Do the handshake up to the client's proof, and return its frames without sending them."""
        handshake = ClientHandshake(keys)
        self.send_bytes(handshake.output.pop())
        while not handshake.may_send:
            try:
                handshake.receive_frame(self.recv_bytes(MAX_FRAME))
            except AuthenticationFailed:
                with contextlib.suppress(HarnessIPCError):
                    self.send_all(handshake.output)
                raise
        return handshake.output

    def confirm(self) -> None:
        """Receive the daemon's verdict. Raises `AuthenticationFailed`."""
        receive_verdict(self.recv_bytes(MAX_FRAME))


def dial_daemon(name: str) -> FrameConnection:
    """Return an authenticated connection to the daemon `name`."""
    record = records.load(name)
    connection = FrameConnection(record.address)
    try:
        connection.prove(Keys(record.authkey, record.address))
        connection.confirm()
    except BaseException:
        connection.close()
        raise
    return connection
