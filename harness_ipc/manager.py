"""Start a daemon once, stop it, restart it.

Each of these acts on one generation, never on a name alone: a process is signalled only if it is the one that the record
names, by pid and start.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import time
from typing import TYPE_CHECKING

from . import client, startup
from ._descriptors import open_standard_streams
from ._registry import files, lifetime, processes, records
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
# Seconds between two looks for the record of a child that says nothing.
_LOOK_INTERVAL = 0.05
# The line before each start, and entries of the log that tell of no fault.
_OWN_LINE = re.compile(r"--- |\d{4}-\d\d-\d\d \S+ (DEBUG|INFO) ")


class _StartTimeout(Exception):
    """The deadline of a start has passed."""


def ensure_daemon(
    name: str,
    argv: Sequence[str | os.PathLike[str]],
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
    is detached, has the null device as standard input, and its standard output and error go into the log. `env` is added
    to its environment; `timeout` is seconds for everything. `version` is what the running daemon's `app_version` must be: if it
    is not, `on_mismatch` says whether that is an error, the daemon is restarted, or accepted. `namespace` says where the daemon
    is; `run_daemon` in the child takes it from here.

    Raises `StartFailed` as soon as the start has failed, with the log's tail; `DaemonTimeout` if it goes on at the deadline;
    `IncompatibleDaemon`, `UnsafeDirectory`, `AuthenticationFailed`, `ResourceExhausted` or `InvalidName`; `TypeError` or
    `ValueError` for a command line that is a string, or empty.
    """
    argv = _words(argv)
    deadline = deadline_after(timeout)
    namespace = namespace or Namespace()
    files.tighten_dir(namespace.runtime_dir)
    if (status := _usable(name, version, on_mismatch, deadline, namespace)) is not None:
        return status
    import filelock

    directory = namespace.runtime_dir
    files.create_private_dir(directory)
    # Held by the one process that starts; it is no daemon's lock, so `mode` and place are all that it shares with that.
    lock = filelock.FileLock(os.path.join(directory, f"{name}.start"), mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=remaining(deadline), poll_interval=POLL_INTERVAL)
    except filelock.Timeout:
        raise _still_starting(name, timeout, namespace) from None
    except OSError as error:
        raise StartFailed(
            f"the lock {lock.lock_file} can't be taken: {error.strerror}; set HARNESS_IPC_RUNTIME_DIR to a directory that you "
            "can write"
        ) from error
    try:
        tries = _TRIES
        while (status := _usable(name, version, on_mismatch, deadline, namespace)) is None:
            # A process that has the name is starting, or still draining.
            if lifetime.cleanup_endpoint(name, namespace=namespace):
                tries -= not _start(name, argv, env, cwd, deadline, namespace)
                if not tries:
                    raise StartFailed(
                        f"{name!r} is not running in {directory}, but its command line says that it is, somewhere: its program "
                        "must call run_daemon without `namespace`, or with the same one"
                    )
            elif not sleep_until_retry(deadline):
                raise _still_starting(name, timeout, namespace)
        return status
    except _StartTimeout:
        raise _still_starting(name, timeout, namespace) from None
    finally:
        lock.release()


def stop_daemon(name: str, *, timeout: float = STOP_TIMEOUT, namespace: Namespace | None = None) -> bool:
    """End the daemon `name`, and return whether there was one, when its process is gone, its lock free and its record removed.

    It is asked to, and has `timeout` seconds to finish what is in flight; then it is terminated, then killed. Only the very
    process that the record names is ever signalled.

    Raises `DaemonTimeout` if it does not end, because the system holds it or it can't be identified, `AuthenticationFailed` if
    it is not ours, `IncompatibleDaemon`, `UnsafeDirectory` or `InvalidName`.
    """
    namespace = namespace or Namespace()
    record: records.Record | None = None
    process, asked = None, False
    with contextlib.suppress(DaemonNotRunning):
        record = records.read(name, again=True, namespace=namespace)
    if record is not None:
        process = processes.find_process(record.public())
        # Also if its process is not found: the key proves that the daemon is the record's.
        draining = record.state == records.DRAINING and process is not None
        asked = draining or _ask_to_stop(record, min(timeout, STATUS_TIMEOUT), namespace)
    if process is not None:
        _end(name, process, timeout if asked else 0.0)
    unknown = record is not None and process is None
    deadline = deadline_after(max(timeout, STATUS_TIMEOUT) if unknown else timeout + _KILL_PERIOD)
    while not lifetime.cleanup_endpoint(name, namespace=namespace):
        found = published_generation(name, namespace)
        if record is None and found is not None:
            # Its record had been removed, and it has made it again.
            return stop_daemon(name, timeout=timeout, namespace=namespace)
        if record is not None and found is not None and found != record.generation:
            break
        if not sleep_until_retry(deadline):
            raise DaemonTimeout(f"the daemon {name!r} does not end: {_why_not_signalled(record)}")
    return asked or process is not None


