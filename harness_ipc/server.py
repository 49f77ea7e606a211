"""The adapter: from the listener to the daemon's loop, with threads for all that waits. It owns no process and no signal.

Where the loop can watch connections, it accepts them itself and gives them to the bridge. One thread stands by, and accepts in
its stead while the loop is blocked, or has no room: so that a client learns at once what is the matter. Where the loop can't, a
few warm threads wait in accept. A thread that gets a connection does the challenge and gives what comes then to the bridge: the
loop takes the connection over with the first request where it can; otherwise the thread serves it to its end. Either way
requests on one connection are answered in order, and different connections run at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
import time
from math import inf
from typing import TYPE_CHECKING, Any, Self

from . import __version__, auth, transport
from ._protocol import messages
from ._rate_limit import RateLimitedLogger
from ._registry import records
from ._registry.lifetime import Registration
from ._registry.namespace import Namespace
from .bridge import LoopBridge, Session
from .errors import AuthenticationFailed, Busy, HarnessIPCError, MessageTooLarge, ProtocolError, StartFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._protocol.messages import Message
    from .bridge import Handler

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
# Seconds for a client to prove itself: an honest one takes a millisecond.
HANDSHAKE_TIMEOUT = 5.0
# Seconds that requests in flight get to finish when the server closes.
GRACE_PERIOD = 5.0
# Connections that have not proved themselves yet. Past this number the oldest is dropped to make room, once it had a
# second; until then nothing more is accepted. So silent clients can't keep an honest one out, nor a burst of honest ones.
_MAX_UNPROVED = 256
_UNPROVED_GUARANTEE = 1.0
# Threads that stay in accept. On Windows each offers a pipe instance, and a client that finds none has to wait and retry.
_WARM_THREADS = 8
# Seconds to wait for descriptors or threads, which nothing announces, before accept is tried again.
_EXHAUSTED_PAUSE = 0.1
# Seconds for a client that is answered with the spare descriptor, on which others wait, to send its request.
_SPARE_PATIENCE = 0.5
# Seconds that a client waits for a loop that accepts nothing before a thread does.
_LOOP_PATIENCE = 0.1
# Seconds for cancelled handlers to end.
CANCEL_PERIOD = 1.0


async def start_daemon_server(
    handler: Handler,
    name: str,
    *,
    app_version: str | None = None,
    max_connections: int = MAX_CONNECTIONS,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    grace_period: float = GRACE_PERIOD,
    cancel_on_disconnect: bool = True,
    health: Callable[[], Awaitable[Message]] | None = None,
    on_shutdown: Callable[[], None] | None = None,
    registration: Registration | None = None,
    namespace: Namespace | None = None,
) -> tuple[DaemonServer, str]:
    """Serve `handler` as the daemon `name` on the running loop, and return the server and its address.

    ```python
    server, endpoint = await start_daemon_server(handle, "index")
    async with server:
        await server.serve_forever()
    ```

    `handler` is an async function from a message to a reply, both JSON objects. `max_message` is the limit of either in
    bytes, `handshake_timeout` and `grace_period` are seconds. The handler of a request whose client goes away is cancelled,
    unless `cancel_on_disconnect` is False (on Windows that is not noticed). `health` answers the reserved request of that name;
    `on_shutdown` is called in the loop for the request ``shutdown`` and is `close` if not given. `registration` is what
    `acquire_name` returned, if the caller has the name already, and is released by the caller; otherwise the name is acquired
    here, and released when the server has closed.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`, and `ValueError` for a time that is none.
    """
    for seconds in (handshake_timeout, grace_period):
        transport.deadline_after(seconds)
    release = registration is None
    registration = registration or acquire_name(name, namespace=namespace)
    try:
        listener = transport.Listener(registration.record.address)
        try:
            server = DaemonServer(
                handler,
                registration,
                listener,
                max_connections=max_connections,
                max_message=max_message,
                handshake_timeout=handshake_timeout,
                grace_period=grace_period,
                cancel_on_disconnect=cancel_on_disconnect,
                health=health,
                on_shutdown=on_shutdown,
                release=release,
            )
            registration.publish(app_version=app_version, max_message=max_message)
            server._start()
        except BaseException:
            listener.close()
            raise
    except BaseException:
        if release:
            registration.release()
        raise
    return server, registration.record.address


def acquire_name(name: str, *, namespace: Namespace | None = None, **optional: Any) -> Registration:
    """Claim the daemon's `name` for this process, with a new address. `optional` are further fields of the record.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`.
    """
    namespace = namespace or Namespace()
    generation = records.new_generation_id()
    address = transport.new_address(namespace.runtime_dir, generation)
    place = {"generation": generation, "address": address, "family": transport.FAMILY}
    return Registration(name, namespace=namespace, **place, **optional)


class DaemonServer:
    """A serving daemon; made by `start_daemon_server`. Its methods belong to the loop's thread, as of asyncio's `Server`."""

    def __init__(
        self,
        handler: Handler,
        registration: Registration,
        listener: transport.Listener,
        *,
        max_connections: int,
        max_message: int,
        handshake_timeout: float,
        grace_period: float,
        cancel_on_disconnect: bool,
        health: Callable[[], Awaitable[Message]] | None,
        on_shutdown: Callable[[], None] | None,
        release: bool,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bridge = LoopBridge(
            handler,
            health,
            max_message,
            cancel_on_disconnect=cancel_on_disconnect,
            pong=self._pong,
            admit=self._admit,
            need_thread=self._attend_in_thread,
            end=self._end_by,
        )
        self._log = RateLimitedLogger(logger)
        self._keys = auth.Keys(registration.record.authkey, registration.record.address)
        self._on_shutdown = on_shutdown or self.close
        self._registration = registration
        self._listener = listener
        self._max_connections = max_connections
        self._max_message = max_message
        self._handshake_timeout = handshake_timeout
        self._grace_period = grace_period
        self._release = release

        # Guards all below that is touched by several threads, and announces that a connection or a thread ended.
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        # The thread that left `_threads` last: it may still run, and has joined the one that left before it.
        self._last_to_leave: threading.Thread | None = None
        self._accepting = 0
        self._unproved: dict[Session, None] = {}
        self._sessions: set[Session] = set()
        self._closing = threading.Event()
        # The loop's: how many clients it has accepted, and what ends those of them that don't prove themselves. The thread's
        # that stands by: after how many of them the loop was found to accept nothing.
        self._loop_accepts = transport.Connection.LOOP_CAN_WATCH
        self._most_accepting = 1 if self._loop_accepts else _WARM_THREADS
        self._accepted_in_loop = 0
        self._stalled_at = -1
        self._sweep: asyncio.TimerHandle | None = None

        self._closed: asyncio.Future[None] = self._loop.create_future()
        # It waits from the start: no thread can be started while the interpreter shuts down, and close() may be called then.
        self._withdrawn = threading.Event()
        self._closer = threading.Thread(target=self._shut_down, name="harness-ipc-closer", daemon=True)

    @property
    def record(self) -> records.Record:
        """The published record of this generation."""
        return self._registration.record

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request ended; 0 while one is in flight. The channel's own requests don't count."""
        return self._bridge.idle_seconds

    def beat(self) -> None:
        """Take note that the loop turns. Called every few seconds, it lets a ping tell since when the loop is blocked."""
        self._bridge.beat()

    def is_reachable(self) -> bool:
        """Whether the record and the socket, by which clients find this server, are still there and still its own."""
        return self._registration.look()

    def is_serving(self) -> bool:
        """Whether the server accepts connections."""
        return not self._closing.is_set()

    def close(self) -> None:
        """Withdraw the record, stop accepting and begin to drain; `wait_closed` waits for the end of it."""
        with self._changed:
            if self._closing.is_set():
                return
            self._closing.set()
            self._changed.notify_all()
        if self._loop_accepts:
            with contextlib.suppress(RuntimeError):  # a loop that was closed before watches nothing
                self._loop.remove_reader(self._listener.fileno())
        self._registration.drain()
        self._withdrawn.set()

    async def wait_closed(self) -> None:
        """Wait until the server has closed: requests in flight are done, or cancelled after the grace period.

        No thread, no descriptor and no socket file of the server is left then.
        """
        await asyncio.shield(self._closed)
        self._closer.join()

    async def serve_forever(self) -> None:
        """Serve until the server is closed by somebody, or this is cancelled, which closes it."""
        try:
            await self.wait_closed()
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await self.wait_closed()

    def __repr__(self) -> str:
        return f"<DaemonServer {self.record.name!r} {'serving' if self.is_serving() else 'closing'} at {self.record.address!r}>"

    def _start(self) -> None:
        try:
            self._closer.start()
        except RuntimeError as error:
            raise StartFailed(f"no thread can be started ({error}): raise the limit of processes (ulimit -u)") from error
        with self._changed:
            self._add_thread()
        self._accept_in_loop()

    # The loop: accept.

    def _accept_in_loop(self) -> None:
        if self._loop_accepts and self.is_serving():
            self._loop.add_reader(self._listener.fileno(), self._on_client)

    def _on_client(self) -> None:
        with self._changed:
            crowded = len(self._unproved) >= _MAX_UNPROVED
        if crowded:
            self._leave_to_threads()
            return
        try:
            session = Session(self._listener.accept_now(), self._keys)
        except BlockingIOError:
            return
        except HarnessIPCError as error:
            self._accepted_in_loop += 1
            self._log.warning("refused a client: %s", error)
            return
        except OSError:
            # The thread will say what is wrong.
            self._leave_to_threads()
            return
        self._accepted_in_loop += 1
        with self._changed:
            self._add_unproved(session, self._handshake_timeout)
        if self._sweep is None:
            self._sweep_unproved()
        self._bridge.welcome(session)

    def _leave_to_threads(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._loop.call_later(_EXHAUSTED_PAUSE, self._accept_in_loop)

    def _sweep_unproved(self) -> None:
        """End the sessions that have not proved themselves in time, and look again when the next one's time is over."""
        now = time.monotonic()
        next_deadline = inf
        with self._changed:
            for session in self._unproved:
                if (next_deadline := session.connection.deadline) > now:
                    break
                session.connection.abort()
        self._sweep = self._loop.call_later(next_deadline - now, self._sweep_unproved) if now < next_deadline < inf else None

    # Threads: accept, prove, serve.

    def _add_thread(self, session: Session | None = None) -> bool:
        """Start one more thread, which accepts, or goes on with `session`. The caller holds `_changed`."""
        thread = threading.Thread(target=self._work, args=(session,), name="harness-ipc-worker", daemon=True)
        self._threads.add(thread)
        self._accepting += session is None
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            self._accepting -= session is None
            return False
        return True

    def _work(self, session: Session | None) -> None:
        try:
            if session is None or self._attend(session, self._welcome if session.handshake else self._serve):
                # A thread that waits in accept keeps none.
                session = None
                while self._accept_one():
                    pass
        finally:
            with self._changed:
                previous, self._last_to_leave = self._last_to_leave, threading.current_thread()
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()
            if previous is not None:
                previous.join()

    def _accept_one(self) -> bool:
        """Accept one connection and serve it to its end. Return whether this thread should accept another one."""
        try:
            if self._loop_accepts:
                self._stand_by()
                connection = self._listener.accept_now()
            else:
                connection = self._listener.accept()
        except BlockingIOError:
            return self._goes_on()
        except HarnessIPCError as error:
            self._log.warning("refused a client: %s", error)
            return True
        except OSError as error:
            return self._answer_with_spare() if error.errno in (errno.EMFILE, errno.ENFILE) else self._pause(error)
        session = Session(connection, self._keys)
        if not self._admit_unproved(session):
            self._end(session)
            return self.is_serving()
        return self._attend(session, self._welcome)

    def _stand_by(self) -> None:
        """Wait until there is a client that the loop does not accept, or the end."""
        while self.is_serving():
            self._listener.wait()
            accepted = self._accepted_in_loop
            if self._stalled_at == accepted:
                return
            if not self._closing.wait(_LOOP_PATIENCE) and self._accepted_in_loop == accepted:
                self._stalled_at = accepted

    def _attend(self, session: Session, serve: Callable[[Session], bool]) -> bool:
        """Serve `session` until it ends or the loop takes it over. Return whether this thread should accept another one."""
        try:
            taken_over = serve(session)
        except Exception as error:
            # Nothing that one connection does may end the thread that might be the last one in accept.
            self._end_by(session, error)
        else:
            if not taken_over:
                self._end(session)
        with self._changed:
            if self._closing.is_set() or self._accepting >= self._most_accepting:
                return False
            self._accepting += 1
            return True

    def _attend_in_thread(self, session: Session) -> None:
        with self._changed:
            if self._add_thread(session):
                return
        self._log.error("dropped a client: no thread can be started; raise the limit of processes (ulimit -u)")
        self._end(session)

    def _end_by(self, session: Session, error: Exception | None) -> None:
        pid = session.connection.peer.pid
        if isinstance(error, AuthenticationFailed):
            self._log.warning("refused the client with pid %s: %s", pid, error)
        elif isinstance(error, MessageTooLarge):
            self._log.warning("dropped the client with pid %s: %s", pid, error)
        elif isinstance(error, (HarnessIPCError, EOFError, OSError)):
            logger.debug("the client with pid %s is gone: %s", pid, error)
        elif error is not None:
            self._log.exception("a connection failed", error)
        self._end(session)

    def _end(self, session: Session) -> None:
        with self._changed:
            self._unproved.pop(session, None)
            self._sessions.discard(session)
            # Under the lock, so that nobody wakes a connection that is being closed.
            with contextlib.suppress(OSError):
                session.connection.close()
            # Before the next client takes the descriptor.
            if self.is_serving():
                self._listener.keep_spare()
            self._changed.notify_all()

    def _pause(self, error: OSError) -> bool:
        """Wait a little after a failed accept, e.g. because memory is short. Return whether to go on."""
        if self.is_serving():
            self._log.error("can't accept connections for now: %s", error)
            self._closing.wait(_EXHAUSTED_PAUSE)
        return self._goes_on()

    def _answer_with_spare(self) -> bool:
        """Accept one client though no descriptor is free, and turn it away. Return whether to go on."""
        if self._drop_silent_client() or (full := transport.lacking_descriptors()) is None:
            return self._goes_on()
        self._log.error("can't accept connections for now: %s; raise it, or close files", full)
        with self._changed:
            try:
                session = Session(self._listener.accept_spare(), self._keys)
            except BlockingIOError:
                self._listener.keep_spare()
                return self._goes_on()
            except HarnessIPCError as error:
                self._listener.keep_spare()
                self._log.warning("refused a client: %s", error)
                return self._goes_on()
            except OSError as error:
                # Another thread of the app may have taken the descriptor.
                self._listener.keep_spare()
                return self._pause(error)
            self._add_unproved(session, _UNPROVED_GUARANTEE)
        try:
            assert session.handshake is not None
            auth.finish(session.connection, session.handshake)
            session.connection.deadline = transport.deadline_after(_SPARE_PATIENCE)
            session.full = full
            self._serve_one(session, self._turn_away)
        except Exception as error:
            self._end_by(session, error)
        else:
            self._end(session)
        return self._goes_on()

    def _drop_silent_client(self) -> bool:
        """End the oldest client that has not proved itself, once it had its time. Return whether a descriptor is free now."""
        with self._changed:
            oldest = next(iter(self._unproved), None)
            if oldest is None or time.monotonic() - oldest.accepted_at < _UNPROVED_GUARANTEE:
                return False
            oldest.connection.abort()
            return self._changed.wait_for(lambda: oldest not in self._unproved, _EXHAUSTED_PAUSE)

    def _goes_on(self) -> bool:
        """Return whether this thread, which has accepted nobody, should try again."""
        with self._changed:
            if self._closing.is_set():
                self._accepting -= 1
                return False
            return True

    def _admit_unproved(self, session: Session) -> bool:
        """Wait for room among the unproved connections and see that somebody accepts in this thread's stead.

        Return False, with this thread still counted as accepting unless the server is closing, if that can't be.
        """
        with self._changed:
            while self.is_serving() and len(self._unproved) >= _MAX_UNPROVED:
                oldest = next(iter(self._unproved))
                age = time.monotonic() - oldest.accepted_at
                if age < _UNPROVED_GUARANTEE:
                    self._changed.wait(_UNPROVED_GUARANTEE - age)
                else:
                    oldest.connection.abort()
                    self._changed.wait(_UNPROVED_GUARANTEE)
            if self._closing.is_set():
                self._accepting -= 1
                return False
            if self._accepting == 1 and not self._add_thread():
                self._log.error("refused a client: no thread can be started; raise the limit of processes (ulimit -u)")
                return False
            self._accepting -= 1
            self._add_unproved(session, self._handshake_timeout)
            return True

    def _add_unproved(self, session: Session, timeout: float) -> None:
        session.connection.deadline = transport.deadline_after(timeout)
        self._unproved[session] = None

    def _welcome(self, session: Session) -> bool:
        """Have the client prove itself, and serve it. Return whether the loop has taken the session over."""
        assert session.handshake is not None
        auth.finish(session.connection, session.handshake)
        if not self._admit(session):
            session.full = f"all {self._max_connections} connections are taken (max_connections)"
            return self._serve_one(session, self._turn_away)
        # Our verdict goes out with the reply to a request that came with the proof: it would wake the client for nothing.
        return (session.connection.has_unread and self._serve_one(session, self._bridge.ask)) or self._serve(session)

    def _admit(self, session: Session) -> bool:
        """Return whether the client, which has proved itself, is served: if there is room for it."""
        with self._changed:
            if self._closing.is_set() or len(self._sessions) >= self._max_connections:
                return False
            del self._unproved[session]
            self._sessions.add(session)
        session.handshake = None
        session.connection.deadline = inf
        return True

    def _serve(self, session: Session) -> bool:
        """Serve as `_welcome` does, a session that has been admitted."""
        if session.received is None:
            self._send_rest(session)
        while not self._bridge.leave(session):
            if self._serve_one(session, self._bridge.ask):
                return True
        return True

    def _serve_one(self, session: Session, ask: Callable[[Session, Message], bool]) -> bool:
        """Receive a message and see it answered, by `ask` if it is none of the channel's own. Return what `ask` does.

        Nothing here outlives the call: an idle connection holds no message.
        """
        frame, session.received = session.received, None
        if frame is None:
            frame = transport.receive(session.connection, self._max_message)
        if (message := self._for_app(session, frame)) is not None and ask(session, message):
            return True
        self._send_rest(session)
        return False

    def _send_rest(self, session: Session) -> None:
        reply, session.unsent = session.unsent, None
        if reply is None:
            transport.flush(session.connection)
        else:
            transport.send(session.connection, reply)

    def _for_app(self, session: Session, frame: bytes) -> Message | None:
        """Return the message in `frame`, or None if it is not the app's: then `session.unsent` is the reply."""
        try:
            message = messages.decode(frame)
        except ProtocolError as error:
            session.unsent = messages.encode(messages.error_reply(error))
            return None
        verb = message.get("meta")
        if verb == messages.PING:
            session.unsent = messages.encode(self._pong(*self._bridge.probe(), session.full))
            return None
        if verb == messages.SHUTDOWN:
            logger.info("shutdown requested by pid %s", session.connection.peer.pid)
            self._loop.call_soon_threadsafe(self._on_shutdown)
            session.unsent = messages.encode({"shutdown": True})
            return None
        return message

    def _turn_away(self, session: Session, _: Message) -> bool:
        why = session.full if session.full and self.is_serving() else "it is stopping"
        self._log.warning("turned the client with pid %s away: %s", session.connection.peer.pid, why)
        session.unsent = messages.encode(messages.not_executed(Busy(why)))
        return False

    def _pong(self, responsive: bool, lag: float, full: str | None = None) -> Message:
        """Return the reply to a ping. `full` says which limit is reached, if that is why the client is turned away."""
        usage = self._bridge.usage()
        with self._changed:
            connections = len(self._sessions)
        return {
            "pong": True,
            "pid": self.record.pid,
            "generation": self.record.generation,
            "version": __version__,
            "responsive": responsive,
            "loop_lag": lag,
            "connections": connections,
            "requests": usage.requests,
            "errors": usage.errors,
            "idle": usage.idle,
            "full": full,
        }

    # The end.

    def _shut_down(self) -> None:
        self._withdrawn.wait()
        deadline = transport.deadline_after(self._grace_period)
        try:
            self._stop_accepting()
            with self._changed:
                self._cut_unproved()
                self._bridge.drain()
                for session in self._sessions:
                    session.connection.finish_receiving()
                left = None if deadline == inf else max(0.0, deadline - time.monotonic())
                drained = self._changed.wait_for(self._is_quiet, left)
            if not drained:
                self._break_off()
            if self._last_to_leave is not None:
                self._last_to_leave.join()
        except Exception:
            logger.exception("closing the server failed")
        finally:
            if self._release:
                self._registration.release()
            # A loop that was closed meanwhile has nobody waiting for the news.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._report_closed)

    def _stop_accepting(self) -> None:
        with self._changed:
            while self._accepting:
                self._listener.wake()
                # The thread that accepts may wait for the client that it answers with the spare descriptor.
                self._cut_unproved()
                # Again after a moment: on some systems a wake-up is a connection, which needs a free descriptor.
                self._changed.wait(_EXHAUSTED_PAUSE)
        self._listener.close()

    def _cut_unproved(self) -> None:
        """Cut the clients that have not proved themselves. Those that have, and are turned away, still get their answer."""
        for session in self._unproved:
            if session.full is None:
                session.connection.abort()
            else:
                session.connection.finish_receiving()

    def _break_off(self) -> None:
        """Cancel the handlers that are still running and cut the connections whose peers don't read."""
        in_flight = self._bridge.usage().in_flight
        logger.warning("%d requests are still running after %g s: cancelling them", in_flight, self._grace_period)
        self._bridge.cancel()
        with self._changed:
            self._changed.wait_for(self._is_quiet, CANCEL_PERIOD)
            left = [*self._sessions, *self._unproved]
        # Before their connections are cut: these clients are told what became of their requests.
        self._bridge.break_off(left)
        with self._changed:
            for session in (*self._sessions, *self._unproved):
                session.connection.abort()
            self._changed.wait_for(lambda: not self._threads)
            # A loop that is still blocked ends the rest when it no longer is.
            self._changed.wait_for(self._is_quiet, CANCEL_PERIOD)

    def _is_quiet(self) -> bool:
        return not (self._threads or self._sessions or self._unproved)

    def _report_closed(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        if not self._closed.done():
            self._closed.set_result(None)
