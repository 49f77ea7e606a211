"""Both sides of a connection as state machines: bytes in, events and bytes out. No I/O, clock or thread.

    ServerProtocol   HELLO -> ANSWERED -> IDLE -> ACTIVE [-> CANCELLING] -> REPLYING -> IDLE ...
    ClientProtocol   HELLO -> ANSWERED -> IDLE -> AWAITING [-> STREAMING] -> IDLE ...;  ANSWERED -> PROVING -> AWAITING

LEAVING: the connection is closed once all data is sent. GONE: the daemon said goodbye. Received data that is not yet processed
and data to send are not part of the state.
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

# Events other than messages.
PROVED = "PROVED"  # server: the client is authenticated
READY = "READY"  # client: the daemon is authenticated, a request may be sent
VERDICT = "VERDICT"  # client, if no request was sent with the proof: the daemon accepted the proof
GOODBYE = "GOODBYE"  # client: unanswered requests have not run and will not run

# Bytes of further requests that are read while one is in flight: EOF is detected only after them.
MAX_READ_AHEAD = 64 * 1024

SERVER_TRANSITIONS = {
    (HELLO, "answer"): ANSWERED,
    (ANSWERED, "proof"): IDLE,
    (IDLE, "request"): ACTIVE,
    (ACTIVE, "cancel"): CANCELLING,
    (ACTIVE, "reply"): REPLYING,
    (CANCELLING, "reply"): REPLYING,
    (REPLYING, "reply taken"): IDLE,
    # The client sends no request before the answer, so it needs no goodbye.
    (HELLO, "leave"): CLOSED,
    (ANSWERED, "leave"): LEAVING,
    (IDLE, "leave"): LEAVING,
    (LEAVING, "leave"): LEAVING,
    # The request was received but not started.
    (ACTIVE, "leave"): LEAVING,
    (IDLE, "fail"): LEAVING,
    **{(state, "close"): CLOSED for state in (HELLO, ANSWERED, IDLE, ACTIVE, CANCELLING, REPLYING, LEAVING, CLOSED)},
}

CLIENT_TRANSITIONS = {
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
    """The part common to both sides: received data, data to send, and the state."""

    __slots__ = ("_frames", "_max_message", "_output", "state")

    _states: dict[tuple[str, str], str]
    # Raised for an event that the state does not allow: by a client because of its peer, by a server because of its caller.
    _misuse: type[Exception]

    def __init__(self, framing: Framing, max_message: int, output: list[bytes]) -> None:
        self.state = HELLO
        self._frames = framing
        self._max_message = max_message
        # Frames to send; shared with the handshake.
        self._output = output

    def receive_data(self, data: bytes) -> None:
        """Add received data: any part of a stream, or one message of a pipe."""
        self._frames.feed(data)

    @property
    def buffered(self) -> int:
        """The number of received bytes that are not yet part of an event."""
        return self._frames.buffered

    def data_to_send(self) -> list[bytes]:
        """Return the chunks to write, in order, and clear them. On a pipe, each is one message."""
        chunks = self._frames.encode(self._output)
        self._output.clear()
        return chunks

    def close(self) -> None:
        """Close: the connection has ended, or must end at once."""
        self._move("close")
        self._frames.clear()

    def _move(self, event: str) -> None:
        try:
            self.state = self._states[self.state, event]
        except KeyError:
            raise self._misuse(f"unexpected {event} in the state {self.state}") from None


class ServerProtocol(_Protocol):
    """The daemon's side of one connection.

    Pass received data to `receive_data`, process the events of `next_event` until it returns None, and send
    `data_to_send()`. If `next_event` raises, send `data_to_send()`, which may say why, and close the connection.
    """

    __slots__ = ("_handshake",)

    _states = SERVER_TRANSITIONS
    _misuse = RuntimeError

    def __init__(self, keys: Keys, framing: Framing, max_message: int) -> None:
        self._handshake = ServerHandshake(keys)
        super().__init__(framing, max_message, self._handshake.output)

    def receive_data(self, data: bytes) -> None:
        """Add received data. After a goodbye it is discarded."""
        if self.state not in (LEAVING, CLOSED):
            self._frames.feed(data)

    @property
    def max_frame(self) -> int:
        """The limit of the next frame in bytes."""
        return MAX_FRAME if self.state in (HELLO, ANSWERED) else self._max_message

    def next_event(self) -> str | Message | ProtocolError | None:
        """Return the next event, or None until more data arrives or the request in flight is answered.

        An event is `PROVED`, a request, or a `ProtocolError`: an invalid request, to be answered like a valid one.

        Raises `AuthenticationFailed`, and `MessageTooLarge` or `ProtocolError` for a frame that can't be skipped.
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
            # The verdict stays in `_output`, to be sent with the first reply.
            self._move("proof")
        elif self.state == HELLO:
            self._move("answer")

    def send_item(self, frame: bytes) -> None:
        """Send a reply that is not the final one."""
        self._output.append(frame)

    def send_reply(self, frame: bytes) -> None:
        """Send the final reply to the request in flight. Call `reply_taken` when the system has accepted all of it."""
        self._move("reply")
        self._output.append(frame)

    def reply_taken(self) -> None:
        """Record that the final reply is sent: the next request may be processed."""
        self._move("reply taken")

    def cancel(self) -> None:
        """Record that the request in flight was cancelled; it is still answered."""
        self._move("cancel")

    def fail(self, error: Exception) -> None:
        """End the connection between two requests, and send the client the reason: its next request can't be read."""
        self._move("fail")
        self._frames.clear()
        self._output.append(messages.encode(messages.not_executed(error)))

    def leave(self) -> None:
        """End the connection with a goodbye, which replaces the verdict if that has not been sent.

        Received data is discarded. No request may be running.
        """
        self._move("leave")
        self._frames.clear()
        self._output[:] = [messages.GOODBYE_FRAME] if self.state == LEAVING else []


class ClientProtocol(_Protocol):
    """The client's side of one connection, used like `ServerProtocol`. It starts with data to send."""

    __slots__ = ("_handshake",)

    _states = CLIENT_TRANSITIONS
    _misuse = ProtocolError

    def __init__(self, keys: Keys, framing: Framing, max_message: int) -> None:
        self._handshake: ClientHandshake | None = ClientHandshake(keys)
        super().__init__(framing, max_message, self._handshake.output)

    @property
    def frame_limit(self) -> int:
        """The limit of the next frame in bytes."""
        return MAX_FRAME if self.state == HELLO else self._max_message

    def next_event(self) -> str | Message | None:
        """Return the next event, or None until more data arrives.

        An event is `READY`, `VERDICT`, `GOODBYE` or a reply, which is an item if the new state is STREAMING, and final if it
        is IDLE.

        Raises `AuthenticationFailed`, and `MessageTooLarge` or `ProtocolError` for an invalid reply. Close the connection then.
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
        """Send a request: after `READY`, together with the proof, or after the final reply to the previous request."""
        self._move("request")
        self._output.append(frame)