def _why_not_signalled(record: records.Record | None) -> str:
    why = "no record says which process has its lock" if record is None else processes.why_unknown(record.public())
    return f"{why}; nothing was signalled" if why else "another process than the record's has its lock"


def restart_daemon(
    name: str,
    *,
    timeout: float = START_TIMEOUT,
    stop_timeout: float = STOP_TIMEOUT,
    namespace: Namespace | None = None,
) -> DaemonStatus:
    """Stop the daemon `name` and start it again with the command line, the directory and the added environment of its record.

    Raises `DaemonNotRunning` if there is no record, and what `stop_daemon` and `ensure_daemon` do.
    """
    namespace = namespace or Namespace()
    record = records.read(name, again=True, namespace=namespace)
    argv, cwd = record.public().get("argv"), record.public().get("cwd")
    if not argv:
        raise DaemonNotRunning(f"the record of {name!r} has no command line to start it with: start it yourself")
    stop_daemon(name, timeout=stop_timeout, namespace=namespace)
    return ensure_daemon(name, argv, timeout=timeout, cwd=cwd, env=record.environment, namespace=namespace)


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

    Raises `StartFailed` and `_StartTimeout`.
    """
    # A pipe to the child must not get the number of a stream.
    open_standard_streams()
    log = str(log_path(name, namespace=namespace))
    descriptor = files.open_private_log(log)
    try:
        banner = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {ascii(shlex.join(argv))[1:-1]}\n"
        offset = os.fstat(descriptor).st_size
        places = {"runtime_dir": namespace.runtime_dir, "log_dir": namespace.log_dir}
        start = {**places, "argv": argv, "cwd": _absolute(cwd), "env": sorted(env or {})}
        try:
            os.write(descriptor, banner.encode())
        except OSError as error:
            raise files.log_failure(log, "written", error) from error
        try:
            child = startup.Child(argv, start=start, environment={**os.environ, **(env or {})}, cwd=cwd, log=descriptor)
        except (OSError, ValueError) as error:
            raise _not_executable(argv[0], cwd, error) from error
    finally:
        os.close(descriptor)
    try:
        message = _next_message(name, child, deadline, namespace)
        state = message.get("state")
        if state == "published" or message.get("type") == AlreadyRunning.__name__:
            return state == "published"
        if state == "refused":
            raise _not_executable(argv[0], cwd, OSError(message["errno"], os.strerror(message["errno"])))
        if state == "ended":
            raise _start_failed(name, f"it {_ending(message['status'])} before it was ready", log, offset, quote=True)
        if state == "failed":
            # It has yet to print its traceback.
            _wait_for_exit(child)
            why, type_name, reason = (str(message.get(key, "")) for key in ("message", "type", "reason"))
            raise _start_failed(name, why, log, offset, type=type_name, reason=reason)
        if (place := (message.get("name"), message.get("directory"))) != (name, namespace.runtime_dir):
            child.process.terminate()
            _wait_for_exit(child)
            raise _start_failed(name, f"its command line starts the daemon {place[0]!r} in {place[1]}", log, offset)
        return True
    finally:
        child.close()


def _next_message(name: str, child: startup.Child, deadline: float, namespace: Namespace) -> startup.StartMessage:
    """Return the child's first message, or what is seen of one that sends none: "published", or "ended" with its "status".

    Raises `_StartTimeout`.
    """
    while True:
        ended = child.process.poll() is not None
        if (message := child.next_message(min(_LOOK_INTERVAL, remaining(deadline)))) is not None:
            return message
        # A program that closed what it inherited, or whose wrapper did.
        if published_generation(name, namespace) and probe(name, STATUS_TIMEOUT, namespace, health=False)[0].alive:
            return {"state": "published"}
        # One that made itself a daemon has ended well, and has left the process that will be it.
        if ended and not (child.process.returncode == 0 and child.has_descendants()):
            return {"state": "ended", "status": child.process.returncode}
        if not sleep_until_retry(deadline):
            raise _StartTimeout


def _wait_for_exit(child: startup.Child) -> None:
    deadline = deadline_after(_EXIT_PERIOD)
    while child.process.poll() is None and sleep_until_retry(deadline):
        pass


def _ending(status: int) -> str:
    """Return how a process ended that has this `returncode`."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _absolute(cwd: str | None) -> str | None:
    """Return the directory that a child is started in, or None where it was removed."""
    with contextlib.suppress(OSError):
        return os.path.abspath(cwd or os.getcwd())
    return None


