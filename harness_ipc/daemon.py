"""A daemon's process: acquire the name, open the log, handle signals, start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import sys
import threading
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from . import __version__, startup
from ._descriptors import close_in_child, open_standard_streams, raise_descriptor_limit
from ._logging import BoundedLog, logging_to, logging_to_stderr, wants_console
from ._progress import StartProgress
from ._protocol import messages
from ._registry.namespace import Namespace, log_path
from ._server.requests import Dispatcher
from ._server.server import CANCEL_PERIOD, GRACE_PERIOD, HANDSHAKE_TIMEOUT, MAX_CONNECTIONS, acquire_name, start_daemon_server
from ._transport import deadline_after
from .errors import HarnessIPCError, StartFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
    from typing import Self

    from ._protocol.messages import Message
    from ._registry.lifetime import Registration
    from ._server.requests import Handler
    from ._server.server import DaemonServer

logger = logging.getLogger(__name__)

# Seconds between checks that clients can still find the daemon. Each check also records that the loop is responsive.
_LOOK_INTERVAL = 2.0

# `has_acquired`: whether this thread is in an `acquire_daemon` block.
_thread = threading.local()


class App(Protocol):
    """An application: an object with ``async handle(message)``. Its other methods are optional.

    ``async start()`` acquires resources, before clients can find the daemon. ``async stop()`` releases them, after the last
    request, and also if `start` failed. ``async health() -> dict`` checks the app's dependencies: the daemon is unhealthy if it
    raises an error or returns a dict with an "error". Returning None is the same as returning an empty dict.
    """

    def handle(self, message: Message, /) -> Awaitable[Message] | AsyncIterator[Any]:
        """Handle one request."""


def run_daemon(
    app: App | Handler,
    name: str,
    *,
    app_version: str | None = None,
    idle_timeout: float | None = None,
    max_connections: int = MAX_CONNECTIONS,
    max_message: int = messages.DEFAULT_MAX_MESSAGE,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    grace_period: float = GRACE_PERIOD,
    cancel_on_disconnect: bool = True,
    on_ready: Callable[[DaemonServer], None] | None = None,
    on_drain: Callable[[], object] = lambda: None,
    acquired: AcquiredDaemon | None = None,
    namespace: Namespace | None = None,
) -> None:
    """Run the daemon `name` until SIGTERM, SIGINT, SIGHUP, a ``shutdown`` request or `idle_timeout` seconds without a request.

    `app` is a `Service`, an `App`, or an async function that takes a message and returns a reply. The log is the file
    `log_path`; in a terminal it also goes to standard error, unless the program has configured logging. `on_ready` is called
    in the loop once clients can connect, and `on_drain` when the daemon starts to drain, for example to end infinite streams.
    `acquired` is the result of `acquire_daemon`, for a program with slow work to do before it has an app. `namespace` defaults
    to that of the `ensure_daemon` that started this process, if any. The other arguments are those of `start_daemon_server`. A
    daemon started by `ensure_daemon` without `cwd=` makes `sys.path` absolute and changes to ``/``: the directory of its
    starter may be removed.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`; `TypeError` if `app` can't be served,
    `ValueError` for an invalid timeout, and `RuntimeError` in a running event loop, or while ``harness-ipc serve`` imports the
    module. Returns after a clean shutdown.
    """
    application = check_app(app)
    _check_context(acquired)
    if idle_timeout is not None:
        deadline_after(idle_timeout)

    async def serve(stop: asyncio.Event) -> None:
        server, address = await start_daemon_server(
            application.handle,
            name,
            app_version=app_version,
            max_connections=max_connections,
            max_message=max_message,
            handshake_timeout=handshake_timeout,
            grace_period=grace_period,
            cancel_on_disconnect=cancel_on_disconnect,
            health=application.health,
            on_shutdown=stop.set,
            # After each request: the handler or its children may have printed a lot.
            after_request=daemon.log.limit_size if daemon.log.receives_prints() else None,
            registration=daemon.registration,
            namespace=daemon.namespace,
        )
        async with server:
            logger.info("ready at %s", address)
            daemon.report.send(state="ready", name=name, directory=daemon.namespace.runtime_dir)
            daemon.report.close()
            if on_ready is not None:
                on_ready(server)
            await _wait_until_done(server, stop, idle_timeout)
            logger.info("draining")
            on_drain()

    async def main() -> None:
        stop = asyncio.Event()
        with _StoppingSignals(stop) as signals:
            try:
                with StartProgress(daemon.report, daemon.registration):
                    started = await _start(application, stop)
                if started:
                    await serve(stop)
                else:
                    message = "it was stopped while starting"
                    daemon.report.send(state="failed", type=signals.received, message=message)
            finally:
                try:
                    await application.stop()
                except Exception:
                    logger.exception("the app's stop failed")

    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(acquire_daemon(name, namespace=namespace)) if acquired is None else acquired
        daemon.report.leave_directory()
        if acquired is None and not daemon.report.start and wants_console(daemon.log):
            stack.enter_context(logging_to_stderr())
        _run(main())
        logger.info("stopped %s", name)


class AcquiredDaemon(NamedTuple):
    """A name held by this process, which no other process can acquire, and what `run_daemon` needs to serve it."""

    registration: Registration
    report: startup.ReadyPipe
    namespace: Namespace
    log: BoundedLog


@contextlib.contextmanager
def acquire_daemon(name: str, *, namespace: Namespace | None = None) -> Iterator[AcquiredDaemon]:
    """Acquire `name`, record that this process is starting, and send the log to its file.

    Raises `AlreadyRunning`, `StartFailed`, `UnsafeDirectory` or `InvalidName`.
    """
    open_standard_streams()
    raise_descriptor_limit()
    with startup.reporting() as report:
        start = report.start
        namespace = namespace or Namespace(runtime_dir=start.get("runtime_dir"), log_dir=start.get("log_dir"))
        fields = {key: start.get(key) for key in ("argv", "cwd", "leaves_cwd", "detached")}
        fields["environment"] = {key: os.environ[key] for key in start.get("environment", ()) if key in os.environ}
        registration = acquire_name(name, namespace=namespace, **fields)
        try:
            with logging_to(name, str(log_path(name, namespace=namespace))) as log:
                version = ".".join(map(str, sys.version_info[:3]))
                logger.info("starting %s: pid %d, harness_ipc %s, Python %s", name, os.getpid(), __version__, version)
                log.check_writable()
                _thread.has_acquired = True
                yield AcquiredDaemon(registration, report, namespace, log)
        finally:
            _thread.has_acquired = False
            registration.release()


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run like `asyncio.run`, but wait only `CANCEL_PERIOD` for tasks that ignore cancellation."""
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        try:
            loop.run_until_complete(main)
        finally:
            if tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                _, tasks = loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_PERIOD))
            for task in tasks:
                logger.error("task did not stop within %g s of cancellation: %r", CANCEL_PERIOD, task)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())


async def _do_nothing() -> None:
    """The default of an app's start and stop."""


class _Functions(NamedTuple):
    """The functions of an app. `handle` may also be an async generator function."""

    handle: Handler
    start: Callable[[], Coroutine[Any, Any, None]] = _do_nothing
    stop: Callable[[], Coroutine[Any, Any, None]] = _do_nothing
    health: Callable[[], Coroutine[Any, Any, Message]] | None = None


def check_app(app: App | Handler) -> _Functions:
    """Return the functions of `app`. Raises `TypeError` if it is not an app."""
    if isinstance(app, type):
        raise TypeError(f"{app.__name__} is a class: write run_daemon({app.__name__}())")
    functions: dict[str, Any] = {key: value for key in _Functions._fields if (value := getattr(app, key, None)) is not None}
    if isinstance(app, Dispatcher):
        functions["handle"] = app
    elif "handle" not in functions:
        functions = {"handle": app}
        if not callable(app):
            raise TypeError(f"app must be an async function or an object with an async handle(), not {type(app).__name__}")
    for key, function in functions.items():
        if isinstance(function, Dispatcher):
            continue
        # A handler may be a callable object, or an async generator function.
        called = (function, getattr(type(function), "__call__", None))  # noqa: B004
        if not any(map(inspect.iscoroutinefunction, called)) and not (
            key == "handle" and any(map(inspect.isasyncgenfunction, called))
        ):
            name = getattr(function, "__qualname__", key)
            raise TypeError(f"{name} is not async: write `async def {name.rpartition('.')[2].strip('<>')}(...)`")
    return _Functions(**functions)


def _check_context(acquired: AcquiredDaemon | None) -> None:
    """Raise `RuntimeError` if a daemon can't run here."""
    if acquired is None and getattr(_thread, "has_acquired", False):
        raise RuntimeError(
            "run_daemon was called while `harness-ipc serve` imports this module: "
            'write it below `if __name__ == "__main__":`, or start the program without `serve`'
        )
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("run_daemon starts its own event loop: in a running one, write `await start_daemon_server(...)`")


async def _start(app: _Functions, stop: asyncio.Event) -> bool:
    """Run the app's start. Return False if `stop` was set before it finished."""
    starting = asyncio.ensure_future(app.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        logger.info("stopped while starting")
        starting.cancel()
        await asyncio.wait({starting})
        return False
    try:
        starting.result()
    except HarnessIPCError:
        raise
    except Exception as error:
        raise StartFailed(
            f"the app's start failed: {type(error).__name__}: {error}", type=type(error).__name__, reason=str(error)
        ) from error
    return True


async def _wait_until_done(server: DaemonServer, stop: asyncio.Event, idle_timeout: float | None) -> None:
    """Wait until the daemon should end: `stop` is set, it is idle, or clients can't find it any more."""
    while not stop.is_set():
        server.beat()
        left = inf if idle_timeout is None else idle_timeout - server.idle_seconds
        if left <= 0:
            logger.info("idle for %g s", idle_timeout)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(left, _LOOK_INTERVAL))
        if not stop.is_set() and not server.is_reachable():
            # Exit rather than keep running unreachable.
            logger.error("clients can't reach this daemon: another one holds its name, or its socket was removed")
            return


class _StoppingSignals:
    """Sets `stop` on SIGTERM, SIGINT and SIGHUP (Windows: SIGINT and Ctrl-Break), in this process but not in forked children.

    A second SIGTERM or SIGINT ends the process at once. A second SIGHUP does not: a closing terminal sends two. An ignored
    SIGHUP (nohup) stays ignored.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._previous: dict[int, Any] = {}
        # The name of the last signal.
        self.received = ""

    def __enter__(self) -> Self:
        close_in_child(self)
        try:
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._on_signal)
        except ValueError:
            logger.info("not in the main thread: no signal handlers are installed")
        return self

    def _on_signal(self, number: int, _frame: object) -> None:
        self.received = name = signal.Signals(number).name
        if name != "SIGHUP":
            signal.signal(number, signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)
        # In the loop: the signal may have interrupted a write to the log.
        self._loop.call_soon_threadsafe(logger.info, "received %s", name)
        self._loop.call_soon_threadsafe(self._stop.set)

    def close_inherited(self, *_: object) -> None:
        """Restore the signal handlers in a forked child."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    __exit__ = close_inherited
