"""The client: find the daemon by its record, prove who is who, ask, and say in one typed error what went wrong.

Importing it imports neither asyncio nor anything that only a daemon needs.
"""

from __future__ import annotations

import os
import threading
import time

from . import auth, transport
from ._protocol import messages
from ._registry import records
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
    from types import TracebackType
    from typing import Any, Self

    from ._protocol.messages import Message

# Connecting is local and takes well under a millisecond; five seconds are for a machine that is swapping.
CONNECT_TIMEOUT = 5.0
# Idle connections of a client; more calls at once open more, and close them again.
_MAX_IDLE = 8
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
    """A daemon's client, for any number of threads at once: each call has a connection of its own while it runs.

    At most 8 connections are kept for later calls. One that is found dead before a request was sent on it (the daemon was
    restarted) is replaced. Once a request was sent, nothing is repeated: its failure is raised. After a fork the child opens
    connections of its own.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout: float,
        request_timeout: float,
        max_message: int,
        namespace: Namespace | None = None,
        any_schema: bool = False,
    ) -> None:
        self.name = name
        self._namespace = namespace or Namespace()
        self._any_schema = any_schema
        self._connect_timeout = timeout
        self._request_timeout = request_timeout
        self._max_message = max_message
        # Of the generation that was connected last.
        self._record: records.Record
        self._state = _State()

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
        """Close all connections. Calls in other threads end with `ClientClosed`, and are not waited for.

        It may be called at any time, also in a signal handler and in a forked child. Closing twice is no error.
        """
        state = self._own_state()
        state.closed = True
        with state.guard:
            for connection in list(state.open):
                connection.abort()
            while state.idle:
                self._drop(state, state.idle.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.name!r} {'closed' if self._state.closed else 'open'}>"

    def _deadline(self, timeout: float | None) -> float:
        return transport.deadline_after(self._request_timeout if timeout is None else timeout)

    def _own_state(self) -> _State:
        """Return the state of this process."""
        if self._state.pid != os.getpid():
            # The inherited connections close themselves.
            inherited, self._state = self._state, _State()
            self._state.closed = inherited.closed
        return self._state

    def _connect(self, deadline: float, call: _Call | None = None) -> None:
        begin = time.monotonic()
        try:
            self._open_idle(deadline, call)
        except DaemonTimeout as error:
            self._describe(error, begin, "accept a connection")
            raise

    def _open_idle(self, deadline: float, call: _Call | None) -> None:
        state = self._own_state()
        connection = self._open(state, deadline, call)
        keep = False
        try:
            auth.confirm(connection)
            keep = True
        except ConnectionLost:
            self._check(state, call)
            raise
        finally:
            self._check_in(state, connection, call, keep)

    def _request(self, message: Message, deadline: float, call: _Call | None = None, *, keep: bool = True) -> Message:
        begin = time.monotonic()
        try:
            return self._exchange(message, deadline, call, keep)
        except DaemonTimeout as error:
            operation = str(message.get("method") or message.get("meta") or "a request")
            self._describe(error, begin, f"answer {operation[:50]!a}")
            raise

    def _describe(self, error: DaemonTimeout, begin: float, operation: str) -> None:
        """Have a timeout name the daemon, the operation and the seconds."""
        waited = round(time.monotonic() - begin, 1)
        text = f"timed out after {waited:g} s waiting for the daemon {self.name!r} to {operation}"
        error.args = (f"{text}: allow a longer timeout, or see its status",)

    def _exchange(self, message: Message, deadline: float, call: _Call | None, keep: bool) -> Message:
        state = self._own_state()
        # First: it may take long, and the daemon does not wait long for our proof, which goes out with it.
        frame = messages.encode(message)
        transport.remaining(deadline)
        connection = self._take_idle(state, call)
        fresh = connection is None
        if connection is None:
            connection = self._open(state, min(deadline, transport.deadline_after(self._connect_timeout)), call)
        reusable = not fresh
        sent = False
        try:
            # Not earlier: what the daemon's limit is was not known before.
            messages.check_size(len(frame), min(self._max_message, state.open[connection].max_message))
            reusable = False
            connection.deadline = deadline
            sent = connection.FAILED_SEND_MAY_ARRIVE
            transport.send(connection, frame)
            sent = True
            if fresh:
                auth.confirm(connection)
            reply = messages.decode(transport.receive(connection, self._max_message))
            if _is_busy(reply):
                raise Busy(f"the daemon {self.name!r} takes no request now, {_remote_error(reply)}: try again later")
            reusable = True
        except HarnessIPCError as error:
            # A refused proof, or a refused request, has not run.
            maybe_executed = sent and not isinstance(error, (AuthenticationFailed, Busy))
            if isinstance(error, ConnectionLost):
                # Say so if it was us.
                self._check(state, call, maybe_executed)
            error.maybe_executed = maybe_executed
            raise
        finally:
            # Otherwise the verdict or the reply may still come: it must not be taken for the next request's.
            self._check_in(state, connection, call, reusable and keep)
        return reply

    def _take_idle(self, state: _State, call: _Call | None) -> transport.Connection | None:
        """Return a kept connection for `call`, or None. Raises `ClientClosed`."""
        while True:
            with state.guard:
                self._check(state, call)
                if not state.idle:
                    return None
                connection = state.idle.pop()
                if call is not None:
                    call.connection = connection
            # The daemon never sends unsolicited data: a readable idle connection is at EOF.
            if not connection.readable_now():
                return connection
            self._drop(state, connection)

    def _open(self, state: _State, deadline: float, call: _Call | None) -> transport.Connection:
        """Connect to the generation that the record names, or to its successor if it was replaced meanwhile.

        The daemon has proved itself then, and our own proof is held, to be sent together with the next frame. Its verdict is
        left to `auth.confirm`, which has to come before anything that the daemon says is believed: that saves two context
        switches.
        """
        record = records.load(self.name, any_schema=self._any_schema, namespace=self._namespace)
        while True:
            # Before the daemon is woken, which then waits for what they are for.
            keys = auth.Keys(record.authkey, record.address)
            try:
                connection = transport.dial(record.address, deadline)
                try:
                    with state.guard:
                        state.open[connection] = self._record = record
                        self._check(state, call)
                        if call is not None:
                            call.connection = connection
                    connection.deadline = deadline
                    auth.challenge_daemon(connection, keys)
                    # A client that was closed meanwhile sends nothing more.
                    self._check(state, call)
                except BaseException:
                    self._drop(state, connection)
                    raise
                return connection
            except (DaemonNotRunning, ConnectionLost):
                self._check(state, call)
                successor = records.load(self.name, again=True, any_schema=self._any_schema, namespace=self._namespace)
                if successor.generation == record.generation:
                    raise
                record = successor

    def _check_in(self, state: _State, connection: transport.Connection, call: _Call | None, keep: bool) -> None:
        """Keep the connection of a call that has ended, or close it."""
        with state.guard:
            if call is not None:
                call.connection = None
                keep = keep and not call.ended
            if keep and not state.closed and len(state.idle) < _MAX_IDLE:
                state.idle.append(connection)
            else:
                self._drop(state, connection)

    @staticmethod
    def _drop(state: _State, connection: transport.Connection) -> None:
        # Under the guard, so that nobody aborts a descriptor that has become another file's.
        with state.guard:
            state.open.pop(connection, None)
            connection.close()

    @staticmethod
    def _check(state: _State, call: _Call | None, maybe_executed: bool = False) -> None:
        """Raise `ClientClosed` if the client is closed or the call cancelled; `maybe_executed` is the request's."""
        if state.closed:
            raise ClientClosed("this client is closed: connect again", maybe_executed=maybe_executed)
        if call is not None and call.ended:
            raise ClientClosed("the request was cancelled", maybe_executed=maybe_executed)

    def _cancel(self, call: _Call) -> None:
        """End `call` at once, from any thread. What was sent may still run in the daemon."""
        with self._state.guard:
            call.ended = True
            if call.connection is not None:
                call.connection.abort()


