"""A thread for each connection that an event loop can't watch (a named pipe), which passes data between the two.

The thread waits for data, for a write to complete, or to be woken. It has no protocol state: it passes received data to the
loop, and sends chunks queued by the loop.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from .._rate_limit import RateLimitedLogger
from ..errors import HarnessIPCError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Any

    from .._transport.listen import Port
    from .server import DaemonServer
    from .session import Session

logger = logging.getLogger(__name__)

# The number of threads to keep in accept. On Windows each offers a pipe instance; a client that finds none has to retry.
_WARM_THREADS = 8
# Seconds before a failed accept is retried.
_PAUSE = 0.1


class PumpTransport:
    """The transport of a `Session`. `run` runs in the thread; the other methods belong to the loop."""

    session: Session

    def __init__(self, port: Port) -> None:
        self._port = port
        self.peer = port.peer
        # Events for the loop, and the loop, which is None while the session is handed over.
        self._events: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Chunks to write.
        self._queue: deque[bytes] = deque()
        self._reading_paused = False
        # Whether read data is not yet delivered to the session: nothing more is read until it is.
        self._undelivered = False
        self._closing = threading.Event()
        # Bytes not yet written, counted in the loop.
        self.unsent = 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver events in `loop`. Call it in the thread of `loop`."""
        self._loop = loop
        loop.call_soon(self._deliver, loop)

    def detach(self) -> None:
        """Deliver no events until `attach`."""
        self._loop = None

    def write(self, chunks: list[bytes]) -> bool:
        """Write in order. Return whether all is written: only if there was nothing to write."""
        for chunk in chunks:
            self._queue.append(chunk)
            self.unsent += len(chunk)
        self._port.wake()
        return not self.unsent

    def pause_reading(self) -> None:
        """Stop delivering data until `resume_reading`."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._reading_paused:
            self._reading_paused = False
            self._port.wake()

    def abort(self) -> None:
        """End the connection, from any thread; the pump notices."""
        self._port.abort()

    def close(self) -> None:
        """Tell the thread to close the connection. Idempotent."""
        self._closing.set()
        self._port.wake()

    def close_inherited(self) -> None:
        """Close a forked child's copy."""
        self._port.close()

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        # An event may hand the session over: later events go to the other loop.
        while self._events and self._loop is loop:
            callback, argument = self._events.popleft()
            callback(argument)

    def _on_written(self, size: int) -> None:
        self.unsent -= size
        if not self.unsent:
            self.session.on_drained()

    def _on_data(self, data: bytes) -> None:
        self.session.on_data(data)
        self._undelivered = False
        self._port.wake()

    # In the thread.

    def run(self) -> None:
        """Pump until the connection ends or `close` is called, then close it."""
        error: Exception | None = None
        try:
            self._pump()
        except Exception as raised:
            error = raised
        try:
            self._post(self.session.on_lost, error)
            self._closing.wait()
            # Send the rest, which may say why the connection is closed, as far as possible without waiting.
            while not self._port.is_writing and self._begin_write():
                pass
        except (OSError, RuntimeError) as raised:  # RuntimeError: the loop is closed
            logger.debug("a connection ended: %s", raised)
        finally:
            self._port.close()

    def _post(self, callback: Callable[[Any], None], argument: Any) -> None:
        # Queue the event first: the loop that the session is handed over to looks for it.
        self._events.append((callback, argument))
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self._deliver, loop)

    def _pump(self) -> None:
        writing = 0
        while not self._closing.is_set():
            if not self._port.is_writing:
                if writing:
                    self._post(self._on_written, writing)
                if writing := self._begin_write():
                    continue
            reading = not (self._reading_paused or self._undelivered)
            data = self._port.wait(inf, reading=reading, limit=self.session.protocol.max_frame)
            if data:
                self._undelivered = True
                self._post(self._on_data, data)
            elif data is not None:
                return

    def _begin_write(self) -> int:
        """Start writing the next chunk. Return its size, or 0 if there is none."""
        if not self._queue:
            return 0
        chunk = self._queue.popleft()
        self._port.begin_write(chunk)
        return len(chunk)


class ThreadAcceptor:
    """Accepts in threads, each of which then pumps its connection. The first host of a session is the greeter."""

    def __init__(self, server: DaemonServer) -> None:
        self._server = server
        self._listener = server.admission.listener
        self._log = RateLimitedLogger(logger)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._accepting = 0
        self._closing = threading.Event()

    def start(self) -> None:
        """Start accepting. Raises `RuntimeError` if no thread can be started."""
        with self._lock:
            self._add_thread()

    def _add_thread(self) -> None:
        """Start one more thread that accepts. The caller holds the lock."""
        thread = threading.Thread(target=self._work, name="harness-ipc-pump", daemon=True)
        thread.start()
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        self._running += 1
        self._accepting += 1

    def close(self) -> None:
        """Stop accepting."""
        self._closing.set()
        self._wake_accepting()

    def _wake_accepting(self) -> None:
        with self._lock:
            accepting = self._accepting
        for _ in range(accepting):
            self._listener.wake()
        if accepting:
            # Again: on some systems a wake-up is a connection, which another thread may have accepted.
            with contextlib.suppress(RuntimeError):
                self._server.loop.call_later(_PAUSE, self._wake_accepting)
        else:
            self._listener.close()

    @property
    def has_ended(self) -> bool:
        """Whether all its threads have ended."""
        return not self._running

    def join(self) -> None:
        """Wait for its threads."""
        for thread in self._threads:
            thread.join()

    # In a thread.

    def _work(self) -> None:
        try:
            while self._accept_one():
                pass
        except Exception:
            logger.exception("an accepting thread failed")
        finally:
            with self._lock:
                self._running -= 1
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._server.loop.call_soon_threadsafe(self._server.check_closed)

    def _accept_one(self) -> bool:
        """Accept a connection and serve it. Return whether this thread should accept another one."""
        port: Port | None = None
        try:
            port = self._listener.accept_port()
        except HarnessIPCError as error:
            self._log.warning("refused a client: %s", error)
        except OSError as error:
            if not self._closing.is_set():
                self._log.error("can't accept connections for now: %s", error)
                self._closing.wait(_PAUSE)
        if port is not None and not self._hand_over_accepting():
            port.close()
            port = None
        if port is not None:
            self._serve(port)
        with self._lock:
            if port is not None:
                self._accepting += 1
            if not self._closing.is_set() and self._accepting <= _WARM_THREADS:
                return True
            self._accepting -= 1
            if not self._accepting:
                self._listener.close()
            return False

    def _hand_over_accepting(self) -> bool:
        """Ensure that another thread accepts, and that there is room. Return whether this thread may serve its connection."""
        while not self._closing.is_set() and not self._server.admission.make_room():
            self._closing.wait(_PAUSE)
        with self._lock:
            if self._closing.is_set():
                return False
            try:
                if self._accepting == 1:
                    self._add_thread()
            except RuntimeError as error:
                self._log.error("refused a client: no thread can be started (%s); raise the limit of processes", error)
                return False
            self._accepting -= 1
        return True

    def _serve(self, port: Port) -> None:
        transport = PumpTransport(port)
        session = transport.session = self._server.new_session(transport)
        try:
            self._server.greeter.loop.call_soon_threadsafe(session.begin, self._server.greeter)
        except RuntimeError:  # the loop is closed
            self._server.remove(session, port.close)
        else:
            transport.run()