def _not_executable(program: str, cwd: str | None, error: Exception) -> StartFailed:
    text = error.strerror if isinstance(error, OSError) else error
    return StartFailed(f"{program!a} can't be started: {text}; check the command and the directory {cwd}")


def _start_failed(
    name: str, why: str, log: str, offset: int, *, quote: bool = False, type: str = "", reason: str = ""
) -> StartFailed:
    """Return the error. `quote` the last line of the log too: there a program that just dies says why."""
    tail = ""
    with contextlib.suppress(OSError), files.open_log_for_reading(log) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LOG_TAIL, offset if offset < size else 0))
        tail = file.read().decode("utf-8", "backslashreplace")
    # What it printed last, not what we logged.
    lines = [line for line in tail.splitlines() if line.strip() and not _OWN_LINE.match(line)]
    if quote and lines:
        reason = lines[-1].strip()
        why = f"{why} ({ascii(reason)[1:-1]})"
    text = f"the daemon {name!r} did not start: {' '.join(why.split())}; see its log {log}"
    return StartFailed(text, log_tail=tail, type=type, reason=reason)


def _still_starting(name: str, timeout: float, namespace: Namespace) -> DaemonTimeout:
    status = probe(name, STATUS_TIMEOUT, namespace, health=False)[0]
    doing = "another process is starting it, or its predecessor has not ended"
    if status.state == "starting" and status.since is not None:
        doing = f"pid {status.pid} has been starting for {time.time() - status.since:.1f} s"
    return DaemonTimeout(
        f"timed out after {timeout:g} s waiting for the daemon {name!r} to start: {doing}; allow a longer timeout, or see its "
        f"log {log_path(name, namespace=namespace)}"
    )


def _words(argv: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the command line `argv`. Raises `TypeError` and `ValueError`."""
    if isinstance(argv, (str, bytes, os.PathLike)):
        raise TypeError(
            f"argv must be a list of words, not {argv!r}: write [sys.executable, '-m', 'package'], or use shlex.split"
        )
    words = [os.fsdecode(word) for word in argv]
    if not words:
        raise ValueError("argv is empty: write a program and its arguments, as [sys.executable, '-m', 'package']")
    return words


# Stopping.


def _ask_to_stop(record: records.Record, timeout: float, namespace: Namespace) -> bool:
    """Ask that generation to shut down, and no other. Return whether it said that it will."""
    if record.state != records.READY:
        return False
    try:
        return client.shut_down(record.name, record.generation, timeout=timeout, namespace=namespace)
    except (AuthenticationFailed, ResourceExhausted):
        raise
    except HarnessIPCError:
        return False


def _end(name: str, process: psutil.Process, timeout: float) -> None:
    import psutil

    for send_signal, period in ((None, timeout), (process.terminate, _TERMINATE_PERIOD), (process.kill, _KILL_PERIOD)):
        try:
            if send_signal is not None:
                send_signal()
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
