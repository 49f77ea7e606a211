"""The daemon's server: it has the name, admits clients, and drains. It owns no process."""

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
# Seconds for a client to prove itself: an honest one takes a millisecond.
HANDSHAKE_TIMEOUT = 5.0
# Seconds that requests in flight get to finish when the server closes.
GRACE_PERIOD = 5.0
# Whether threads have the connections, as where no loop can watch them.
USE_PUMP = sys.platform == "win32"
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

    `handler` is a `Service`, or an async function from a message to a reply, both JSON objects, or an async generator of items.
    `max_message` is the limit of a message in bytes, `handshake_timeout` and `grace_period` are seconds. The handler of a
    request whose client goes away is cancelled, unless `cancel_on_disconnect` is False. `health` answers the reserved
    request of that name; `on_shutdown` is called in the loop for the request ``shutdown`` and is `close` if not given;
    `after_request` is called when a handler has ended, before its reply is sent. `registration` is what `acquire_name`
    returned, if the caller has the name and releases it; otherwise it is acquired here, and released at the server's end.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`, and `ValueError` for an invalid time.
    """
    for seconds in (handshake_timeout, grace_period):
        deadline_after(seconds)
    release = registration is None
    registration = registration or acquire_name(name, namespace=namespace)
    keys = Keys(registration.record.authkey, registration.record.address)
    options = Options(keys, max_connections, max_message, handshake_timeout, grace_period, cancel_on_disconnect)
    with contextlib.ExitStack() as undo:
        if release:
            undo.callback(registration.release)
        listener = undo.enter_context(contextlib.closing(Listener(registration.record.address)))
        server = DaemonServer(registration, listener, options, release=release, on_shutdown=on_shutdown)
        undo.callback(server.greeter.stop)
        server.requests = Requests(handler, Hooks(health, after_request), max_message)
        registration.publish(app_version=app_version, max_message=max_message)
        server._start()
        undo.pop_all()
    return server, registration.record.address


def acquire_name(name: str, *, namespace: Namespace | None = None, **optional: Any) -> Registration:
    """Claim the daemon's `name` for this process, with a new address. `optional` are further fields of the record.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`.
    """
    namespace = namespace or Namespace()
    generation = records.new_generation_id()
    address = new_address(namespace.runtime_dir, generation)
    place = {"generation": generation, "address": address, "family": FAMILY}
    return Registration(name, namespace=namespace, **place, **optional)


class Options(NamedTuple):
    """The keys of this generation; for the others see `start_daemon_server`."""

    keys: Keys
    max_connections: int
    max_message: int
    handshake_timeout: float
    grace_period: float
    cancel_on_disconnect: bool


class DaemonServer:
    """A serving daemon; made by `start_daemon_server`. Its methods belong to the loop's thread, as of asyncio's `Server`."""

    requests: Requests

    def __init__(
        self,
        registration: Registration,
        listener: Listener,
        options: Options,
        *,
        release: bool,
        on_shutdown: Callable[[], None] | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._registration = registration
        self._release = release
        self.on_shutdown = on_shutdown or self.close
        self.options = options
        self.admission = Admission(listener, options.max_connections)
        self.deadlines = Deadlines(self.loop, lambda: self.admission.hosted_by(self))
        self.greeter = Greeter(self)
        self._acceptor = ThreadAcceptor(self) if USE_PUMP else LoopAcceptor(self)
        self.is_draining = False
        self._closed: asyncio.Future[None] = self.loop.create_future()  # done when nothing of it is left

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
        """How many clients are connected and have proved themselves."""
        return self.admission.connections

    def beat(self) -> None:
        """Record that the loop is responsive. Called every few seconds, it lets a ping tell since when the loop is blocked."""
        self.greeter.beat_at = time.monotonic()

    def is_reachable(self) -> bool:
        """Whether the record and the socket, by which clients find this server, are still there and still its own."""
        return self._registration.look()

    def is_serving(self) -> bool:
        """Whether the server accepts connections."""
        return not self.is_draining

    def close(self) -> None:
        """Withdraw the record, stop accepting, and say goodbye to each client without a request in flight.

        All in one callback: what a client sends from now on does not run, and it is told so. `wait_closed` waits for the rest.
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
        except RuntimeError:  # a loop that was closed before runs no request, and nobody waits
            self.greeter.stop()
            if self._release:
                self._registration.release()

    async def wait_closed(self) -> None:
        """Wait until the server has closed: requests in flight are done, or cancelled after the grace period.

        No thread, no descriptor and no socket file of the server is left then.
        """
        await asyncio.shield(self._closed)
        self._acceptor.join()
        self.greeter.join()

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
        """Return the seconds that a client has to prove itself. One that uses the spare descriptor keeps others waiting."""
        return MIN_HANDSHAKE_TIME if session.full else self.options.handshake_timeout

    def remove(self, session: Session, close: Callable[[], None]) -> None:
        """Close a connection by `close` and forget it, from any thread."""
        self.admission.remove(session, close)
        if self.is_draining:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.check_closed)

    def start_request(self, session: Session, message: Message) -> asyncio.Task[None]:
        """Start a request that is the app's, or `health`."""
        if self.greeter.beat_at is not None:
            self.beat()
        return self.requests.start(session, message)

    def start_ping(self, session: Session) -> None:
        """Answer a ping in the loop's next iteration."""
        self.loop.call_soon(send_pong, self, session, time.monotonic())

    # The end.

    def _for_each(self, do: Callable[[Session], None]) -> None:
        """Call `do` with each connection, in the thread of its host."""
        for session in self.admission.hosted_by(self):
            do(session)
        self.greeter.for_each(do)

    def check_closed(self) -> None:
        """See whether a drain is done, in the loop's thread."""
        if not self.is_draining or self._closed.done():
            return
        if self.admission.all() or self.requests.tasks or not self._acceptor.has_ended:
            return
        self.greeter.stop()
        if self._release:
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