class _State:
    """What belongs to one process: a forked child has another one, with no connection and no lock of its parent's.

    `guard` is held for a few instructions, never across a wait. It is re-entrant, because a signal handler may call or close
    the client between any two of them.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closed = False
        self.guard = threading.RLock()
        # All connections, each with the record of its generation; and those that no call uses, the last one used at the end.
        self.open: dict[transport.Connection, records.Record] = {}
        self.idle: list[transport.Connection] = []


def shut_down(name: str, generation: str, *, timeout: float, namespace: Namespace) -> bool:
    """Ask that generation of the daemon `name`, and no other, to shut down. Return whether it said that it will.

    Raises what `connect_daemon` and `Client.request` do, but for a daemon of another schema.
    """
    limit = messages.DEFAULT_MAX_MESSAGE
    with Client(
        name, timeout=timeout, request_timeout=timeout, max_message=limit, namespace=namespace, any_schema=True
    ) as client:
        client._connect(transport.deadline_after(timeout))
        return client.generation == generation and "shutdown" in client.request({"meta": messages.SHUTDOWN})


class _Call:
    """One call of a client that may be cancelled, and the connection that it uses."""

    ended = False
    connection: transport.Connection | None = None


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
    # Every version answers these.
    any_schema = isinstance(message, dict) and message.get("meta") in (messages.PING, messages.SHUTDOWN)
    client = Client(
        name,
        timeout=timeout,
        request_timeout=timeout,
        max_message=max_message,
        namespace=namespace,
        any_schema=any_schema,
    )
    return client._request(message, deadline, keep=False)


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


def _is_busy(reply: Message) -> bool:
    """Whether the daemon, and not its handler, says that it takes no request now."""
    error = reply.get("error")
    return isinstance(error, dict) and error.get("type") == Busy.__name__ and error.get("executed") is False


def _remote_error(reply: Message) -> RemoteError:
    error = reply.get("error")
    if isinstance(error, dict):
        return RemoteError(str(error.get("message", error)), type=str(error.get("type", "")))
    return RemoteError(str(error))
