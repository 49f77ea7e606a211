"""Start a daemon once, stop it, restart it.

Each of these acts on one generation, never on a name alone: a process is signalled only if it is the one that the record
names, by pid and start.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from typing import TYPE_CHECKING

from . import client, endpoint, messages, paths, startup
from ._registry import processes
from ._registry.namespace import Namespace, log_path
from ._status import POLL_INTERVAL, STATUS_TIMEOUT, DaemonStatus, probe, published_generation, sleep_until_retry
from .errors import (
    AlreadyRunning,
    AuthenticationFailed,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    ResourceExhausted,
    StartFailed,
)
from .transport import deadline_after, remaining

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    import psutil

# Seconds for a start: an app may load a model or wait for a browser.
START_TIMEOUT = 60.0
# Seconds for a drain: the daemon's own grace period, and what its app needs to let go.
STOP_TIMEOUT = 10.0
# Seconds for a process that was told to terminate, and for the system to end one that was killed.
_TERMINATE_PERIOD = 2.0
_KILL_PERIOD = 10.0
# Starts that may find that somebody has just taken the name by hand: once is bad luck, more are another directory's daemon.
_TRIES = 3
# Seconds for a child that has said why it fails to print its traceback and end.
_EXIT_PERIOD = 2.0
# Bytes.
_LOG_TAIL = 4096


def ensure_daemon(
    name: str,
    argv: Sequence[str],
    *,
    timeout: float = START_TIMEOUT,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    version: str | None = None,
    on_mismatch: Literal["error", "restart", "accept"] = "error",
    namespace: Namespace | None = None,
) -> DaemonStatus:
    """Return the state of the daemon `name`, once it runs: it is started with the command line `argv` if it does not.

    ```python
    ensure_daemon("index", [sys.executable, "-m", "my_index"])
    ```

    The program calls `run_daemon`, with this name. However many processes call this at once, one daemon is started; the child
    is detached, has the null device as standard input and output, and its standard error goes into the log. `env` is added
    to its environment; `timeout` is seconds for everything. `version` is what the running daemon's `app_version` must be: if it
    is not, `on_mismatch` says whether that is an error, the daemon is restarted, or accepted. `namespace` says where the daemon
    is; `run_daemon` in the child takes it from here.

    Raises `StartFailed` as soon as the start has failed, with the log's tail; `DaemonTimeout` if it goes on at the deadline;
    `IncompatibleDaemon`, `UnsafeDirectory`, `AuthenticationFailed`, `ResourceExhausted` or `InvalidName`.
    """
    deadline = deadline_after(timeout)
    namespace = namespace or Namespace()
    if (status := _usable(name, version, on_mismatch, deadline, namespace)) is not None:
        return status
    import filelock

    directory = namespace.runtime_dir
    paths.create_private_dir(directory)
    # Held by the one process that starts; it is no daemon's lock, so `mode` and place are all that it shares with that.
    lock = filelock.FileLock(os.path.join(directory, f"{name}.start"), mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=remaining(deadline), poll_interval=POLL_INTERVAL)
    except filelock.Timeout:
        raise _still_starting(name, namespace) from None
    except OSError as error:
        raise StartFailed(
            f"the lock {lock.lock_file} can't be taken: {error.strerror}; set HARNESS_IPC_RUNTIME_DIR to a directory that you "
            "can write"
        ) from error
    try:
        tries = _TRIES
        while (status := _usable(name, version, on_mismatch, deadline, namespace)) is None:
            # Whoever holds the lifetime lock is starting, or still draining.
            if endpoint.cleanup_endpoint(name, namespace=namespace):
                tries -= not _start(name, argv, env, cwd, deadline, namespace)
                if not tries:
                    raise StartFailed(
                        f"{name!r} is not running in {directory}, but its command line says that it is, somewhere: its program "
                        "must call run_daemon without `namespace`, or with the same one"
                    )
            elif not sleep_until_retry(deadline):
                raise _still_starting(name, namespace)
        return status
    finally:
        lock.release()


def stop_daemon(name: str, *, timeout: float = STOP_TIMEOUT, namespace: Namespace | None = None) -> bool:
    """End the daemon `name`, and return whether there was one, when its process is gone, its lock free and its record removed.

    It is asked to, and has `timeout` seconds to finish what is in flight; then it is terminated, then killed. Only the very
    process that the record names is ever signalled.

    Raises `DaemonTimeout` if the system does not end it, `AuthenticationFailed` if it is not ours, `IncompatibleDaemon`,
    `UnsafeDirectory` or `InvalidName`.
    """
    namespace = namespace or Namespace()
    generation = None
    try:
        record = endpoint.load(name, again=True, namespace=namespace)
        generation = record.generation
        process = processes.find_process(record.public())
    except DaemonNotRunning:
        noted = endpoint.find_unrecorded(name, namespace)
        process = noted[0] if noted is not None else None
        asked = noted is not None and noted[2] == "draining"
    else:
        # Also if its process is not found: a clock that was set since makes it look like another. The key proves it.
        asked = _ask_to_stop(name, generation, min(timeout, STATUS_TIMEOUT), namespace)
    if process is not None:
        _end(name, process, timeout if asked else 0.0)
    deadline = deadline_after(timeout + _KILL_PERIOD)
    while not endpoint.cleanup_endpoint(name, namespace=namespace) and not _is_taken_over(name, generation, namespace):
        if not sleep_until_retry(deadline):
            raise DaemonTimeout(f"the daemon {name!r} does not end: a process that no record names still holds its lock")
    return asked or process is not None


def restart_daemon(
    name: str,
    *,
    timeout: float = START_TIMEOUT,
    stop_timeout: float = STOP_TIMEOUT,
    namespace: Namespace | None = None,
) -> DaemonStatus:
    """Stop the daemon `name` and start it again with the command line and the directory of its record.

    Raises `DaemonNotRunning` if there is no record, and what `stop_daemon` and `ensure_daemon` do.
    """
    namespace = namespace or Namespace()
    record = endpoint.load(name, again=True, namespace=namespace).public()
    argv, cwd = record["argv"], record.get("cwd")
    if not (argv and all(isinstance(word, str) for word in argv) and isinstance(cwd, str | None)):
        raise DaemonNotRunning(f"the record of {name!r} has no command line to start it with: start it yourself")
    stop_daemon(name, timeout=stop_timeout, namespace=namespace)
    return ensure_daemon(name, argv, timeout=timeout, cwd=cwd, namespace=namespace)


def _usable(name: str, version: str | None, on_mismatch: str, deadline: float, namespace: Namespace) -> DaemonStatus | None:
    """Return the state of a daemon that is there and may be used, or None if one has to be started."""
    status, error = probe(name, min(STATUS_TIMEOUT, remaining(deadline)), namespace, health=False)
    if error is not None:
        raise error
    if not status.alive:
        return None
    if version is None or status.app_version == version or on_mismatch == "accept":
        return status
    if on_mismatch != "restart":
        raise IncompatibleDaemon(
            f"the daemon {name!r} that runs has version {status.app_version}, not {version}: restart it, or accept it"
        )
    stop_daemon(name, namespace=namespace)
    return None


# Starting.


def _start(
    name: str,
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    cwd: str | None,
    deadline: float,
    namespace: Namespace,
) -> bool:
    """Start the daemon and wait until it is ready. Return False if another process already has the name.

    Raises `StartFailed` and `DaemonTimeout`.
    """
    log = str(log_path(name, namespace=namespace))
    descriptor = paths.open_private_log(log)
    try:
        banner = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {ascii(shlex.join(argv))[1:-1]}\n"
        start = os.fstat(descriptor).st_size
        try:
            os.write(descriptor, banner.encode())
            environment = {**os.environ, **(env or {})}
            places = {"runtime_dir": namespace.runtime_dir, "log_dir": namespace.log_dir}
            child = startup.Child(argv, places=places, environment=environment, cwd=cwd, stderr=descriptor)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else error
            raise StartFailed(f"{argv[0]!a} can't be started: {text}; check the command and the directory {cwd}") from error
    finally:
        os.close(descriptor)
    try:
        word = child.next_word(remaining(deadline))
    except TimeoutError:
        raise _still_starting(name, namespace) from None
    if word is None:
        # Most likely it ends. If not, it closed what it had inherited.
        while child.process.poll() is None:
            if probe(name, STATUS_TIMEOUT, namespace, health=False)[0].alive:
                return True
            if not sleep_until_retry(deadline):
                raise _still_starting(name, namespace)
        raise _start_failed(
            name, f"it ended with status {child.process.returncode} before it was ready", log, start, quote=True
        )
    if word.get("state") == "failed":
        if word.get("type") == AlreadyRunning.__name__:
            return False
        # It has yet to print its traceback.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(_EXIT_PERIOD)
        raise _start_failed(name, str(word.get("message")), log, start)
    if (place := (word.get("name"), word.get("directory"))) != (name, namespace.runtime_dir):
        child.process.terminate()
        raise _start_failed(name, f"its command line starts the daemon {place[0]!r} in {place[1]}", log, start)
    return True


def _start_failed(name: str, why: str, log: str, start: int, *, quote: bool = False) -> StartFailed:
    """Return the error. `quote` the last line of the log too: there a program that just dies says why."""
    tail = ""
    with contextlib.suppress(OSError), paths.open_log_for_reading(log) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LOG_TAIL, start if start < size else 0))
        tail = file.read().decode("utf-8", "backslashreplace")
    last = tail.rstrip().rpartition("\n")[2]
    if quote and not last.startswith("---"):
        why = f"{why} ({ascii(last)[1:-1]})"
    return StartFailed(f"the daemon {name!r} did not start: {' '.join(why.split())}; see its log {log}", log_tail=tail)


def _still_starting(name: str, namespace: Namespace) -> DaemonTimeout:
    start = endpoint.load_phase(name, "starting", namespace)
    since = f"it has been starting for {time.time() - start[1]:.1f} s" if start else "somebody is still starting or ending it"
    log = log_path(name, namespace=namespace)
    return DaemonTimeout(f"the daemon {name!r} is not ready: {since}; allow a longer timeout, or see its log {log}")


# Stopping.


def _ask_to_stop(name: str, generation: str, timeout: float, namespace: Namespace) -> bool:
    """Ask that generation to shut down, and no other. Return whether it said that it will."""
    try:
        with client.connect_daemon(name, timeout=timeout, namespace=namespace) as daemon:
            if daemon.generation != generation:
                return False
            return "shutdown" in daemon.request({"meta": messages.SHUTDOWN}, timeout=timeout)
    except (AuthenticationFailed, ResourceExhausted):
        raise
    except HarnessIPCError:
        return False


def _end(name: str, process: psutil.Process, timeout: float) -> None:
    import psutil

    for signal, period in ((None, timeout), (process.terminate, _TERMINATE_PERIOD), (process.kill, _KILL_PERIOD)):
        try:
            if signal is not None:
                signal()
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied as error:
            raise AuthenticationFailed(f"the daemon {name!r}, pid {process.pid}, is not yours to stop") from error
        if _has_ended(process, period):
            return
    raise DaemonTimeout(f"pid {process.pid} of the daemon {name!r} does not end though it was killed: the system holds it")


def _has_ended(process: psutil.Process, period: float) -> bool:
    import psutil

    deadline = time.monotonic() + period
    while True:
        try:
            # A zombie has ended: it only waits for its parent to hear of it.
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_INTERVAL)


def _is_taken_over(name: str, generation: str | None, namespace: Namespace) -> bool:
    """Return whether a later generation than that one has the name, or is about to."""
    published = published_generation(name, namespace)
    if published is None:
        return endpoint.load_phase(name, "starting", namespace) is not None
    return published != generation
