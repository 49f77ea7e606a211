"""Support for tests of daemons: a private namespace, and daemons that are stopped at the end of a block.

The pytest fixtures `ipc_namespace` and `ipc_daemon` use this module, which does not need pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from . import startup
from ._aclient import aconnect_daemon
from ._registry import processes, records
from ._registry.namespace import Namespace
from ._server.server import start_daemon_server
from ._status import daemon_alive, sleep_until_retry
from ._transport import deadline_after
from .client import connect_daemon
from .daemon import check_app
from .errors import AlreadyRunning, HarnessIPCError
from .manager import STOP_TIMEOUT, ensure_daemon, stop_daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from ._aclient import AsyncClient
    from ._server.requests import Handler
    from .client import Client
    from .daemon import App

# The longest temporary directory in bytes: a socket's path has 38 more, and macOS allows 103.
_MAX_TEMPORARY_DIR = 60
# Seconds for child processes of a daemon to end after it.
EXIT_PERIOD = 5.0


class RunningDaemon(NamedTuple):
    """A daemon that is running for a test."""

    name: str
    namespace: Namespace

    def connect(self, **options: Any) -> Client:
        """Connect to the daemon: see `connect_daemon`."""
        return connect_daemon(self.name, namespace=self.namespace, **options)

    async def aconnect(self, **options: Any) -> AsyncClient:
        """Connect to the daemon: see `aconnect_daemon`."""
        return await aconnect_daemon(self.name, namespace=self.namespace, **options)


@contextlib.contextmanager
def private_namespace() -> Iterator[Namespace]:
    """Yield a namespace with new directories. At the end of the block, stop the daemons in and below it, and remove it.

    Raises `AssertionError` if child processes of its daemons are still running (they are killed), or a daemon could not be
    stopped. If the block raises, that is added to the error as a note.
    """
    long = os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) > _MAX_TEMPORARY_DIR
    directory = "/tmp" if long else None  # noqa: S108 - a new directory in it, with mode 0700
    with tempfile.TemporaryDirectory(prefix="hi-", dir=directory, ignore_cleanup_errors=os.name == "nt") as base:
        namespace = Namespace(runtime_dir=os.path.join(base, "run"), log_dir=os.path.join(base, "log"))
        with _ending(lambda: _end_below(namespace.runtime_dir)):
            yield namespace


@contextlib.contextmanager
def running(
    app: App | Handler | str | Sequence[str], name: str = "test", *, namespace: Namespace | None = None, **options: Any
) -> Iterator[RunningDaemon]:
    """Run the daemon `name` for the length of the block. Yield it once it is ready.

    ```python
    with running(Words()) as daemon, daemon.connect() as client:
        assert client.call("count", text="the quick brown fox") == 4
    ```

    An `app` as for `run_daemon` is served by an event loop in a thread of this process; `options` are those of
    `start_daemon_server`. ``"package.module:app"`` (imported with this process's `sys.path`), or the command line of a program
    that calls `run_daemon` with this `name`, runs in a new process; `options` are those of `ensure_daemon`. The default
    `namespace` is a private one.

    Raises `AlreadyRunning`, what `ensure_daemon` or the app's `start` and `stop` raise, and `AssertionError` if processes are
    left running.
    """
    with contextlib.ExitStack() as stack:
        namespace = namespace or stack.enter_context(private_namespace())
        if isinstance(app, (str, Sequence)):
            if daemon_alive(name, namespace=namespace):
                raise AlreadyRunning(f"the daemon {name!r} is already running: give this one another name")
            if isinstance(app, str):
                options["env"] = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(options.get("env") or {})}
            ensure_daemon(name, app, namespace=namespace, **options)
            stack.enter_context(_ending(lambda: _end_daemons([name], namespace)))
        else:
            stack.enter_context(_in_thread(app, name, namespace, options))
        yield RunningDaemon(name, namespace)


@contextlib.asynccontextmanager
async def serving(
    app: App | Handler, name: str = "test", *, namespace: Namespace | None = None, **options: Any
) -> AsyncIterator[RunningDaemon]:
    """Run the daemon `name` in the running event loop for the length of the block. `options`: see `start_daemon_server`.

    Raises what the app's `start` or `stop` and `start_daemon_server` raise. Use a blocking client only in another thread.
    """
    functions = check_app(app)
    with contextlib.ExitStack() as stack:
        namespace = namespace or stack.enter_context(private_namespace())
        try:
            await functions.start()
            server, _ = await start_daemon_server(
                functions.handle, name, health=functions.health, namespace=namespace, **options
            )
            async with server:
                yield RunningDaemon(name, namespace)
        finally:
            await functions.stop()


@contextlib.contextmanager
def _in_thread(app: App | Handler, name: str, namespace: Namespace, options: dict[str, Any]) -> Iterator[None]:
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    ended: Future[None] = Future()

    async def main() -> None:
        stop = asyncio.Event()
        async with serving(app, name, namespace=namespace, **{"on_shutdown": stop.set, **options}):
            started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(main())
            ended.set_result(None)
        except BaseException as error:
            (ended if started.done() else started).set_exception(error)

    def end() -> list[str]:
        with contextlib.suppress(RuntimeError):  # its loop is closed: it was shut down
            loop.call_soon_threadsafe(stop.set)
        thread.join(STOP_TIMEOUT)
        if thread.is_alive():
            return [f"the thread of the daemon {name!r} did not end within {STOP_TIMEOUT:g} s"]
        ended.result()
        return []

    # A daemon thread: an app that hangs must not keep pytest from ending.
    thread = threading.Thread(target=run, name=f"harness-ipc-{name}", daemon=True)
    thread.start()
    loop, stop = started.result()
    with _ending(end):
        yield


@contextlib.contextmanager
def _ending(end: Callable[[], list[str]]) -> Iterator[None]:
    """Call `end` after the block, and raise `AssertionError` with the texts it returns, or add them to an error as notes."""
    try:
        yield
    except BaseException as error:
        for text in end():
            error.add_note(text)
        raise
    if left := end():
        raise AssertionError("; ".join(left))


def _end_below(directory: str) -> list[str]:
    """Stop the daemons of all namespaces in and below a runtime directory. Return a text for each that was left running."""
    left: list[str] = []
    others: list[psutil.Process] = []
    for place, _, files in os.walk(directory):
        names = {file.partition(".")[0] for file in files if file.endswith(".lock")}
        left += _end_daemons(sorted(names), Namespace(runtime_dir=place))
        if any(file.endswith(".start") for file in files):
            # A start may have failed before there was a record.
            others = list(psutil.process_iter())
    return left + _end_processes([process.pid for process in others if _was_started_below(directory, process)])


def _end_daemons(names: Iterable[str], namespace: Namespace) -> list[str]:
    """Stop the daemons, and kill child processes left running. Return a text for each."""
    left: list[str] = []
    children: list[int] = []
    for name in names:
        with contextlib.suppress(HarnessIPCError, psutil.Error):
            process = processes.find_process(records.read(name, again=True, namespace=namespace).public())
            if process is not None and process.pid == os.getpid():
                left.append(f"left running: the daemon {name!r} of this process: close its server")
                continue
            children += [child.pid for child in process.children(recursive=True)] if process else []
        try:
            stop_daemon(name, timeout=STOP_TIMEOUT, namespace=namespace)
        except HarnessIPCError as error:
            left.append(f"left running: {error}")
    return left + _end_processes(children)


def _end_processes(pids: list[int]) -> list[str]:
    """Wait for processes to end, and kill those that do not. Return a text for each."""
    identities = [identity for pid in pids if (identity := processes.process_identity(pid)) is not None]
    deadline = deadline_after(EXIT_PERIOD)
    while (alive := list(filter(None, map(processes.find_process, identities)))) and sleep_until_retry(deadline):
        pass
    left = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            left.append(f"left running, and killed: pid {process.pid}, {shlex.join(process.cmdline())}")
            process.kill()
    return left


def _was_started_below(directory: str, process: psutil.Process) -> bool:
    """Return whether the process, or its ancestor, was started by `ensure_daemon` for a namespace in or below `directory`."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        start = json.loads(process.environ().get(startup.VARIABLE, "{}"))
        return os.path.commonpath([directory, start.get("runtime_dir", "")]) == directory
    return False
