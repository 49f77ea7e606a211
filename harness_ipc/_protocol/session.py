"""A connection's two sides as tables of states: frames in, events and frames out. No I/O, no clock, no thread.

    ServerProtocol   HELLO -> ANSWERED -> IDLE -> ACTIVE [-> CANCELLING] -> REPLYING -> IDLE ...
    ClientProtocol   HELLO -> ANSWERED -> IDLE -> AWAITING [-> STREAMING] -> IDLE ...;  ANSWERED -> PROVING -> AWAITING

A side that ends a connection in order passes through LEAVING: it has something to send first. GONE: the daemon said goodbye.
What has been received ahead and what is not yet sent belong to the connection, not to its state.
"""

from __future__ import annotations

from ..errors import AuthenticationFailed, MessageTooLarge, ProtocolError
from . import messages
from .handshake import MAX_FRAME, ClientHandshake, Keys, ServerHandshake, receive_verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .framing import Framing
    from .messages import Message

HELLO, ANSWERED, IDLE, LEAVING, CLOSED = "HELLO", "ANSWERED", "IDLE", "LEAVING", "CLOSED"
ACTIVE, CANCELLING, REPLYING = "ACTIVE", "CANCELLING", "REPLYING"
PROVING, AWAITING, STREAMING, GONE = "PROVING", "AWAITING", "STREAMING", "GONE"

# Events that are no message.
PROVED = "PROVED"  # the server's: the client has proved itself
READY = "READY"  # the client's: the daemon has proved itself, a request may be sent
VERDICT = "VERDICT"  # the client's, if it has sent no request with its proof: the daemon accepts that
GOODBYE = "GOODBYE"  # the client's: what the daemon has not answered has not run and will not run

# Bytes of further requests that are read while one is in flight: the end of the connection shows only behind them.
MAX_READ_AHEAD = 64 * 1024

_SERVER_STATES = {
    (HELLO, "answer"): ANSWERED,
    (ANSWERED, "proof"): IDLE,
    (IDLE, "request"): ACTIVE,
    (ACTIVE, "cancel"): CANCELLING,
    (ACTIVE, "reply"): REPLYING,
    (CANCELLING, "reply"): REPLYING,
    (REPLYING, "reply taken"): IDLE,
    # No request can have been sent before our answer: no goodbye is needed.
    (HELLO, "leave"): CLOSED,
    (ANSWERED, "leave"): LEAVING,
    (IDLE, "leave"): LEAVING,
    (LEAVING, "leave"): LEAVING,
    # A request that came too late: it has not been started.
    (ACTIVE, "leave"): LEAVING,
    (IDLE, "fail"): LEAVING,
    **{(state, "close"): CLOSED for state in (HELLO, ANSWERED, IDLE, ACTIVE, CANCELLING, REPLYING, LEAVING, CLOSED)},
}

_CLIENT_STATES = {
    (HELLO, "answer"): ANSWERED,
    (ANSWERED, "verdict"): IDLE,
    (ANSWERED, "request"): PROVING,
    (PROVING, "verdict"): AWAITING,
    (IDLE, "request"): AWAITING,
    (AWAITING, "item"): STREAMING,
    (STREAMING, "item"): STREAMING,
    (AWAITING, "reply"): IDLE,
    (STREAMING, "reply"): IDLE,
    **{(state, "goodbye"): GONE for state in (ANSWERED, PROVING, IDLE, AWAITING, STREAMING)},
    **{(state, "close"): CLOSED for state in (HELLO, ANSWERED, PROVING, IDLE, AWAITING, STREAMING, GONE, CLOSED)},
}


class _Protocol:
    """What both sides have: received data, data to send, and the state."""

    __slots__ = ("_frames", "_max_message", "_output", "state")

    _states: dict[tuple[str, str], str]
    _misuse: type[Exception]

    def __init__(self, framing: Framing, max_message: int, output: list[bytes]) -> None:
        self.state = HELLO
        self._frames = framing
        self._max_message = max_message
        # Frames to send: the handshake's list.
        self._output = output

    def receive_data(self, data: bytes) -> None:
        """Add what arrived: any bytes of a stream, or one message of a pipe."""
        self._frames.feed(data)

    @property
    def buffered(self) -> int:
        """Bytes that arrived and are not yet part of an event: of a client without a request, a reason to close."""
        return self._frames.buffered

    def data_to_send(self) -> list[bytes]:
        """Return the chunks to write, in order, and forget them. In a pipe each is a message of its own."""
        chunks = self._frames.encode(self._output)
        self._output.clear()
        return chunks

    def close(self) -> None:
        """The connection has ended, or must end at once."""
        self._move("close")
        self._frames.clear()

    def _move(self, event: str) -> None:
        try:
            self.state = self._states[self.state, event]
        except KeyError:
            raise self._misuse(f"unexpected {event} in the state {self.state}") from None


