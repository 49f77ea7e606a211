"""Events of the browser, buffered in bounded memory until a client drains them, and streamed to listeners.

An event is kept as JSON, so that its size in memory is known: parsed, it may take ten times as much.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
from collections import deque
from typing import TYPE_CHECKING, Any

from . import MAX_TEXT
from .errors import BrowserError, BrowserLost, BrowserTimeout, TabClosed
from .part import Part, bad_request, named_session, timeout_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    from .connection import Connection
    from .daemon import BrowserApp
    from .part import Message, Stream, Verb

    # Sequence number, session, and the JSON of method and params.
    Kept = tuple[int, str | None, bytes]

# The limit of events for each session, and of one drain.
MAX_EVENTS = 500
# The same limit in bytes. A reply fits into a message even if escaping makes the events six times as long.
MAX_QUEUE_BYTES = 16 * 1024 * 1024
# Bytes of events in one reply, for a client that confirms what it has received.
_PIECE_BYTES = 4 * 1024 * 1024
# The limit of events that wait for the reader of a stream.
_MAX_WAITING = 10_000
# Bytes of the events of all sessions: as many as four sessions may have.
MAX_TOTAL_BYTES = 64 * 1024 * 1024

# Domains that the daemon enables for each session: long texts in their events are truncated.
_ENABLED_DOMAINS = ("Inspector.", "Network.", "Page.", "Runtime.", "Target.")
# Events of these domains that a client has requested: their texts are data, and are not truncated.
_REQUESTED = {"Network.dataReceived", "Page.screencastFrame", "Runtime.bindingCalled"}


class EventStore:
    """The events of all sessions. The queue None has the events of the browser itself."""

    def __init__(self) -> None:
        self._queues: dict[str | None, _Queue] = {}
        self._numbers = itertools.count(1)

    @property
    def size(self) -> int:
        """The size of all events in bytes."""
        return sum(queue.size for queue in self._queues.values())

    def add(self, queue: str | None, method: str, params: Message, session: str | None, frame: str | bytes) -> bytes:
        """Add an event, received as the JSON object `frame`, to a queue: of a session, or None.

        Return the JSON that is kept. Long texts are truncated, also in `params`. Above 500 events or 16 MiB, the oldest of the
        queue are dropped; above 64 MiB in total, the oldest of the largest queue.
        """
        data = frame if isinstance(frame, bytes) else frame.encode()
        if len(data) > MAX_TEXT and method.startswith(_ENABLED_DOMAINS) and method not in _REQUESTED and shorten(params):
            data = _dump(method, params)
        if len(data) > MAX_QUEUE_BYTES:
            data = _dump(method, {"left_out_bytes": len(data)})
        if queue not in self._queues:
            self._queues[queue] = _Queue()
        self._queues[queue].append((next(self._numbers), session, data))
        while self.size > MAX_TOTAL_BYTES:
            max(self._queues.values(), key=lambda queue: queue.size).drop_oldest()
        return data

    def forget(self, session: str) -> None:
        """Drop the events of a session that has ended."""
        self._queues.pop(session, None)

    def drain(self, session: str) -> list[Message]:
        """Remove and return the events of a session."""
        return _drain([self._queues[session]] if session in self._queues else [])

    def read(self, session: str, *, delivered: int, until: int | None) -> Message:
        """Remove a session's events up to the number `delivered`, and return up to 4 MiB of the next ones, up to `until`.

        The reply has ``events``, the number of the last one as ``delivered``, and ``until``, to be passed to the next call.
        """
        queue = self._queues.get(session) or _Queue()
        while queue.events and queue.events[0][0] <= delivered:
            queue.drop_oldest()
        if until is None:
            until = queue.events[-1][0] if queue.events else 0
        piece: list[Kept] = []
        size = 0
        for event in queue.events:
            size += len(event[2])
            if event[0] > until or (piece and size > _PIECE_BYTES):
                break
            piece.append(event)
        events = [_parse(session, data) for _, session, data in piece]
        return {"events": events, "delivered": piece[-1][0] if piece else delivered, "until": until}

    def drain_all(self) -> list[Message]:
        """Remove and return the last 500 events of all sessions, in order; remove older ones too.

        Above 16 MiB, only the first of them are returned: the rest is kept for the next call.
        """
        return _drain(self._queues.values())


class Events(Part):
    """The requests and streams of events."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._store = EventStore()
        self._listeners: dict[str, set[_Listener]] = {}

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests for events."""
        return {"drain_events": self._drain}

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The stream of a session's events."""
        return {"events": self._listen}

    def add(self, session: str | None, method: str, params: Message, frame: str | bytes) -> None:
        """Store an event, and pass it to listeners. See `EventStore.add`."""
        data = self._store.add(session, method, params, session, frame)
        for listener in self._listeners.get(session or "", ()):
            listener.add(method, data)

    def forget(self, session: str) -> None:
        """Drop the events of a session that has ended, and end its streams."""
        self._store.forget(session)
        for listener in self._listeners.get(session, ()):
            listener.end(TabClosed("the tab of these events was closed"))

    def on_connected(self, connection: Connection) -> None:
        """End the streams when the connection is lost."""
        connection.when_lost(lambda: self._end_streams("the connection to the browser was lost: listen again"))

    def on_drain(self) -> None:
        """End the streams, since the daemon stops."""
        self._end_streams("the daemon stops: listen again")

    def _end_streams(self, reason: str) -> None:
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.end(BrowserLost(reason))

    async def _drain(self, message: Message) -> Message:
        """Return the events of a session, or without one the last events of all sessions and the browser.

        They are removed at once; or if the request has ``delivered``, when the next request confirms them: see
        `EventStore.read`.
        """
        named = named_session(message)
        if named is None:
            return {"events": self._store.drain_all()}
        session = await self.app.sessions.session_for(named)
        delivered, until = message.get("delivered"), message.get("until")
        if delivered is None:
            return {"events": self._store.drain(session)}
        if not isinstance(delivered, int) or not isinstance(until, int | None):
            raise bad_request("drain_events needs delivered and until from the previous reply, or delivered 0")
        return self._store.read(session, delivered=delivered, until=until) | {"session_id": session}

    async def _listen(self, params: Message) -> AsyncIterator[Message]:
        """Yield the events of a session; if ``methods`` is not empty, only of these; ``timeout`` in seconds for each, or null.

        The first item is ``{"session_id"}``: from then on, no event is missed. ``{"dropped": number}`` replaces events that
        were dropped because they were not read.
        """
        methods = params.get("methods") or []
        timeout = None if params.get("timeout") is None else timeout_of(params)
        if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
            raise bad_request("the methods of events must be a list of texts")
        _, session = await self.app.sessions.requested(params)
        listener = _Listener(frozenset(methods))
        self._listeners.setdefault(session, set()).add(listener)
        try:
            yield {"session_id": session}
            while True:
                try:
                    async with asyncio.timeout(timeout):
                        item = await listener.next()
                except TimeoutError:
                    raise BrowserTimeout(f"no event within {timeout:g} s") from None
                yield {"dropped": item} if isinstance(item, int) else _parse(session, item)
        finally:
            self._listeners[session].discard(listener)
            if not self._listeners[session]:
                del self._listeners[session]


