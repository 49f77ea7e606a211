"""The thin adapter: a thread for each connection that can't be watched by a loop (a named pipe), between it and the loop.

The thread waits for data, for what it writes to be taken, or to be woken. It has no protocol state: it gives the loop what
arrives and sends what the loop queues. It never waits for a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from .._protocol import messages
from .._protocol.session import IDLE, MAX_READ_AHEAD, REPLYING
from .._rate_limit import RateLimitedLogger
from .._transport import deadline_after
from ..errors import DaemonTimeout, HarnessIPCError
from .greet import greet

if TYPE_CHECKING:
    from .._protocol.messages import Message
    from .._transport.listen import Port
    from ..errors import ProtocolError
    from .server import DaemonServer
    from .session import Session

logger = logging.getLogger(__name__)

# Threads that stay in accept. On Windows each offers a pipe instance, and a client that finds none has to wait and retry.
_WARM_THREADS = 8
# Seconds until an accept that failed is tried again.
_PAUSE = 0.1


class PumpTransport:
    """A `Session`'s transport: the loop's side of a pump. `run` is the thread's."""

    def __init__(self, port: Port, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self._port = port
        self._session = session
        self._loop = loop
        self._limit = session.protocol.max_frame
        # Guards what follows: chunks to write, bytes that were read and that the session has not got yet.
        self._lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        self._undelivered = 0
        self._reading_paused = False
        self._closing = threading.Event()
        # Bytes that the system has not taken, counted in the loop.
        self.unsent = 0

    def write(self, chunks: list[bytes]) -> bool:
        """Write in order. Return whether the system has taken all: only if there is nothing to write."""
        with self._lock:
            self._queue += chunks
        self.unsent += sum(map(len, chunks))
        self._port.wake()
        return not self.unsent

    def pause_reading(self) -> None:
        """Deliver no more data until `resume_reading`."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._reading_paused:
            self._reading_paused = False
            self._port.wake()

    def close(self) -> None:
        """Have the thread close the connection. Closing twice is no error."""
        self._closing.set()
        self._port.wake()

    def _on_taken(self, size: int) -> None:
        self.unsent -= size
        if not self.unsent:
            self._session.on_drained()

    def _on_data(self, data: bytes) -> None:
        with self._lock:
            self._undelivered -= len(data)
        self._session.on_data(data)
        self._port.wake()

    def run(self) -> None:
        """Pump until the connection ends, or `close`, then close it."""
        error: Exception | None = None
        try:
            self._pump()
        except Exception as raised:
            error = raised
        try:
            self._loop.call_soon_threadsafe(self._session.on_lost, error)
            self._closing.wait()
            # What is left says why the connection is closed: as far as that goes at once.
            while not self._port.is_writing and self._begin_write():
                pass
        except (OSError, RuntimeError) as raised:  # RuntimeError: a loop that was closed before has no session
            logger.debug("a connection ended: %s", raised)
        finally:
            self._port.close()

    def _pump(self) -> None:
        writing = 0
        while not self._closing.is_set():
            if not self._port.is_writing:
                if writing:
                    self._loop.call_soon_threadsafe(self._on_taken, writing)
                if writing := self._begin_write():
                    continue
            reading = not self._reading_paused and self._undelivered < MAX_READ_AHEAD
            data = self._port.wait(inf, reading=reading, limit=self._limit)
            if data:
                with self._lock:
                    self._undelivered += len(data)
                self._loop.call_soon_threadsafe(self._on_data, data)
            elif data is not None:
                return

    def _begin_write(self) -> int:
        """Begin to write the next chunk, and return its size, or 0 if there is none."""
        with self._lock:
            chunk = self._queue.popleft() if self._queue else b""
        if chunk:
            self._port.begin_write(chunk)
        return len(chunk)


class ThreadAcceptor:
    """Accepts in threads, each of which then serves the connection that it got: greets the client, and pumps."""

    def __init__(self, server: DaemonServer) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._listener = server.admission.listener
        self._log = RateLimitedLogger(logger)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        # The thread that left `_threads` last: it may still run, and joins the one that left before it.
        self._last_to_leave: threading.Thread | None = None
        self._accepting = 0
        # The connections whose clients have not asked the loop anything yet.
        self._greeting: set[Port] = set()
        self._closing = threading.Event()

    def start(self) -> None:
        """Begin. Raises `RuntimeError` if no thread can be started."""
        with self._lock:
            self._add_thread()

    def _add_thread(self) -> None:
        """Start one more thread that accepts. The caller holds the lock."""
        thread = threading.Thread(target=self._work, name="harness-ipc-pump", daemon=True)
        self._threads.add(thread)
        self._accepting += 1
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            self._accepting -= 1
            raise

    def close(self) -> None:
        """Accept nobody any more; say goodbye to those who have not asked anything."""
        self._closing.set()
        with self._lock:
            for port in self._greeting:
                port.wake()
        self._wake_accepting()

    def _wake_accepting(self) -> None:
        with self._lock:
            accepting = self._accepting
        for _ in range(accepting):
            self._listener.wake()
        if accepting:
            # Again: a wake-up is a connection on some systems, which another thread may have got.
            with contextlib.suppress(RuntimeError):
                self._loop.call_later(_PAUSE, self._wake_accepting)
        else:
            self._listener.close()

    @property
    def has_ended(self) -> bool:
        """Whether its threads serve nobody any more."""
        return not self._threads

    def join(self) -> None:
        """Wait for its threads."""
        if self._last_to_leave is not None:
            self._last_to_leave.join()

    # In a thread.

    def _work(self) -> None:
        try:
            while self._accept_one():
                pass
        except Exception:
            logger.exception("a thread that accepts failed")
        finally:
            with self._lock:
                previous, self._last_to_leave = self._last_to_leave, threading.current_thread()
                self._threads.discard(threading.current_thread())
            if previous is not None:
                previous.join()
            with contextlib.suppress(RuntimeError):  # a loop that was closed before waits for nothing
                self._loop.call_soon_threadsafe(self._server.check_closed)

    def _accept_one(self) -> bool:
        """Accept one connection and serve it to its end. Return whether this thread should accept another one."""
        port: Port | None = None
        try:
            port = self._listener.accept_port()
        except HarnessIPCError as error:
            self._log.warning("refused a client: %s", error)
        except OSError as error:
            if not self._closing.is_set():
                self._log.error("can't accept connections for now: %s", error)
                self._closing.wait(_PAUSE)
        if port is not None and not self._has_stand_in():
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

    def _has_stand_in(self) -> bool:
        """See that another thread accepts in this one's stead, and that there is room. Return whether this one may serve."""
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
        session = self._server.new_session(port)
        with self._lock:
            self._greeting.add(port)
        try:
            request = self._greet(port, session)
        except Exception as error:
            request = None
            self._server.admission.log_end(session, error)
            with contextlib.suppress(Exception):
                self._send(port, session, deadline_after(_PAUSE))
        finally:
            with self._lock:
                self._greeting.discard(port)
        if request is None:
            self._server.remove(session, port.close)
            return
        transport = PumpTransport(port, session, self._loop)
        try:
            self._loop.call_soon_threadsafe(session.adopt, transport, request)
        except RuntimeError:  # the loop was closed
            self._server.remove(session, port.close)
            return
        transport.run()

    def _greet(self, port: Port, session: Session) -> Message | ProtocolError | None:
        """Serve the client until its first request that is the loop's, and return that, or None at the end."""
        deadline = deadline_after(self._server.options.handshake_timeout)
        while True:
            request = greet(self._server, session)
            if isinstance(request, dict) and request.get("meta") == messages.PING:
                pong = self._server.pong(*self._server.probe.wait())
                session.protocol.send_reply(messages.encode(pong))
            elif request is not None:
                return request
            if session.protocol.state in (IDLE, REPLYING):
                deadline = inf
            self._send(port, session, deadline_after(self._server.options.handshake_timeout))
            replied = session.protocol.state == REPLYING
            if replied:
                session.protocol.reply_taken()
            if self._closing.is_set() or (replied and session.full):
                session.protocol.leave()
                self._send(port, session, deadline_after(_PAUSE))
                return None
            if replied:
                continue
            data = port.wait(deadline, reading=True, limit=session.protocol.max_frame)
            if data:
                session.protocol.receive_data(data)
            elif data is not None:
                return None
            elif time.monotonic() >= deadline:
                raise DaemonTimeout("it did not prove itself in time")

    def _send(self, port: Port, session: Session, deadline: float) -> None:
        for chunk in session.protocol.data_to_send():
            port.begin_write(chunk)
            while port.is_writing:
                port.wait(deadline, reading=False, limit=0)
                if time.monotonic() >= deadline:
                    raise DaemonTimeout("it does not read")
