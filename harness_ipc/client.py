"""The client: find the daemon by its record, prove who is who, ask, and say in one typed error what went wrong.

Importing it imports neither asyncio nor anything that only a daemon needs.
"""

from __future__ import annotations

import threading
from math import inf

from . import auth, endpoint, messages, transport
from .errors import (
    Busy,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    InvalidName,
    ProtocolError,
    RemoteError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self, TypeVar

    from .messages import Message

    T = TypeVar("T")

# Connecting is local and takes well under a millisecond; five seconds are for a machine that is swapping.
CONNECT_TIMEOUT = 5.0
# A request may load a page or compile a project.
REQUEST_TIMEOUT = 60.0


def connect_daemon(
    name: str,
    *,
    timeout: float = CONNECT_TIMEOUT,
    request_timeout: float = REQUEST_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
) -> Client:
    """Connect to the running daemon `name` and return the authenticated connection.

    ```python
    with connect_daemon("index") as daemon:
        print(daemon.call("search", query="needle"))
    ```

    `timeout` is for connecting and proving, in seconds; `request_timeout` for each request that brings none of its own
    (`float("inf")` waits for ever); `max_message` is the limit of a message in either direction, in bytes.

    Raises `DaemonNotRunning`, `DaemonTimeout`, `AuthenticationFailed`, `ConnectionLost`, `IncompatibleDaemon`,
    `UnsafeDirectory` or `InvalidName`.
    """
    client = Client(name, timeout=timeout, request_timeout=request_timeout, max_message=max_message)
    client._open(transport.deadline_after(timeout))
    return client


class Client:
    """One kept connection to a daemon. Threads may share it: their requests go one after the other.

    A connection that is found dead before a request was sent on it (the daemon was restarted) is opened again. Once a
    request was sent, nothing is repeated: its failure is raised, and the next request opens a new connection.
    """

    def __init__(self, name: str, *, timeout: float, request_timeout: float, max_message: int) -> None:
        self.name = name
        self._connect_timeout = timeout
        self._request_timeout = request_timeout
        self._max_message = max_message
        self._lock = threading.Lock()
        self._closed = False
        self._connection: transport.Connection | None = None
        self._unconfirmed = False
        self._record: endpoint.Record

    @property
    def pid(self) -> int:
        """The daemon's process id, from its record."""
        return self._record.pid

    @property
    def generation(self) -> str:
        """The identity of the daemon's run: it changes when a restarted daemon is connected again."""
        return self._record.generation

    def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """Send `message`, a JSON object, and return the raw reply.

        `timeout` in seconds covers everything from now on; None takes the client's `request_timeout`.

        Raises `DaemonTimeout`, `ConnectionLost`, `Busy`, `MessageTooLarge`, `ProtocolError`, and what `connect_daemon` does
        when the connection had to be opened again. After `MessageTooLarge` or `ProtocolError` for `message` itself nothing
        was sent, and the connection goes on.
        """
        return self._request(message, transport.deadline_after(self._request_timeout if timeout is None else timeout))

    def call(self, method: str, *, timeout: float | None = None, **params: Any) -> Any:
        """Send ``{"method": method, "params": params}`` and return ``reply["result"]``.

        Raises `RemoteError` for ``reply["error"]``, and what `request` does.
        """
        return result_of(self.request({"method": method, "params": params}, timeout=timeout))

    def close(self) -> None:
        """Close the connection; a request in another thread ends with `ConnectionLost`. Closing twice is no error."""
        self._closed = True
        if not self._lock.acquire(blocking=False):
            self.abort()
            self._lock.acquire()
        try:
            self._drop()
        finally:
            self._lock.release()

    def abort(self) -> None:
        """End the request that another thread is waiting for, with `ConnectionLost`. It may still run in the daemon."""
        connection = self._connection
        if connection is not None:
            connection.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.name!r} {'closed' if self._closed else 'open'}>"

    def _request(self, message: Message, deadline: float) -> Message:
        if not self._lock.acquire(timeout=-1 if deadline == inf else max(0.0, transport.remaining(deadline))):
            raise DaemonTimeout("another thread's request on this client took until the deadline: use a client for each thread")
        try:
            if self._closed:
                raise ConnectionLost("this client is closed: connect again")
            connection = self._living(deadline)
            # Only now: the daemon checks our proof meanwhile, and what its limit is was not known before.
            frame = messages.encode(message, min(self._max_message, self._record.max_message))
            try:
                connection.deadline = deadline
                transport.send(connection, frame)
                if self._unconfirmed:
                    self._confirm(connection)
                reply = messages.decode(transport.receive(connection, self._max_message))
                if reply.get("meta") == messages.BUSY:
                    raise Busy(f"the daemon {self.name!r} has all the connections that it takes: try again later")
            except BaseException:
                # The reply may still come: it must not be taken for the next request's.
                self._drop()
                raise
            return reply
        finally:
            self._lock.release()

    def _living(self, deadline: float) -> transport.Connection:
        connection = self._connection
        if connection is not None and self._unconfirmed and connection.readable_now():
            self._confirm(connection)
        # A living daemon has nothing to say before it is asked: something to read is the end.
        if connection is not None and not connection.readable_now():
            return connection
        self._drop()
        return self._open(min(deadline, transport.deadline_after(self._connect_timeout)))

    def _open(self, deadline: float) -> transport.Connection:
        """Connect to the generation that the record names, or to its successor if it was replaced meanwhile.

        The daemon has proved itself then. Its verdict on our own proof is received before the first reply: until then
        nothing that it says is taken for one, and the two turns of waiting for it are saved.
        """
        record = endpoint.load(self.name)
        while True:
            try:
                connection = transport.dial(record.address, deadline)
                try:
                    connection.deadline = deadline
                    auth.challenge_daemon(connection, auth.Keys(record.authkey, record.address))
                    transport.flush(connection)
                except BaseException:
                    connection.close()
                    raise
                self._connection, self._record, self._unconfirmed = connection, record, True
                return connection
            except (DaemonNotRunning, ConnectionLost):
                successor = endpoint.load(self.name, again=True)
                if successor.generation == record.generation:
                    raise
                record = successor

    def _confirm(self, connection: transport.Connection) -> None:
        auth.confirm(connection)
        self._unconfirmed = False

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def request(
    name: str, message: Message, *, timeout: float = CONNECT_TIMEOUT, max_message: int = messages.DEFAULT_MAX_MESSAGE
) -> Message:
    """Connect to the daemon `name`, send `message`, return the raw reply and close. One `timeout`, in seconds, for it all.

    Raises what `connect_daemon` and `Client.request` raise.
    """
    deadline = transport.deadline_after(timeout)
    with Client(name, timeout=timeout, request_timeout=timeout, max_message=max_message) as client:
        return client._request(message, deadline)


