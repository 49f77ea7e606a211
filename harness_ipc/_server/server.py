"""The server of a daemon, in an event loop: serves clients, closes and drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .._protocol import messages
from .._protocol.handshake import Keys
from .._protocol.session import ServerProtocol
from .._registry import records
from .._registry.lifetime import Registration
from .._registry.namespace import Namespace
from .._transport import Framing, deadline_after, serving_threads
from .._transport.listen import FAMILY, Listener, new_address
from ..errors import StartFailed
from .admission import MIN_HANDSHAKE_TIME, Admission, Deadlines
from .builtins import send_pong
from .greet import Greeter
from .loop import LoopAcceptor
from .pump import ThreadAcceptor
from .requests import Hooks, Requests
from .session import Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .._protocol.messages import Message
    from .requests import Handler
    from .session import Transport

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
# Seconds for the handshake, which usually takes a millisecond.
HANDSHAKE_TIMEOUT = 5.0
# Seconds for requests in flight to finish when the server closes.
GRACE_PERIOD = 5.0
# Whether threads do the I/O, for connections that an event loop can't watch.
USE_PUMP = sys.platform == "win32"
# Seconds for cancelled handlers to stop.
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
    after_request: Callable[[], None] | None = None,
    registration: Registration | None = None,
    namespace: Namespace | None = None,
) -> tuple[DaemonServer, str]:
    """Serve `handler` as the daemon `name` on the running loop, and return the server and its address.

    ```python
    server, endpoint = await start_daemon_server(handle, "index")
    async with server:
        await server.serve_forever()
    ```

    `handler` is a `Service`, an async function that takes a message and returns a reply, both JSON objects, or an async
    generator function that yields the items of a stream. `max_message` is the limit of a message in bytes. `handshake_timeout`
    and `grace_period` are in seconds. If a client disconnects, the handler of its request is cancelled unless
    `cancel_on_disconnect` is False. `health` answers the built-in request ``health``. `on_shutdown` is called in the loop for
    the built-in request ``shutdown``; the default is `close`. `after_request` is called when a handler has ended, before the
    reply is sent. `registration` is the result of `acquire_name` if the caller holds the name and releases it; by default the
    server acquires the name, and releases it when it is closed.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`, and `ValueError` for an invalid timeout.
    """
    for seconds in (handshake_timeout, grace_period):
        deadline_after(seconds)
    owns_registration = registration is None
    registration = registration or acquire_name(name, namespace=namespace)
    keys = Keys(registration.record.authkey, registration.record.address)
    options = Options(keys, max_connections, max_message, handshake_timeout, grace_period, cancel_on_disconnect)
    with contextlib.ExitStack() as undo:
        if owns_registration:
            undo.callback(registration.release)
        listener = undo.enter_context(contextlib.closing(Listener(registration.record.address)))
        server = DaemonServer(registration, listener, options, owns_registration=owns_registration, on_shutdown=on_shutdown)
        undo.callback(server.greeter.stop)
        server.requests = Requests(handler, Hooks(health, after_request), max_message)
        registration.publish(app_version=app_version, max_message=max_message)
        server._start()
        undo.pop_all()
    return server, registration.record.address


def acquire_name(name: str, *, namespace: Namespace | None = None, **optional: Any) -> Registration:
    """Acquire the daemon's `name` for this process, with a new address. `optional` are further fields of the record.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`.
    """
    namespace = namespace or Namespace()
    generation = records.new_generation_id()
    address = new_address(namespace.runtime_dir, generation)
    place = {"generation": generation, "address": address, "family": FAMILY}
    return Registration(name, namespace=namespace, **place, **optional)


class Options(NamedTuple):
    """Arguments of `start_daemon_server`, and the keys of this generation."""

    keys: Keys
    max_connections: int
    max_message: int
    handshake_timeout: float
    grace_period: float
    cancel_on_disconnect: bool


class DaemonServer:
    """The server, returned by `start_daemon_server`. Like asyncio's `Server`, it is not thread-safe."""

    requests: Requests

    def __init__(
        self,
        registration: Registration,
        listener: Listener,
        options: Options,
        *,
        owns_registration: bool,
        on_shutdown: Callable[[], None] | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._registration = registration
        self._owns_registration = owns_registration
        self.on_shutdown = on_shutdown or self.close
        self.options = options
        self.admission = Admission(listener, options.max_connections)
        self.deadlines = Deadlines(self.loop, lambda: self.admission.hosted_by(self))
        self.greeter = Greeter(self)
        self._acceptor = ThreadAcceptor(self) if USE_PUMP else LoopAcceptor(self)
        self.is_draining = False
        self._closed: asyncio.Future[None] = self.loop.create_future()  # done when all resources are released

    @property
    def record(self) -> records.Record:
        """The published record of this generation."""
        return self._registration.record

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request ended; 0 while one is in flight. Built-in requests don't count."""
        return self.requests.counters.idle

    @property
    def connections(self) -> int:
        """The number of authenticated clients."""
        return self.admission.connections

    def beat(self) -> None:
        """Record that the loop is responsive. If called every few seconds, a ping can report how long the loop was blocked."""
        self.greeter.beat_at = time.monotonic()

    def is_reachable(self) -> bool:
        """Whether clients can find this server: its record and socket still exist, and are its own."""
        return self._registration.look()

    def is_serving(self) -> bool:
        """Whether the server accepts connections."""
        return not self.is_draining

    def close(self) -> None:
        """Withdraw the record, stop accepting, and say goodbye to each client without a request in flight.

        Later requests do not run, and their clients are told so. Use `wait_closed` to wait for requests in flight.
        """
        if self.is_draining:
            return
        self.is_draining = True
        serving_threads.pop(self.record.address, None)
        self._registration.drain()
        self._acceptor.close()
        self._for_each(Session.leave)
        self.requests.when_idle = self.check_closed
        try:
            self.loop.call_later(self.options.grace_period, self._cancel_requests)
            self.loop.call_soon(self.check_closed)
        except RuntimeError:  # the loop is closed
            self.greeter.stop()
            if self._owns_registration:
                self._registration.release()

    async def wait_closed(self) -> None:
        """Wait until the server is closed: requests in flight have finished, or were cancelled after the grace period.

        Its threads, descriptors and socket file are gone then.
        """
        await asyncio.shield(self._closed)
        self._acceptor.join()
        self.greeter.join()

    async def serve_forever(self) -> None:
        """Serve until `close` is called, or until this is cancelled, which closes the server."""
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
        serving_threads[self.record.address] = threading.get_ident()
        try:
            self.greeter.start()
            self._acceptor.start()
        except RuntimeError as error:
            self._acceptor.close()
            raise StartFailed(f"no thread can be started ({error}): raise the limit of processes (ulimit -u)") from error

    # For connections.

    def new_session(self, connection: Transport, full: str | None = None) -> Session:
        """Return a session for a connection that was just accepted."""
        protocol = ServerProtocol(self.options.keys, Framing(), self.options.max_message)
        session = Session(self, protocol, connection, full)
        self.admission.add(session)
        return session

    def handshake_timeout(self, session: Session) -> float:
        """Return the seconds for a client's handshake: fewer if it uses the spare descriptor, since others wait for that."""
        return MIN_HANDSHAKE_TIME if session.full else self.options.handshake_timeout

    def remove(self, session: Session, close: Callable[[], None]) -> None:
        """Close a connection by calling `close`, and unregister it; from any thread."""
        self.admission.remove(session, close)
        if self.is_draining:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.check_closed)

    def start_request(self, session: Session, message: Message) -> asyncio.Task[None]:
        """Start a request to the app, or `health`."""
        if self.greeter.beat_at is not None:
            self.beat()
        return self.requests.start(session, message)

    def start_ping(self, session: Session) -> None:
        """Answer a ping in the loop's next iteration."""
        self.loop.call_soon(send_pong, self, session, time.monotonic())

    # Closing.

    def _for_each(self, do: Callable[[Session], None]) -> None:
        """Call `do` with each connection, in the thread of its host."""
        for session in self.admission.hosted_by(self):
            do(session)
        self.greeter.for_each(do)

    def check_closed(self) -> None:
        """Check whether the drain is done. Call it in the loop's thread."""
        if not self.is_draining or self._closed.done():
            return
        if self.admission.all() or self.requests.tasks or not self._acceptor.has_ended:
            return
        self.greeter.stop()
        if self._owns_registration:
            self._registration.release()
        self._closed.set_result(None)

    def _cancel_requests(self) -> None:
        if self._closed.done():
            return
        if self.requests.tasks:
            in_flight, seconds = len(self.requests.tasks), self.options.grace_period
            logger.warning("%d requests are still running after %g s: cancelling them", in_flight, seconds)
        self._for_each(Session.cancel)
        self.requests.cancel_all()
        self.loop.call_later(CANCEL_PERIOD, self._abandon_requests)

    def _abandon_requests(self) -> None:
        if self._closed.done():
            return
        self._for_each(Session.abandon)
        if self.requests.tasks:
            logger.error("%d requests did not stop within %g s of cancellation", len(self.requests.tasks), CANCEL_PERIOD)
            self.requests.tasks.clear()
        self.check_closed()
