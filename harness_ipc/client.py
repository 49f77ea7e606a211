"""The client: find the daemon by its record, prove who is who, ask, and say in one typed error what went wrong.

Importing it imports neither asyncio nor anything that only a daemon needs.
"""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from math import inf

from . import auth, endpoint, messages, transport
from ._registry.namespace import Namespace
from .errors import (
    AuthenticationFailed,
    Busy,
    ClientClosed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    UnsafeDirectory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
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
    namespace: Namespace | None = None,
) -> Client:
    """Connect to the running daemon `name` and return the authenticated connection.

    ```python
    with connect_daemon("index") as daemon:
        print(daemon.call("search", query="needle"))
    ```

    `timeout` is for connecting and proving, in seconds; `request_timeout` for each request that brings none of its own
    (`float("inf")` waits for ever); `max_message` is the limit of a message in either direction, in bytes; `namespace` is that
    of the daemon's application, and None the default one.

    Raises `DaemonNotRunning`, `DaemonTimeout`, `AuthenticationFailed`, `ConnectionLost`, `IncompatibleDaemon`,
    `UnsafeDirectory`, `InvalidName`, or `ResourceExhausted` if this process has no free descriptor.
    """
    client = Client(name, timeout=timeout, request_timeout=request_timeout, max_message=max_message, namespace=namespace)
    client._connect(transport.deadline_after(timeout))
    return client


