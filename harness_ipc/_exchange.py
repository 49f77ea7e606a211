"""One request and its replies: chooses a generation, retries after a goodbye, tells whether the request may have run.

All waiting is done by an `IO`. With the blocking one the coroutines never suspend: `_pool.run` drives them.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import lru_cache, partial

from ._calls import error_of_channel, result_of
from ._pool import BLOCKING, Link
from ._protocol import messages
from ._protocol.framing import check_size
from ._protocol.handshake import Keys
from ._protocol.session import GOODBYE, STREAMING, VERDICT, ClientProtocol
from ._transport import Framing, deadline_after, remaining, serving_threads
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
    from typing import Any

    from ._pool import IO, Pool
    from ._protocol.messages import Message
    from ._registry.records import Record

# Starts of a daemon for one request: each daemon may end before it takes the request.
_MAX_STARTS = 3

# Derive the keys of a generation once for many requests.
_derive_keys = lru_cache(maxsize=8)(Keys)


class Exchange:
    """One request and its replies; without a message, it opens a connection.

    `deadline` is a monotonic time. Call `close` in any case, also after an error.
    """

    __slots__ = (
        *("_awaited", "_begin", "_cancelled", "_frame", "_io", "_link", "_message", "_pool", "_refused", "_sent"),
        *("_state", "deadline"),
    )

    def __init__(self, pool: Pool, message: Message | None, timeout: float, io: IO = BLOCKING) -> None:
        self._link: Link | None = None
        self.set_timeout(timeout)
        # Before the handshake, which has a short timeout: encoding a large message may take long.
        self._frame = None if message is None else messages.encode(message)
        self._message = message
        self._pool = pool
        self._io = io
        self._state = pool.state
        self._cancelled = False
        # Whether the request was sent on `_link`, and the error of each generation that refused it.
        self._sent = False
        self._refused: dict[str, HarnessIPCError] = {}
        # The operation in progress, for the text of a timeout: "" for the reply, None for a start, which has its own text.
        self._awaited: str | None = "accept a connection" if message is None else ""

    def __del__(self) -> None:
        # It may be missing: `__init__` may have failed.
        if getattr(self, "_link", None) is not None:
            self.close()

    def set_timeout(self, timeout: float) -> None:
        """Set the deadline of the next reply to `timeout` seconds from now. Raises `ValueError`."""
        self._begin = time.monotonic()
        self.deadline = deadline_after(timeout)

    def result_of(self, reply: Message) -> Any:
        """Return the result in a final reply. Raises the error in it, of the client's classes, and `ProtocolError`."""
        return result_of(reply, self._pool.error_classes)

    def cancel(self) -> None:
        """End the exchange at once, from any thread. A request that was sent may still run in the daemon."""
        if self._state.pid == os.getpid():
            with self._state.guard:
                self._cancelled = True
                if self._link is not None:
                    self._link.connection.abort()

    def close(self) -> None:
        """Return the connection to the pool, or close it if the final reply has not arrived. Idempotent."""
        if self._state.pid == os.getpid():
            with self._state.guard:
                link = self._link
                if link is not None:
                    # First: if a signal handler raises after this, nothing refers to the link any more, and it closes itself.
                    self._state.busy.discard(link)
                    self._link = None
                    if self._cancelled:  # perhaps after its reply had come
                        link.protocol.close()
                    self._pool.check_in(self._state, link)
        # In a forked child its copy closes itself; the child's copy of the guard may be locked for ever.
        self._link = None

    async def reply(self) -> Message:
        """Return the next reply; the first call sends the request. After the final reply the connection returns to the pool.

        Raises `DaemonTimeout`, `ConnectionLost`, `Busy`, `ClientClosed`, `AuthenticationFailed`, `DaemonNotRunning` and so on,
        with `maybe_executed` set.
        """
        has_more = False
        try:
            remaining(self.deadline)
            if self._link is None:
                self._state = self._pool.own_state()
            while (reply := await self._ask(self._link or self._take_idle() or await self._open())) is None:
                pass
            has_more = reply.get("continues") is True and not self._cancelled
            return reply
        except HarnessIPCError as error:
            self._annotate(error)
            raise
        finally:
            if not has_more:
                self.close()

    def _annotate(self, error: HarnessIPCError) -> None:
        """Set `maybe_executed` and the text of a timeout. Raises `ClientClosed` if this side closed the connection."""
        # After a failed handshake, or if it was refused, the request has not run.
        error.maybe_executed = self._may_have_run() and not isinstance(error, (AuthenticationFailed, Busy))
        if isinstance(error, ConnectionLost):
            self._check_open(maybe_executed=error.maybe_executed)
        if isinstance(error, DaemonTimeout) and self._awaited is not None:
            message, seconds = self._message or {}, round(time.monotonic() - self._begin, 1)
            operation = str(message.get("method") or message.get("meta") or "a request")
            awaited = f"the daemon {self._pool.name!r} to {self._awaited or f'answer {operation[:50]!a}'}"
            error.args = (f"timed out after {seconds:g} s waiting for {awaited}: allow a longer timeout, or see its status",)

    def _may_have_run(self) -> bool:
        return self._sent and self._link is not None and self._link.connection.all_sent

    def _check_open(self, *, maybe_executed: bool = False) -> None:
        """Raise `ClientClosed` if the client is closed or the exchange cancelled."""
        if self._state.closed:
            raise ClientClosed("this client is closed: connect again", maybe_executed=maybe_executed)
        if self._cancelled:
            raise ClientClosed("the request was cancelled", maybe_executed=maybe_executed)

    def _take_idle(self) -> Link | None:
        """Return an idle connection to a generation that has not refused the request, or None. Closes the others."""
        state = self._state
        while state.idle and self._frame is not None:
            with state.guard:
                if not state.idle:
                    break
                self._link = link = state.idle.pop()
                state.busy.add(link)
            self._check_open()
            if serving_threads:
                self._io.check(link.record)
            # A readable idle connection is at EOF: the daemon sends nothing unsolicited but a goodbye.
            if link.record.generation not in self._refused and not link.connection.is_readable():
                return link
            link.protocol.close()
            self.close()
        return None

    async def _open(self) -> Link:
        """Connect to a generation that has not refused: the recorded one, its successor, or a new one.

        The daemon is authenticated when this returns. If it fails, the request has not run.
        """
        self._check_open()
        starts, refused = 0, dict(self._refused)
        while True:
            try:
                record = self._pool.load(again=bool(starts or refused), refused=refused)
            except (DaemonNotRunning, ConnectionLost):
                if self._pool.start is None or starts == _MAX_STARTS:
                    raise
                from ._on_demand import start_daemon

                starts += 1
                self._awaited = None
                self.deadline = await self._io.run(partial(start_daemon, self._pool, self.deadline))
                self._check_open()
                refused = dict(self._refused)
                continue
            try:
                return await self._connect(record)
            except (DaemonNotRunning, ConnectionLost) as error:
                self._check_open()
                self.close()
                refused[record.generation] = error

    async def _connect(self, record: Record) -> Link:
        io, pool = self._io, self._pool
        io.check(record)
        self._awaited = "accept a connection"
        deadline = min(self.deadline, deadline_after(pool.connect_timeout))
        # Before connecting, which wakes the daemon: it need not wait for this.
        protocol = ClientProtocol(_derive_keys(record.authkey, record.address), Framing(), pool.max_message)
        try:
            connection = await io.connect(record.address, deadline)
        except DaemonNotRunning as error:
            text = f"the daemon {record.name!r} ended without removing its record: start it again"
            raise DaemonNotRunning(text) from error
        link = Link(connection, protocol, record, min(pool.max_message, record.max_message))
        pool.record = record
        with self._state.guard:
            self._link = link
            self._state.busy.add(link)
        self._check_open()
        connection.deadline = deadline
        try:
            while protocol.next_event() is None:
                # A peer that runs multiprocessing.connection waits for the verdict before it sends its challenge.
                await io.send(connection, protocol.data_to_send())
                protocol.receive_data(await io.receive(connection, protocol.frame_limit))
        except MessageTooLarge:
            raise AuthenticationFailed("the peer does not speak this protocol") from None
        except AuthenticationFailed:
            # Tell the peer that it was refused, if possible.
            with contextlib.suppress(HarnessIPCError):
                await io.send(connection, protocol.data_to_send())
            raise
        self._check_open()
        return link

    async def _ask(self, link: Link) -> Message | None:
        """Send the request if necessary, and return the next reply; None if this generation refuses it."""
        connection, protocol, broken = link.connection, link.protocol, None
        connection.deadline = self.deadline
        had_item = protocol.state == STREAMING
        if not had_item:
            broken = await self._send(link)
        try:
            event = protocol.next_event() if protocol.buffered else None
            while event is None:
                protocol.receive_data(await self._io.receive(connection, self._pool.max_message))
                event = protocol.next_event()
        except ConnectionLost:
            if broken is None:
                raise
            if self._may_have_run():
                raise broken from None
            event = GOODBYE
        if event == VERDICT:
            return {}
        if isinstance(event, dict):
            if "error" in event or "continues" in event:
                self._check_reply(link, event)
            return event
        if had_item:
            raise ConnectionLost("the daemon stopped in the middle of a stream")
        stopping = DaemonNotRunning(f"the daemon {self._pool.name!r} is stopping: start it again")
        self._refused[link.record.generation] = broken or stopping
        self._sent = False
        self.close()
        return None

    async def _send(self, link: Link) -> ConnectionLost | None:
        """Send the proof and the request, if there is one. Return the error if the connection breaks."""
        connection, protocol = link.connection, link.protocol
        connection.all_sent = False
        if self._frame is not None:
            check_size(len(self._frame), link.limit)
            protocol.send_request(self._frame)
            self._sent, self._awaited = True, ""
        try:
            if not connection.send_now(protocol.data_to_send()):
                await self._io.send(connection, [])
        except ConnectionLost as error:
            return error  # the daemon may have said goodbye before it closed the connection
        return None

    def _check_reply(self, link: Link, reply: Message) -> None:
        """Raise the error in `reply` if the channel sent it, not the handler; `ProtocolError` for an unexpected item."""
        if (failure := error_of_channel(reply, self._pool.name)) is not None:
            # The daemon closes the connection after it.
            link.protocol.close()
            raise failure
        if link.protocol.state == STREAMING and "more" not in (self._message or {}):
            raise ProtocolError("the daemon sent an item of a stream in place of a reply")
