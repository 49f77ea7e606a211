"""The blocking client: find the daemon by its record, prove both sides, ask, and say in one typed error what went wrong.

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


# Connecting is local and takes well under a millisecond; five seconds are for a machine that is swapping.
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

    With `start`, a daemon that is absent is started, now and before each later call. It is a command line or an app, such as
    "my_package.index:app", as `ensure_daemon` takes them, or a function without arguments that returns once the daemon runs,
    which several threads and processes may call at once. `start_timeout` seconds are for a start alone, unless it is a
    function; no other timeout counts it. `version` is what the daemon's `app_version` must be: if another one runs,
    `on_mismatch` says whether that is an error, or the daemon is stopped and started again.

    `errors` are classes, derived from `RemoteError`, that a call raises for errors of their name: ``except NotIndexed`` works
    on both sides. Their own ``__init__`` is not called: they have `message`, `type`, `data` and `maybe_executed`.

    `timeout` is for connecting and proving, in seconds; `request_timeout` for each request that brings none of its own, with
    at most `timeout` of it for connecting (`float("inf")` waits for ever); `max_message` is the limit of a message in either
    direction, in bytes; `namespace` is that of the daemon's application, and None the default one.

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
    """A daemon's client, for any number of threads at once: each call has a connection of its own while it runs.

    At most 8 connections are kept for later calls. One that is found dead before a request was sent on it is replaced. A
    request is sent again only if the daemon has said goodbye in place of a reply, which means that it did not run, and another
    generation of the daemon runs or can be started. After a fork the child opens connections of its own.
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
        """Take what `connect_daemon` does, and connect with the first request."""
        if on_mismatch == "restart" and start is None:
            raise ValueError("on_mismatch='restart' needs a start: what the daemon is started with")
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
        """The identity of the daemon's run: it changes when a restarted daemon is connected again."""
        return self._pool.record.generation

    @property
    def app_version(self) -> str | None:
        """What the daemon's app gave to `run_daemon` as its version, from its record."""
        return self._pool.record.public().get("app_version")

    def request(self, message: Message, *, timeout: float | None = None) -> Message:
        """Send `message`, a JSON object, and return the raw reply.

        `timeout` in seconds covers everything from now on; None takes the client's `request_timeout`.

        Raises `DaemonTimeout`, `ConnectionLost`, `Busy`, `MessageTooLarge`, `ProtocolError`, `ClientClosed`, and what
        `connect_daemon` does when a connection had to be opened. The error's `maybe_executed` says whether the request may have
        run. After `MessageTooLarge` or `ProtocolError` for `message` itself nothing was sent. A message with "more" is refused:
        use `stream`. `Busy` is not repeated here: the caller knows whether to wait.
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

        `params` is for names that can't be keywords here, such as "timeout". The daemon is told the seconds that are left.
        `on_progress` is called with each item that the method reports or yields before its final result.

        Raises `RemoteError` for ``reply["error"]``, `TypeError` for a parameter that is given twice, and what `request` does.
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
        """Return an iterator over the items that `method` yields or reports. The request is sent with the first one.

        ```python
        with client.stream("reindex", folder="src") as progress:
            for item in progress:
                print(item)
        ```

        `timeout` in seconds is the time between two items; None takes the client's `request_timeout`. A stream that is closed
        before its end ends its connection, which cancels the method.

        Raises `TypeError` for a parameter that is given twice, and while it is iterated what `call` does.
        """
        timeout = self.request_timeout if timeout is None else timeout
        message = call_message(method, params, kwargs, timeout, more=True)
        return Stream(Exchange(self._pool, message, timeout), timeout)

    def describe(self, *, timeout: float | None = None) -> Message:
        """Return the daemon's `name`, `version` (of harness_ipc), `app_version` and `python`, and its `methods`.

        Each of these has a `name`, a `signature`, the first line of its docstring in `doc`, and in `stream` whether it answers
        with a stream. A daemon with a plain handler has none.

        Raises what `request` does.
        """
        return description_of(self.request({"meta": messages.DESCRIBE}, timeout=timeout))

    def close(self) -> None:
        """Close all connections. Calls in other threads end with `ClientClosed`, and are not waited for.

        It may be called at any time, also in a signal handler and in a forked child. Closing twice is no error.
        """
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.name!r} {'closed' if self._pool.state.closed else 'open'}>"


def shut_down(name: str, generation: str, *, timeout: float, namespace: Namespace) -> bool:
    """Ask that generation of the daemon `name`, and no other, to shut down. Return whether it said that it will.

    Raises what `connect_daemon` and `Client.request` do, but for a daemon of another schema.
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

    `timeout`, in seconds, is for it all, and connecting has at most 5 of them; the others are those of `connect_daemon`.

    Raises what `connect_daemon` and `Client.request` raise.
    """
    check_request(message)
    # Every version answers these.
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