class Client:
    """One kept connection to a daemon. Threads may share it: their requests go one after the other.

    A connection that is found dead before a request was sent on it (the daemon was restarted) is opened again. Once a
    request was sent, nothing is repeated: its failure is raised, and the next request opens a new connection.
    """

    def __init__(
        self, name: str, *, timeout: float, request_timeout: float, max_message: int, namespace: Namespace | None = None
    ) -> None:
        self.name = name
        self._namespace = namespace or Namespace()
        self._connect_timeout = timeout
        self._request_timeout = request_timeout
        self._max_message = max_message
        self._record: endpoint.Record
        self._process = os.getpid()
        # Held by the one call that uses the connection.
        self._turn = threading.Lock()
        # Guards what others have to see of that call to end it.
        self._guard = threading.Lock()
        self._call: _Call | None = None
        self._connection: transport.Connection | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """The daemon's process id, from its record."""
        return self._record.pid

    @property
    def generation(self) -> str:
        """The identity of the daemon's run: it changes when a restarted daemon is connected again."""
        return self._record.generation

    @property
    def app_version(self) -> str | None:
        """What the daemon's app gave to `run_daemon` as its version, from its record."""
        return self._record.public().get("app_version")

    def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """Send `message`, a JSON object, and return the raw reply.

        `timeout` in seconds covers everything from now on; None takes the client's `request_timeout`.

        Raises `DaemonTimeout`, `ConnectionLost`, `Busy`, `MessageTooLarge`, `ProtocolError`, `ClientClosed`, and what
        `connect_daemon` does when the connection had to be opened again. The error's `maybe_executed` says whether the request
        may have run. After `MessageTooLarge` or `ProtocolError` for `message` itself nothing was sent, and the connection
        goes on. `Busy` is not repeated here: the caller knows whether to wait.
        """
        return self._request(message, self._deadline(timeout))

    def call(self, method: str, *, timeout: float | None = None, **params: Any) -> Any:
        """Send ``{"method": method, "params": params}`` and return ``reply["result"]``.

        Raises `RemoteError` for ``reply["error"]``, and what `request` does.
        """
        return result_of(self.request({"method": method, "params": params}, timeout=timeout))

    def close(self) -> None:
        """Close the connection; a request in another thread ends with `ClientClosed`. Closing twice is no error."""
        self._end()
        with self._turn:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.name!r} {'closed' if self._closed else 'open'}>"

    def _deadline(self, timeout: float | None) -> float:
        return transport.deadline_after(self._request_timeout if timeout is None else timeout)

    def _connect(self, deadline: float, call: _Call | None = None) -> None:
        self._in_turn(call, deadline, partial(self._open_and_confirm, deadline))

    def _request(self, message: Message, deadline: float, call: _Call | None = None, *, last: bool = False) -> Message:
        return self._in_turn(call, deadline, partial(self._exchange, message, deadline, last))

    def _in_turn(self, call: _Call | None, deadline: float, use: Callable[[], T]) -> T:
        """Use the connection as the only one."""
        if not self._turn.acquire(timeout=-1 if deadline == inf else transport.remaining(deadline)):
            raise DaemonTimeout("another thread's request on this client took until the deadline: use a client for each thread")
        try:
            with self._guard:
                self._call = call
                self._check()
            return use()
        except ConnectionLost as error:
            # Say so if it was us.
            self._check(error.maybe_executed)
            raise
        finally:
            self._turn.release()

    def _open_and_confirm(self, deadline: float) -> None:
        connection = self._open(deadline)
        try:
            auth.confirm(connection)
        except BaseException:
            self._drop()
            raise

    def _exchange(self, message: Message, deadline: float, last: bool) -> Message:
        # First: it may take long, and the daemon does not wait long for our proof, which goes out with it.
        frame = messages.encode(message)
        connection = self._connection
        # A living daemon has nothing to say before it is asked: something to read is the end.
        fresh = connection is None or connection.readable_now()
        if connection is None or fresh:
            self._drop()
            connection = self._open(min(deadline, transport.deadline_after(self._connect_timeout)))
        used = fresh
        sent = False
        try:
            # Not earlier: what the daemon's limit is was not known before.
            messages.check_size(len(frame), min(self._max_message, self._record.max_message))
            used = True
            connection.deadline = deadline
            sent = connection.FAILED_SEND_MAY_ARRIVE
            transport.send(connection, frame)
            sent = True
            if last:
                connection.finish_sending()
            if fresh:
                auth.confirm(connection)
            reply = messages.decode(transport.receive(connection, self._max_message))
            if reply.get("meta") == messages.BUSY:
                raise Busy(f"the daemon {self.name!r} takes no request now, {_remote_error(reply)}: try again later")
        except BaseException as error:
            # A refused proof, or a refused request, has not run.
            if isinstance(error, HarnessIPCError) and not isinstance(error, (AuthenticationFailed, Busy)):
                error.maybe_executed = sent
            # The verdict or the reply may still come: it must not be taken for the next request's.
            if used:
                self._drop()
            raise
        return reply

    def _open(self, deadline: float) -> transport.Connection:
        """Connect to the generation that the record names, or to its successor if it was replaced meanwhile.

        The daemon has proved itself then, and our own proof is held, to go out with what is sent next. Its verdict is left to
        `auth.confirm`, which has to come before anything that the daemon says is believed: that saves two turns.
        """
        record = endpoint.load(self.name, namespace=self._namespace)
        while True:
            # Before the daemon is woken, which then waits for what they are for.
            keys = auth.Keys(record.authkey, record.address)
            try:
                connection = transport.dial(record.address, deadline)
                try:
                    with self._guard:
                        self._connection, self._record = connection, record
                        self._check()
                    connection.deadline = deadline
                    auth.challenge_daemon(connection, keys)
                    # A client that was closed meanwhile sends nothing more.
                    with self._guard:
                        self._check()
                except BaseException:
                    self._drop()
                    raise
                return connection
            except (DaemonNotRunning, ConnectionLost):
                self._check()
                successor = endpoint.load(self.name, again=True, namespace=self._namespace)
                if successor.generation == record.generation:
                    raise
                record = successor

    def _drop(self) -> None:
        with self._guard:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _check(self, maybe_executed: bool = False) -> None:
        """Raise `ClientClosed` if the connection can't be used; `maybe_executed` is for a request that it ends."""
        if self._process != os.getpid():
            raise ClientClosed("this client belongs to the process before the fork: connect again in this one")
        if self._closed:
            raise ClientClosed("this client is closed: connect again", maybe_executed=maybe_executed)
        if self._call is not None and self._call.ended:
            raise ClientClosed("the request was cancelled", maybe_executed=maybe_executed)

    def _end(self, call: _Call | None = None) -> None:
        """End `call`, or all of them now and in future, from any thread. What was sent may still run in the daemon."""
        with self._guard:
            if call is None:
                self._closed = True
            else:
                call.ended = True
            if self._connection is not None and (self._closed or self._call is call) and self._process == os.getpid():
                self._connection.abort()


class _Call:
    """One call of a client that somebody may want to end before its time."""

    ended = False


def request(
    name: str,
    message: Message,
    *,
    timeout: float = CONNECT_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    namespace: Namespace | None = None,
) -> Message:
    """Connect to the daemon `name`, send `message`, return the raw reply and close. One `timeout`, in seconds, for it all.

    Raises what `connect_daemon` and `Client.request` raise.
    """
    deadline = transport.deadline_after(timeout)
    client = Client(name, timeout=timeout, request_timeout=timeout, max_message=max_message, namespace=namespace)
    try:
        return client._request(message, deadline, last=True)
    finally:
        # Not close(): there is no other thread's request to be ended.
        client._drop()


def ping(name: str, timeout: float = CONNECT_TIMEOUT, *, namespace: Namespace | None = None) -> bool:
    """Return whether the daemon `name` answers within `timeout` seconds, by the way that every request takes.

    True also while its loop is blocked: then it lives, but is unresponsive. False if nobody answers, as `identify` says.

    Raises what `identify` does.
    """
    return identify(name, timeout, namespace=namespace) is not None


