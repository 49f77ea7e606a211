"""One request and its replies: which generation is asked, what follows a goodbye, and whether the request may have run.

It does no I/O of its own. `IO` is blocking for `client` and an event loop's for `_aclient`: the coroutines of a blocking one
never wait, so `client` runs them to their end without a loop.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial

from ._calls import error_of_channel
from ._pool import Link, start_daemon
from ._protocol import messages
from ._protocol.handshake import Keys
from ._protocol.session import GOODBYE, STREAMING, VERDICT, ClientProtocol
from ._transport import Framing, deadline_after, remaining
from .errors import (
    AuthenticationFailed,
    Busy,
    ClientClosed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    MessageTooLarge,
    ProtocolError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, TypeVar

    from ._calls import ErrorClasses
    from ._pool import Pool
    from ._protocol.messages import Message
    from ._registry.records import Record
    from ._transport import Connection

    T = TypeVar("T")

    class IO(Protocol):
        """What a driver does for an exchange. Errors are those of `_transport`."""

        async def connect(self, address: str, deadline: float) -> Connection: ...
        async def send(self, connection: Connection, chunks: list[bytes]) -> None: ...
        async def receive(self, connection: Connection, limit: int) -> bytes: ...
        async def run(self, function: Callable[[], T]) -> T:
            """Run a blocking function."""

        def check(self, record: Record) -> None:
            """Raise `RuntimeError` if waiting for this daemon here would never end."""


# Starts of a daemon for one request: each may be followed by the end of that daemon.
_MAX_STARTS = 3
_CONNECT, _ANSWER = "accept a connection", "answer"


def _describe(message: Message) -> str:
    operation = str(message.get("method") or message.get("meta") or "a request")
    return f"answer {operation[:50]!a}"


class _NotRun(Exception):
    """What was sent to this generation has not run and will not run: it has said goodbye, or `failure` says what happened."""

    def __init__(self, failure: HarnessIPCError | None = None) -> None:
        self.failure = failure


class Exchange:
    """One request and its replies; without a message, just the opening of a connection.

    `deadline` is a monotonic time; it may be moved between two replies. Call `close` at the end, also after an error.
    """

    __slots__ = (
        *("_awaited", "_begin", "_cancelled", "_frame", "_io", "_left", "_link", "_message", "_pool", "_sent"),
        *("_state", "deadline"),
    )

    def __init__(self, pool: Pool, io: IO, message: Message | None, deadline: float) -> None:
        self._begin = time.monotonic()
        # First: it may take long, and the daemon does not wait long for our proof, which goes out with it.
        self._frame = None if message is None else messages.encode(message)
        self.deadline = deadline
        self._pool = pool
        self._io = io
        self._state = pool.state
        self._link: Link | None = None
        self._cancelled = False
        # Whether the request is on its way on `_link`, and the generations that did not run theirs.
        self._sent = False
        self._left: set[str] = set()
        # For the text of a timeout: the request, and what the daemon is waited for instead of its reply.
        self._message = message
        self._awaited: str | None = _ANSWER if message is not None else _CONNECT

    @property
    def is_streaming(self) -> bool:
        """Whether the last reply was an item, and another reply follows."""
        return self._link is not None and self._link.protocol.state == STREAMING

    @property
    def error_classes(self) -> ErrorClasses:
        """The classes for the errors of the daemon's handler."""
        return self._pool.error_classes

    def cancel(self) -> None:
        """End the exchange at once, from any thread. What was sent may still run in the daemon."""
        if self._state.pid == os.getpid():
            with self._state.guard:
                self._cancelled = True
                if self._link is not None:
                    self._link.connection.abort()

    def close(self) -> None:
        """Give the connection back, or close it if the final reply has not come. Closing twice is no error."""
        if self._state.pid == os.getpid():
            self._release()
        # A forked child's copy closes itself, and its copy of the guard may be held for ever.
        self._link = None

    def _release(self) -> None:
        with self._state.guard:
            link, self._link = self._link, None
            if link is not None:
                if self._cancelled:  # perhaps after its reply had come
                    link.protocol.close()
                self._pool.check_in(self._state, link)

    async def only_reply(self) -> Message:
        """Return the reply to a request that asks for one. Raises what `reply` does."""
        reply = await self.reply()
        if self.is_streaming:
            self.close()
            raise ProtocolError("the daemon sent an item of a stream in place of a reply", maybe_executed=True)
        return reply

    async def reply(self) -> Message:
        """Return the next reply; the first time, send the request. The connection is given back after the final one.

        Raises `DaemonTimeout`, `ConnectionLost`, `Busy`, `ClientClosed`, `AuthenticationFailed`, `DaemonNotRunning` and so on,
        with `maybe_executed` set.
        """
        if self._link is None:
            begin, self._state = self._begin, self._pool.own_state()
        else:
            begin = time.monotonic()
        has_more = False
        try:
            remaining(self.deadline)
            reply = await (self._receive(self._link) if self._link is not None else self._ask_until_answered())
            assert self._link is not None
            if "error" in reply and (failure := error_of_channel(reply, self._pool.name)) is not None:
                # The daemon ends the connection after it.
                self._link.protocol.close()
                raise failure
            has_more = self._link.protocol.state == STREAMING
            return reply
        except HarnessIPCError as error:
            self._complete(error, begin)
            raise
        finally:
            # Only a link that waits for nothing is kept: a late reply must not be taken for the next request's.
            if not has_more:
                self.close()

    def _complete(self, error: HarnessIPCError, begin: float) -> None:
        """Set what `error` says of the request. Raises `ClientClosed` in place of a connection that we closed ourselves."""
        # A refused proof, or a refused request, has not run.
        error.maybe_executed = self._may_have_run() and not isinstance(error, (AuthenticationFailed, Busy))
        if isinstance(error, ConnectionLost):
            self._check(maybe_executed=error.maybe_executed)
        if isinstance(error, DaemonTimeout) and self._awaited is not None:
            waited = f"timed out after {round(time.monotonic() - begin, 1):g} s waiting for the daemon {self._pool.name!r}"
            awaited = _describe(self._message) if self._awaited is _ANSWER and self._message else self._awaited
            error.args = (f"{waited} to {awaited}: allow a longer timeout, or see its status",)

    def _may_have_run(self) -> bool:
        return self._sent and self._link is not None and self._link.connection.all_sent

    def _check(self, *, maybe_executed: bool = False) -> None:
        """Raise `ClientClosed` if the client is closed or the exchange cancelled."""
        if self._state.closed:
            raise ClientClosed("this client is closed: connect again", maybe_executed=maybe_executed)
        if self._cancelled:
            raise ClientClosed("the request was cancelled", maybe_executed=maybe_executed)

    async def _ask_until_answered(self) -> Message:
        """Send the request to one generation after another, for as long as it does not run, and return the first reply."""
        failure: HarnessIPCError | None = None
        while True:
            link = None if self._frame is None else self._pool.take_idle(self._state, self._left)
            if link is None:
                link = await self._open(failure)
            else:
                self._hold(link)
                self._io.check(link.record)
            try:
                return await self._ask(link)
            except _NotRun as error:
                failure = error.failure
                self._left.add(link.record.generation)
                self._sent = False
                self._release()

    def _hold(self, link: Link) -> None:
        with self._state.guard:
            self._link = link
            self._state.open.add(link)
            self._check()

    async def _open(self, reason: HarnessIPCError | None) -> Link:
        """Connect to a generation that was not asked: the one of the record, its successor, or one that is started.

        The daemon has proved itself then. Before that nothing that fails has run. `reason` is why the last one that was asked
        did not run the request, unless it has said goodbye.
        """
        self._check()
        pool = self._pool
        again, starts, failed = bool(self._left), 0, None
        failure: HarnessIPCError | None = None
        while True:
            try:
                record = pool.load(again=again)
                if failure is not None and record.generation == failed:
                    raise failure
                if record.generation in self._left:
                    raise reason or DaemonNotRunning(f"the daemon {pool.name!r} is stopping: start it again")
            except (DaemonNotRunning, ConnectionLost):
                if pool.start is None or starts == _MAX_STARTS:
                    raise
                starts += 1
                await self._start()
                again, failure = True, None
                continue
            try:
                return await self._connect(record)
            except (DaemonNotRunning, ConnectionLost) as error:
                self._check()
                self._release()
                again, failed, failure = True, record.generation, error

    async def _start(self) -> None:
        self._awaited = None
        self.deadline = await self._io.run(partial(start_daemon, self._pool, self.deadline))
        self._check()

    async def _connect(self, record: Record) -> Link:
        io, pool = self._io, self._pool
        io.check(record)
        self._awaited = _CONNECT
        deadline = min(self.deadline, deadline_after(pool.connect_timeout))
        # Before the daemon is woken, which then waits for what they are for.
        protocol = ClientProtocol(Keys(record.authkey, record.address), Framing(), pool.max_message)
        link = Link(await io.connect(record.address, deadline), protocol, record)
        pool.record = record
        self._hold(link)
        link.connection.deadline = deadline
        try:
            while protocol.next_event() is None:
                # A daemon of the standard library waits for our word on its answer before it sends its own challenge.
                await io.send(link.connection, protocol.data_to_send())
                protocol.receive_data(await io.receive(link.connection, protocol.frame_limit))
        except MessageTooLarge:
            raise AuthenticationFailed("the peer does not speak this protocol") from None
        except AuthenticationFailed:
            # The peer is told that it was refused, if it still listens.
            with contextlib.suppress(HarnessIPCError):
                await io.send(link.connection, protocol.data_to_send())
            raise
        # A client that was closed meanwhile sends nothing more.
        self._check()
        return link

    async def _ask(self, link: Link) -> Message:
        connection, protocol = link.connection, link.protocol
        if self._frame is not None:
            # Not earlier: what the daemon's limit is was not known before.
            messages.check_size(len(self._frame), min(self._pool.max_message, link.record.max_message))
            protocol.send_request(self._frame)
            connection.deadline = self.deadline
            self._awaited = _ANSWER
        connection.all_sent = False
        self._sent = self._frame is not None
        try:
            if not connection.send_now(protocol.data_to_send()):
                await self._io.send(connection, [])
        except ConnectionLost as error:
            # The daemon may have said goodbye before it closed the connection.
            try:
                return await self._receive(link)
            except ConnectionLost:
                self._check()
                if self._may_have_run():
                    raise error from None
                raise _NotRun(error) from None
        return await self._receive(link)

    async def _receive(self, link: Link) -> Message:
        if self._frame is not None:
            link.connection.deadline = self.deadline
        protocol = link.protocol
        had_item = protocol.state == STREAMING
        event = protocol.next_event() if protocol.buffered else None
        while event is None or event == VERDICT:
            if event is None:
                protocol.receive_data(await self._io.receive(link.connection, protocol.frame_limit))
            elif self._frame is None:
                return {}
            event = protocol.next_event()
        if event == GOODBYE:
            if had_item:
                raise ConnectionLost("the daemon stopped in the middle of a stream")
            raise _NotRun
        assert isinstance(event, dict)
        return event