def ping(name: str, timeout: float = CONNECT_TIMEOUT) -> bool:
    """Return whether the daemon `name` answers within `timeout` seconds, by the way that every request takes.

    True also while its loop is blocked: then it lives, but is unresponsive. Raises `InvalidName`.
    """
    return identify(name, timeout) is not None


def identify(name: str, timeout: float = CONNECT_TIMEOUT) -> int | None:
    """Return the process id that the authenticated daemon `name` gives for itself, or None if nobody answers.

    Raises `InvalidName`.
    """
    try:
        pid = request(name, {"meta": messages.PING}, timeout=timeout).get("pid")
    except InvalidName:
        raise
    except HarnessIPCError:
        return None
    # Whoever acts on it must never be handed True, 0 or -1: as a pid they mean init, our group, everybody.
    return pid if isinstance(pid, int) and not isinstance(pid, bool) and pid > 0 else None


def result_of(reply: Message) -> Any:
    """Return ``reply["result"]``. Raises `RemoteError` for ``reply["error"]`` and `ProtocolError` if it has neither."""
    if "error" in reply:
        error = reply["error"]
        if isinstance(error, dict):
            raise RemoteError(str(error.get("message", error)), type=str(error.get("type", "")))
        raise RemoteError(str(error))
    if "result" not in reply:
        raise ProtocolError('the reply has neither "result" nor "error": use request() for replies of another form')
    return reply["result"]


async def aconnect_daemon(
    name: str,
    *,
    timeout: float = CONNECT_TIMEOUT,
    request_timeout: float = REQUEST_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
) -> AsyncClient:
    """Connect as `connect_daemon` does, without blocking the event loop."""
    client = AsyncClient()
    try:
        await client._open(name, timeout=timeout, request_timeout=request_timeout, max_message=max_message)
    except BaseException:
        await client.close()
        raise
    return client


class AsyncClient:
    """A `Client` for coroutines, made by `aconnect_daemon`. It blocks in one thread of its own, never in the loop's executor.

    Requests go one after the other; a cancelled one ends the connection, which the next one opens again.
    """

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._executor = ThreadPoolExecutor(1, thread_name_prefix="harness-ipc-client")
        self._client: Client | None = None
        self._closed = False

    @property
    def client(self) -> Client:
        """The connected `Client`: for its `pid` and `generation`."""
        if self._client is None:
            raise ConnectionLost("this client is closed: connect again")
        return self._client

    async def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """See `Client.request`; the timeout also counts the wait for other requests of this client."""
        client = self.client
        deadline = transport.deadline_after(client._request_timeout if timeout is None else timeout)
        return await self._run(lambda: client._request(message, deadline))

    async def call(self, method: str, *, timeout: float | None = None, **params: Any) -> Any:
        """See `Client.call`."""
        return result_of(await self.request({"method": method, "params": params}, timeout=timeout))

    async def close(self) -> None:
        """See `Client.close`. It returns when the thread has ended."""
        if self._closed:
            return
        self._closed = True
        if self._client is not None:
            self._client.abort()
        try:
            # Last in the thread's queue, so that a connection which is only being made is closed too.
            await self._run(self._close)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise
        self._executor.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self, name: str, *, timeout: float, request_timeout: float, max_message: int) -> None:
        def connect() -> None:
            self._client = connect_daemon(name, timeout=timeout, request_timeout=request_timeout, max_message=max_message)

        await self._run(connect)

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    async def _run(self, call: Callable[[], T]) -> T:
        import asyncio

        try:
            job = self._executor.submit(call)
        except RuntimeError:
            raise ConnectionLost("this client is closed: connect again") from None
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            # Not if it still waits behind another request, which would be ended in its stead.
            if job.running() and self._client is not None:
                self._client.abort()
            raise
