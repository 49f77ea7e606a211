"""The blocking client.

Importing it imports neither asyncio nor anything that only a daemon needs.
"""

from __future__ import annotations

from ._calls import Stream, call_message, check_request, description_of, error_classes
from ._exchange import Exchange
from ._pool import Pool, run
from ._protocol import messages
from .errors import (
    HarnessIPCError,
    IncompatibleDaemon,
    InvalidName,
    RemoteError,
    ResourceExhausted,
    UnsafeDirectory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Any, Literal, Self

    from ._pool import Start
    from ._protocol.messages import Message
    from ._registry.namespace import Namespace


# Connecting takes well under a millisecond; five seconds allow for a machine that is swapping.
CONNECT_TIMEOUT = 5.0
# A request may load a page or compile a project.
REQUEST_TIMEOUT = 60.0
# An app may load a model or wait for a browser.
START_TIMEOUT = 60.0


def connect_daemon(
    name: str,
    *,
    start: Start | None = None,
    start_timeout: float = START_TIMEOUT,
    version: str | None = None,
    on_mismatch: Literal["error", "restart"] = "error",
    errors: Iterable[type[RemoteError]] = (),
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

    With `start`, the daemon is started if it is absent, now and before each later call. `start` is a command line or an app, as
    for `ensure_daemon`, such as "my_package.index:app"; or a function without arguments that returns once the daemon runs.
    Several threads and processes may call the function at once. A start may take `start_timeout` seconds (not enforced for a
    function), which no other timeout includes. `version` is the required `app_version` of the daemon: if another one runs, an
    error is raised, or with `on_mismatch="restart"` the daemon is restarted.

    `errors` are subclasses of `RemoteError`. A call raises them for errors with their names, so ``except NotIndexed`` works on
    both sides. Their ``__init__`` is not called: they have `message`, `type`, `data` and `maybe_executed`.

    `timeout` is for connecting and the handshake, in seconds. `request_timeout` is the default for each request, and includes
    at most `timeout` for connecting; `float("inf")` waits for ever. `max_message` is the limit of a message in either
    direction, in bytes. `namespace` is that of the daemon's application.

    Raises `DaemonNotRunning`, `DaemonTimeout`, `AuthenticationFailed`, `ConnectionLost`, `IncompatibleDaemon`,
    `UnsafeDirectory`, `InvalidName`, `ResourceExhausted` if no descriptor is free, and what `ensure_daemon` or `start` does.
    """
    client = Client(
        name,
        start=start,
        start_timeout=start_timeout,
        version=version,
        on_mismatch=on_mismatch,
        errors=errors,
        timeout=timeout,
        request_timeout=request_timeout,
        max_message=max_message,
        namespace=namespace,
    )
    run(Exchange(client._pool, None, timeout).reply())
    return client


class Client:
    """A thread-safe client of a daemon. Each concurrent call uses its own connection.

    At most 8 idle connections are kept for later calls; a dead one is replaced. A request is resent only if the daemon said
    goodbye instead of replying, which means that the request did not run, and another generation of the daemon runs or can be
    started. A forked child opens its own connections.
    """

    def __init__(
        self,
        name: str,
        *,
        start: Start | None = None,
        start_timeout: float = START_TIMEOUT,
        version: str | None = None,
        on_mismatch: Literal["error", "restart"] = "error",
        errors: Iterable[type[RemoteError]] = (),
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        max_message: int = messages.DEFAULT_MAX_MESSAGE,
        namespace: Namespace | None = None,
    ) -> None:
        """Take the arguments of `connect_daemon`; connect with the first request."""
        if on_mismatch == "restart" and start is None:
            raise ValueError("on_mismatch='restart' needs `start`, which says how to start the daemon")
        self.name = name
        self.request_timeout = request_timeout
        self._pool = Pool(
            name,
            namespace=namespace,
            connect_timeout=timeout,
            max_message=max_message,
            start=start,
            start_options={"timeout": start_timeout, "version": version, "on_mismatch": on_mismatch},
            error_classes=error_classes(errors),
        )

    @property
    def pid(self) -> int:
        """The daemon's process id, from its record."""
        return self._pool.record.pid

    @property
    def generation(self) -> str:
        """The id of the daemon's generation. It changes when the client connects to a restarted daemon."""
        return self._pool.record.generation

    @property
    def app_version(self) -> str | None:
        """The `app_version` of the daemon, from its record."""
        return self._pool.record.public().get("app_version")

    def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """Send `message`, a JSON object, and return the raw reply.

        `timeout` in seconds includes connecting and the request; None means the client's `request_timeout`.

        Raises `DaemonTimeout`, `ConnectionLost`, `Busy`, `MessageTooLarge`, `ProtocolError`, `ClientClosed`, and what
        `connect_daemon` does if a connection has to be opened. The error's `maybe_executed` says whether the request may have
        run. If `message` itself is invalid or too large, nothing is sent. A message with "more" is refused: use `stream`.
        `Busy` is not retried: the caller decides whether to wait.
        """
        timeout = self.request_timeout if timeout is None else timeout
        return run(Exchange(self._pool, check_request(message), timeout).reply())

    def call(
        self,
        method: str,
        params: Message | None = None,
        /,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Send ``{"method": method, "params": {**params, **kwargs}}`` and return ``reply["result"]``.

        `params` is for names that are arguments here, such as "timeout". The handler gets the deadline: see `current_request`.
        `on_progress` is called with each item that the method reports or yields before its final result.

        Raises `RemoteError` for ``reply["error"]``, `TypeError` for a duplicate parameter, and what `request` does.
        """
        timeout = self.request_timeout if timeout is None else timeout
        message = call_message(method, params, kwargs, timeout, more=on_progress is not None)
        exchange = Exchange(self._pool, message, timeout)
        if on_progress is None:
            return exchange.result_of(run(exchange.reply()))
        with Stream(exchange) as stream:
            for item in stream:
                on_progress(item)
        return stream.result

    def stream(self, method: str, params: Message | None = None, /, *, timeout: float | None = None, **kwargs: Any) -> Stream:
        """Return an iterator over the items that `method` yields or reports. The first iteration sends the request.

        ```python
        with client.stream("reindex", folder="src") as progress:
            for item in progress:
                print(item)
        ```

        `timeout` in seconds is for each item; None means the client's `request_timeout`. Closing a stream early closes its
        connection, which cancels the method.

        Raises `TypeError` for a duplicate parameter, and during iteration what `call` does.
        """
        timeout = self.request_timeout if timeout is None else timeout
        message = call_message(method, params, kwargs, timeout, more=True)
        return Stream(Exchange(self._pool, message, timeout), timeout)

    def describe(self, *, timeout: float | None = None) -> Message:
        """Return the daemon's `name`, `version` (of harness_ipc), `app_version` and `python`, and its `methods`.

        Each method has a `name`, a `signature`, the first line of its docstring as `doc`, and `stream`, whether it answers with
        a stream. A daemon with a plain handler has no methods.

        Raises what `request` does.
        """
        return description_of(self.request({"meta": messages.DESCRIBE}, timeout=timeout))

    def close(self) -> None:
        """Close all connections. Calls in other threads raise `ClientClosed`; this does not wait for them.

        May be called at any time, also in a signal handler and in a forked child. Idempotent.
        """
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.name!r} {'closed' if self._pool.state.closed else 'open'}>"


def shut_down(name: str, generation: str, *, timeout: float, namespace: Namespace) -> bool:
    """Ask one generation of the daemon `name` to shut down. Return whether it agreed.

    Raises what `connect_daemon` and `Client.request` do, but accepts a record of another schema.
    """
    limit = messages.DEFAULT_MAX_MESSAGE
    pool = Pool(
        name,
        namespace=namespace,
        connect_timeout=timeout,
        max_message=limit,
        any_schema=True,
        generation=generation,
        max_idle=0,
    )
    return "shutdown" in run(Exchange(pool, {"meta": messages.SHUTDOWN}, timeout).reply())


def request(
    name: str,
    message: Message,
    *,
    start: Start | None = None,
    start_timeout: float = START_TIMEOUT,
    timeout: float = REQUEST_TIMEOUT,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    namespace: Namespace | None = None,
) -> Message:
    """Connect to the daemon `name`, send `message`, return the raw reply and close.

    `timeout` covers everything, in seconds, with at most 5 for connecting. Other arguments are those of `connect_daemon`.

    Raises what `connect_daemon` and `Client.request` raise.
    """
    check_request(message)
    # Every version answers these requests.
    any_schema = message.get("meta") in (messages.PING, messages.SHUTDOWN)
    pool = Pool(
        name,
        namespace=namespace,
        connect_timeout=CONNECT_TIMEOUT,
        max_message=max_message,
        any_schema=any_schema,
        start=start,
        start_options={"timeout": start_timeout},
        max_idle=0,
    )
    return run(Exchange(pool, message, timeout).reply())


def ping(name: str, timeout: float = CONNECT_TIMEOUT, *, namespace: Namespace | None = None) -> bool:
    """Return whether the daemon `name` answers an authenticated request within `timeout` seconds.

    Also True while its event loop is blocked, when the daemon is alive but unresponsive. False where `identify` returns None.

    Raises what `identify` does.
    """
    return identify(name, timeout, namespace=namespace) is not None


def identify(name: str, timeout: float = CONNECT_TIMEOUT, *, namespace: Namespace | None = None) -> int | None:
    """Return the process id of the daemon `name`, as reported by the authenticated daemon, or None if it does not answer.

    None means that there is no daemon, that it timed out, disconnected or sent an invalid reply, or that the process at its
    address failed to authenticate itself.

    Raises errors that a new daemon would not fix: `InvalidName`, `UnsafeDirectory`, `IncompatibleDaemon` (a record of another
    schema; the daemon may be running), and `ResourceExhausted` (no free descriptor in this process).
    """
    try:
        pid = request(name, {"meta": messages.PING}, timeout=timeout, namespace=namespace).get("pid")
    except (InvalidName, UnsafeDirectory, IncompatibleDaemon, ResourceExhausted):
        raise
    except HarnessIPCError:
        return None
    # type(): bool is a subclass of int. To kill(), pids 0 and -1 mean process groups.
    return pid if type(pid) is int and pid > 0 else None