class ServerProtocol(_Protocol):
    """The daemon's side of one connection.

    Give it what arrives (`receive_data`), take events (`next_event`) until there is none, send `data_to_send()`. An error that
    `next_event` raises ends the connection: send what there is to send, which says why, and close.
    """

    __slots__ = ("_handshake",)

    _states = _SERVER_STATES
    _misuse = RuntimeError

    def __init__(self, keys: Keys, framing: Framing, max_message: int) -> None:
        self._handshake = ServerHandshake(keys)
        super().__init__(framing, max_message, self._handshake.output)

    def receive_data(self, data: bytes) -> None:
        """Add what arrived. What comes after a goodbye is dropped."""
        if self.state not in (LEAVING, CLOSED):
            self._frames.feed(data)

    @property
    def max_frame(self) -> int:
        """Bytes that the next frame may have."""
        return MAX_FRAME if self.state in (HELLO, ANSWERED) else self._max_message

    def next_event(self) -> str | Message | ProtocolError | None:
        """Return the next event, or None: more has to arrive, or the request in flight has to be answered first.

        `PROVED`; a request; or a `ProtocolError`, in place of a request that can't be read, to be answered like one.

        Raises `AuthenticationFailed`; `MessageTooLarge` or `ProtocolError` for a frame that can't be skipped.
        """
        while self.state in (HELLO, ANSWERED):
            try:
                frame = self._frames.next_frame(MAX_FRAME)
            except (MessageTooLarge, ProtocolError):
                self._move("close")
                raise AuthenticationFailed("the peer does not speak this protocol") from None
            if frame is None:
                return None
            self._receive_handshake(frame)
            if self._handshake.done:
                return PROVED
        if self.state != IDLE:
            return None
        try:
            frame = self._frames.next_frame(self._max_message)
        except (MessageTooLarge, ProtocolError) as error:
            self.fail(error)
            raise
        if frame is None:
            return None
        self._move("request")
        try:
            return messages.decode(frame)
        except ProtocolError as error:
            return error

    def _receive_handshake(self, frame: bytes) -> None:
        try:
            self._handshake.receive_frame(frame)
        except AuthenticationFailed:
            self._move("close")
            raise
        if self._handshake.done:
            # The verdict stays in `_output`: it travels with the first reply.
            self._move("proof")
        elif self.state == HELLO:
            self._move("answer")

    def send_item(self, frame: bytes) -> None:
        """Send one of the replies that come before the final one."""
        self._output.append(frame)

    def send_reply(self, frame: bytes) -> None:
        """Send the final reply to the request in flight. Call `reply_taken` when the system has taken all of it."""
        self._move("reply")
        self._output.append(frame)

    def reply_taken(self) -> None:
        """Go on to the next request."""
        self._move("reply taken")

    def cancel(self) -> None:
        """The request in flight was cancelled; it is still answered."""
        self._move("cancel")

    def fail(self, error: Exception) -> None:
        """End the connection, between two requests, by telling the client why its next one can't be read."""
        self._move("fail")
        self._frames.clear()
        self._output.append(messages.encode(messages.not_executed(error)))

    def leave(self) -> None:
        """End the connection by a goodbye, in place of the verdict if that has not been sent.

        What has arrived is dropped: it has not run, and no request of it may have been started.
        """
        self._move("leave")
        self._frames.clear()
        self._output[:] = [messages.GOODBYE_FRAME] if self.state == LEAVING else []


class ClientProtocol(_Protocol):
    """The client's side of one connection, used as `ServerProtocol` is. It begins with something to send."""

    __slots__ = ("_handshake",)

    _states = _CLIENT_STATES
    _misuse = ProtocolError

    def __init__(self, keys: Keys, framing: Framing, max_message: int) -> None:
        self._handshake: ClientHandshake | None = ClientHandshake(keys)
        super().__init__(framing, max_message, self._handshake.output)

    @property
    def frame_limit(self) -> int:
        """Bytes of the longest frame that may come next."""
        return MAX_FRAME if self.state == HELLO else self._max_message

    def next_event(self) -> str | Message | None:
        """Return the next event, or None until more has arrived.

        `READY`, `VERDICT`, `GOODBYE`, or a reply: an item if the state is STREAMING then, the final one if it is IDLE.

        Raises `AuthenticationFailed`; `MessageTooLarge` or `ProtocolError` for a reply that can't be read. The connection can
        only be closed then.
        """
        if self.state == HELLO:
            return self._receive_handshake()
        frame = self._frames.next_frame(self._max_message)
        if frame is None:
            return None
        if frame == messages.GOODBYE_FRAME:
            self._move("goodbye")
            return GOODBYE
        if self.state in (ANSWERED, PROVING):
            receive_verdict(frame)
            self._move("verdict")
            return VERDICT if self.state == IDLE else self.next_event()
        reply = messages.decode(frame)
        self._move("item" if reply.get("continues") is True else "reply")
        return reply

    def _receive_handshake(self) -> str | None:
        assert self._handshake is not None
        while not self._handshake.may_send:
            try:
                frame = self._frames.next_frame(MAX_FRAME)
            except (MessageTooLarge, ProtocolError):
                raise AuthenticationFailed("the peer does not speak this protocol") from None
            if frame is None:
                return None
            self._handshake.receive_frame(frame)
        self._handshake = None
        self._move("answer")
        return READY

    def send_request(self, frame: bytes) -> None:
        """Send a request: after `READY`, then together with our proof, or when the last one's final reply has come."""
        self._move("request")
        self._output.append(frame)