class _Listener:
    """The queue of events for the reader of one stream."""

    def __init__(self, methods: frozenset[str]) -> None:
        self._methods = methods
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._ended: BrowserError | None = None
        self._arrived = asyncio.Event()

    def add(self, method: str, data: bytes) -> None:
        """Add an event, if the reader wants its method."""
        if self._methods and method not in self._methods:
            return
        self._waiting.append(data)
        self._size += len(data)
        while len(self._waiting) > _MAX_WAITING or self._size > MAX_QUEUE_BYTES:
            self._size -= len(self._waiting.popleft())
            self._dropped += 1
        self._arrived.set()

    def end(self, error: BrowserError) -> None:
        """End the stream with `error`, after the events in the queue."""
        self._ended = self._ended or error
        self._arrived.set()

    async def next(self) -> bytes | int:
        """Return the next event, or the number of events dropped before it."""
        while not self._waiting:
            if self._ended is not None:
                raise self._ended
            self._arrived.clear()
            await self._arrived.wait()
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            return dropped
        data = self._waiting.popleft()
        self._size -= len(data)
        return data


class _Queue:
    """The events of one session, oldest first."""

    __slots__ = ("events", "size")

    def __init__(self) -> None:
        self.events: deque[Kept] = deque()
        self.size = 0

    def append(self, event: Kept) -> None:
        self.events.append(event)
        self.size += len(event[2])
        while len(self.events) > MAX_EVENTS or self.size > MAX_QUEUE_BYTES:
            self.drop_oldest()

    def drop_oldest(self) -> None:
        self.size -= len(self.events.popleft()[2])


def _drain(queues: Collection[_Queue]) -> list[Message]:
    drained: list[Kept] = []
    size = 0
    for event in list(heapq.merge(*(queue.events for queue in queues)))[-MAX_EVENTS:]:
        size += len(event[2])
        if size > MAX_QUEUE_BYTES:
            break
        drained.append(event)
    for queue in queues:
        while queue.events and queue.events[0][0] <= drained[-1][0]:
            queue.drop_oldest()
    return [_parse(session, data) for _, session, data in drained]


def _parse(session: str | None, data: bytes) -> Message:
    message = json.loads(data)
    return {"method": message["method"], "params": message.get("params") or {}, "session_id": session}


def _dump(method: str, params: Message) -> bytes:
    return json.dumps({"method": method, "params": params}, separators=(",", ":")).encode()


def shorten(value: Message) -> bool:
    """Truncate all texts in the JSON object `value` in place to 16,384 characters, and append the number of omitted ones.

    Return whether a text was truncated.
    """
    cut = False
    pending: list[Any] = [value]
    while pending:
        container = pending.pop()
        for key, item in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(item, str):
                if (left_out := len(item) - MAX_TEXT) > 0:
                    container[key] = f"{item[:MAX_TEXT]}… ({left_out} more characters were left out)"
                    cut = True
            elif isinstance(item, dict | list):
                pending.append(item)
    return cut
