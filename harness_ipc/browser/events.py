"""Events of the browser, kept in bounded memory until a client drains them, and streamed to those that listen.

An event is kept as the JSON text that the browser sent, so its size is the memory that it takes: parsed, it may take ten times
as much.
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

    # Number in the order of arrival, session, and the JSON of method and params.
    Kept = tuple[int, str | None, bytes]

# Events that are kept for each session, and that one drain returns.
MAX_EVENTS = 500
# Bytes that the events of one session may take, and those of one drain: even if escaping makes them six times as long, the
# reply fits into a message.
MAX_QUEUE_BYTES = 16 * 1024 * 1024
# Bytes of the events that one reply has to a client that confirms what it has received.
_PIECE_BYTES = 4 * 1024 * 1024
# Events that wait for the reader of a stream.
_MAX_WAITING = 10_000
# Bytes that the events of all sessions may take: four loud tabs.
MAX_TOTAL_BYTES = 64 * 1024 * 1024

# The domains that the daemon enables for each session, so pages fill them unasked.
_UNASKED = ("Inspector.", "Network.", "Page.", "Runtime.", "Target.")
# Their events that a client has asked for, whose texts are data.
_ASKED = {"Network.dataReceived", "Page.screencastFrame", "Runtime.bindingCalled"}


class EventStore:
    """The events of all sessions. Those that belong to no session are the browser's own: their queue is that of None."""

    def __init__(self) -> None:
        self._queues: dict[str | None, _Queue] = {}
        self._numbers = itertools.count(1)

    @property
    def size(self) -> int:
        """Bytes of the events that are kept."""
        return sum(queue.size for queue in self._queues.values())

    def add(self, queue: str | None, method: str, params: Message, session: str | None, frame: str | bytes) -> bytes:
        """Keep an event, which was received as the JSON object `frame`, in the queue of a session, or in that of None.

        Return the JSON that is kept. Long texts in `params` are cut, there too.
        The oldest events of a queue are dropped above 500 or 16 MiB. Above 64 MiB in all, the largest queue loses its oldest.
        """
        data = frame if isinstance(frame, bytes) else frame.encode()
        if len(data) > MAX_TEXT and method.startswith(_UNASKED) and method not in _ASKED and shorten(params):
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
        """Return the events of a session, and forget them."""
        return _drain([self._queues[session]] if session in self._queues else [])

    def read(self, session: str, *, delivered: int, until: int | None) -> Message:
        """Forget a session's events up to the number `delivered`, and return the next 4 MiB of the others, up to `until`.

        The reply has ``events``, the number of the last as ``delivered``, and ``until``: the last that there was, for the next.
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
        """Return the last 500 events of all sessions in the order of their arrival, and forget them and what is older.

        Above 16 MiB only the first of them are returned: the others are kept for the next drain.
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
        """The requests about events."""
        return {"drain_events": self._drain}

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The events of a session as they come."""
        return {"events": self._listen}

    def add(self, session: str | None, method: str, params: Message, frame: str | bytes) -> None:
        """Keep an event, and pass it on to those that listen. See `EventStore.add`."""
        data = self._store.add(session, method, params, session, frame)
        for listener in self._listeners.get(session or "", ()):
            listener.add(method, data)

    def forget(self, session: str) -> None:
        """Drop the events of a session that has ended, and end its streams."""
        self._store.forget(session)
        for listener in self._listeners.get(session, ()):
            listener.end(TabClosed("the tab that the events are of was closed"))

    def on_connected(self, connection: Connection) -> None:
        """End the streams with the connection."""
        connection.when_lost(lambda: self._end_streams("the connection to the browser was lost: listen again"))

    def on_drain(self) -> None:
        """End the streams: the daemon stops."""
        self._end_streams("the daemon stops: listen again")

    def _end_streams(self, reason: str) -> None:
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.end(BrowserLost(reason))

    async def _drain(self, message: Message) -> Message:
        """Return events: of the session that is named, or the last ones of all sessions and the browser.

        They are forgotten at once, or with ``delivered`` once the next request says so: see `EventStore.read`.
        """
        named = named_session(message)
        if named is None:
            return {"events": self._store.drain_all()}
        session = await self.app.sessions.session_for(named)
        delivered, until = message.get("delivered"), message.get("until")
        if delivered is None:
            return {"events": self._store.drain(session)}
        if not isinstance(delivered, int) or not isinstance(until, int | None):
            raise bad_request("drain_events has the numbers delivered and until of the reply before, or delivered 0")
        return self._store.read(session, delivered=delivered, until=until) | {"session_id": session}

    async def _listen(self, params: Message) -> AsyncIterator[Message]:
        """Yield the events of a session, those of ``methods`` alone if it is not empty, for ``timeout`` seconds without one.

        First of all ``{"session_id"}``: from then on, no event is missed. ``{"dropped": number}`` is in the place of the oldest
        that were dropped since they were not read.
        """
        methods = params.get("methods") or []
        timeout = None if params.get("timeout") is None else timeout_of(params)
        if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
            raise bad_request("the methods of events are a list of texts")
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
    """The events that wait for the reader of one stream, oldest first."""

    def __init__(self, methods: frozenset[str]) -> None:
        self._methods = methods
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._ended: BrowserError | None = None
        self._arrived = asyncio.Event()

    def add(self, method: str, data: bytes) -> None:
        """Have the reader get an event if it is one of those that it wants."""
        if self._methods and method not in self._methods:
            return
        self._waiting.append(data)
        self._size += len(data)
        while len(self._waiting) > _MAX_WAITING or self._size > MAX_QUEUE_BYTES:
            self._size -= len(self._waiting.popleft())
            self._dropped += 1
        self._arrived.set()

    def end(self, error: BrowserError) -> None:
        """Raise `error` after what waits."""
        self._ended = self._ended or error
        self._arrived.set()

    async def next(self) -> bytes | int:
        """Return the next event, or the number of those that were dropped before it."""
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
    """Cut all texts in the JSON object `value`, in place, to 16,384 characters, followed by the number of characters left out.

    Return whether there was one to cut.
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
