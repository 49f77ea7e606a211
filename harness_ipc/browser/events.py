"""Events of the browser, kept in bounded memory until a client drains them. Knows no connection.

An event is kept as the JSON text that the browser sent, so its size is the memory that it takes: parsed, it may take ten times
as much.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import deque
from typing import TYPE_CHECKING, Any

from . import MAX_TEXT
from .part import Part, named_session

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from .daemon import BrowserApp
    from .part import Message, Verb

    # Number in the order of arrival, session, and the JSON of method and params.
    Kept = tuple[int, str | None, bytes]

# Events that are kept for each session, and that one drain returns.
MAX_EVENTS = 500
# Bytes that the events of one session may take, and those of one drain: even if escaping makes them six times as long, the
# reply fits into a message.
MAX_QUEUE_BYTES = 16 * 1024 * 1024
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
        self._numbers = itertools.count()

    @property
    def size(self) -> int:
        """Bytes of the events that are kept."""
        return sum(queue.size for queue in self._queues.values())

    def add(self, queue: str | None, method: str, params: Message, session: str | None, frame: str | bytes) -> None:
        """Keep an event, which was received as the JSON object `frame`, in the queue of a session, or in that of None.

        Long texts in `params` are cut, there too.
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

    def forget(self, session: str) -> None:
        """Drop the events of a session that has ended."""
        self._queues.pop(session, None)

    def drain(self, session: str) -> list[Message]:
        """Return the events of a session, and forget them."""
        return _drain([self._queues[session]] if session in self._queues else [])

    def drain_all(self) -> list[Message]:
        """Return the last 500 events of all sessions in the order of their arrival, and forget them and what is older.

        Above 16 MiB only the first of them are returned: the others are kept for the next drain.
        """
        return _drain(self._queues.values())


class Events(Part):
    """Drains."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        self._store = EventStore()
        self.add = self._store.add
        self.forget = self._store.forget

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The requests about events."""
        return {"drain_events": self._drain}

    async def _drain(self, message: Message) -> Message:
        """Return the last events and forget them: of the session that is named, or of all sessions and the browser."""
        named = named_session(message)
        if named is None:
            return {"events": self._store.drain_all()}
        return {"events": self._store.drain(await self.app.sessions.session_for(named))}


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