def identify(name: str, timeout: float = CONNECT_TIMEOUT, *, namespace: Namespace | None = None) -> int | None:
    """Return the process id that the authenticated daemon `name` gives for itself, or None if nobody answers.

    Nobody answers if there is no daemon, if it takes too long, goes away or answers nonsense, and also if what listens there
    can't prove that it has the key: that is not the daemon.

    Raises what the user has to fix first, since it would not go away with another daemon: `InvalidName`, `UnsafeDirectory`,
    `IncompatibleDaemon` (a record of another schema: its daemon may well run), and `ResourceExhausted` (this process has no
    free descriptor, which says nothing about the daemon).
    """
    try:
        pid = request(name, {"meta": messages.PING}, timeout=timeout, namespace=namespace).get("pid")
    except (InvalidName, UnsafeDirectory, IncompatibleDaemon, ResourceExhausted):
        raise
    except HarnessIPCError:
        return None
    # type(): bool is a subclass of int. As a pid, True, 0 and -1 mean init, our group, everybody.
    return pid if type(pid) is int and pid > 0 else None


def result_of(reply: Message) -> Any:
    """Return ``reply["result"]``. Raises `RemoteError` for ``reply["error"]`` and `ProtocolError` if it has neither."""
    if "error" in reply:
        raise _remote_error(reply)
    if "result" not in reply:
        raise ProtocolError(
            'the reply has neither "result" nor "error": use request() for replies of another form', maybe_executed=True
        )
    return reply["result"]


def _remote_error(reply: Message) -> RemoteError:
    error = reply.get("error")
    if isinstance(error, dict):
        return RemoteError(str(error.get("message", error)), type=str(error.get("type", "")))
    return RemoteError(str(error))


async def aconnect_daemon(
    name: str,
    *,
    timeout: float = CONNECT_TIMEOUT,
    request_timeout: float = REQUEST_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    namespace: Namespace | None = None,
) -> AsyncClient:
    """Connect as `connect_daemon` does, without blocking the event loop."""
    deadline = transport.deadline_after(timeout)
    client = AsyncClient(
        Client(name, timeout=timeout, request_timeout=request_timeout, max_message=max_message, namespace=namespace)
    )
    try:
        await client._run(deadline, client._client._connect)
    except BaseException:
        # Not waited for: whoever cancels this wants it to end.
        client._begin_close()
        raise
    return client


class AsyncClient:
    """A `Client` for coroutines, made by `aconnect_daemon`. It blocks in a thread of its own, never in the loop's executor.

    Requests go one after the other. A cancelled one ends the connection, which the next one opens again.
    """

    def __init__(self, client: Client) -> None:
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        self._client = client
        self._turn = asyncio.Lock()
        # One thread, but for a moment after a cancelled request that was still connecting.
        self._executor = ThreadPoolExecutor(thread_name_prefix="harness-ipc-client")

    @property
    def pid(self) -> int:
        """See `Client.pid`."""
        return self._client.pid

    @property
    def generation(self) -> str:
        """See `Client.generation`."""
        return self._client.generation

    @property
    def app_version(self) -> str | None:
        """See `Client.app_version`."""
        return self._client.app_version

    async def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """See `Client.request`; the timeout also counts the wait for other requests of this client."""
        return await self._run(self._client._deadline(timeout), partial(self._client._request, message))

    async def call(self, method: str, *, timeout: float | None = None, **params: Any) -> Any:
        """See `Client.call`."""
        return result_of(await self.request({"method": method, "params": params}, timeout=timeout))

    async def close(self) -> None:
        """See `Client.close`. It returns when the connection is closed and the thread has ended."""
        import asyncio

        if (closing := self._begin_close()) is not None:
            await asyncio.shield(asyncio.wrap_future(closing))
            self._executor.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _begin_close(self) -> Future[None] | None:
        try:
            closing = self._executor.submit(self._client.close)
        except RuntimeError:
            if not self._client._closed:
                # No thread can be started for it.
                self._executor.shutdown(wait=False)
                self._client.close()
            return None
        # What runs now ends at once, and nothing more can be submitted.
        self._client._end()
        self._executor.shutdown(wait=False)
        return closing

    async def _run(self, deadline: float, action: Callable[[float, _Call], T]) -> T:
        import asyncio

        try:
            async with asyncio.timeout(None if deadline == inf else max(0.0, deadline - time.monotonic())):
                await self._turn.acquire()
        except TimeoutError:
            raise DaemonTimeout("another request on this client took until the deadline: use a client for each task") from None
        try:
            call = _Call()
            try:
                job = self._executor.submit(action, deadline, call)
            except RuntimeError as error:
                # It is queued all the same if no thread could be started, and must not run later.
                call.ended = True
                if self._client._closed:
                    raise ClientClosed("this client is closed: connect again") from None
                raise ResourceExhausted(
                    f"no thread can be started for the request ({error}): raise the limit of processes (ulimit -u)"
                ) from error
            try:
                return await asyncio.wrap_future(job)
            except asyncio.CancelledError:
                self._client._end(call)
                raise
        finally:
            self._turn.release()
