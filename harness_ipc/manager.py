"""Start a daemon once, stop it, restart it.

Each function acts on one generation, not just on a name. A process is signalled only if its pid and start time are those in the
record.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from . import client
from ._command import Command
from ._registry import files, lifetime, processes, records
from ._registry.locks import NameLock
from ._registry.namespace import Namespace, check_name
from ._start import StartTimeout, StartWait, start
from ._status import STATUS_TIMEOUT, DaemonStatus, probe, published_generation, sleep_until_retry
from ._transport import deadline_after
from .errors import (
    AuthenticationFailed,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    ResourceExhausted,
    StartFailed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Literal

# Seconds for a start: an app may load a model.
START_TIMEOUT = 60.0
# Seconds for a drain: the daemon's grace period, and the app's stop.
STOP_TIMEOUT = 10.0
# Seconds for a process to end after it was terminated, and then after it was killed.
_TERMINATE_PERIOD = 2.0
_KILL_PERIOD = 10.0
# Starts that find the name taken: once may be a race, repeatedly means a daemon in another directory.
_TRIES = 3


def ensure_daemon(
    name: str,
    argv: str | Sequence[str | os.PathLike[str]],
    *,
    timeout: float = START_TIMEOUT,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    version: str | None = None,
    on_mismatch: Literal["error", "restart", "accept"] = "error",
    on_unhealthy: Literal["accept", "restart"] = "accept",
    on_progress: Callable[[Any], object] | None = None,
    namespace: Namespace | None = None,
) -> DaemonStatus:
    """Start the daemon `name` with the command line `argv` unless it runs. Return its state once it runs.

    ```python
    ensure_daemon("index", "my_package.index:app")
    ensure_daemon("index", [sys.executable, "-m", "my_index"])
    ```

    `argv` is an app, "module:object", which ``harness-ipc serve`` runs with this interpreter, or the words of a command line
    whose program calls `run_daemon` with this name. If many processes call this at once, only one daemon is started. The child
    is detached; standard input is the null device, and standard output and error go to the log. `env` is added to its
    environment. `timeout` covers everything, in seconds. `version` is the required `app_version` of a running daemon; on a
    mismatch, `on_mismatch` decides whether to raise an error, restart the daemon or accept it. With `on_unhealthy="restart"`, a
    running daemon that reports that it is unhealthy (`DaemonStatus.healthy` is False) is restarted, but not one that does not
    answer. `on_progress` is called with each value that the daemon reports while it starts (`await report(value)` in its app's
    `start`); on Windows, or if another process started it, at most once a second. `run_daemon` in the child inherits
    `namespace`.

    Raises `StartFailed`, with the end of the log, as soon as the start has failed; `DaemonTimeout` if it is still starting when
    the timeout expires; `IncompatibleDaemon`, `UnsafeDirectory`, `AuthenticationFailed`, `ResourceExhausted` or `InvalidName`;
    `TypeError` for an `argv` that is another string than "module:object", and `ValueError` if it is empty.
    """
    command = Command.make(name, argv, cwd, env)
    accepted = _Accepted(version, on_mismatch, on_unhealthy)
    return _ensure(command, accepted, StartWait(check_name(name), timeout, namespace or Namespace(), on_progress))


class _Accepted(NamedTuple):
    """Which running daemons are accepted, and what is done about others: arguments of `ensure_daemon`."""

    version: str | None = None
    on_mismatch: str = "error"
    on_unhealthy: str = "accept"


def _ensure(command: Command, accepted: _Accepted, wait: StartWait) -> DaemonStatus:
    name, namespace = wait.name, wait.namespace
    files.create_private_dir(namespace.runtime_dir, tighten=True)
    # Held by the process that starts the daemon.
    lock = NameLock(os.path.join(namespace.runtime_dir, f"{name}.start"))
    tries, started_here = _TRIES, False
    try:
        if (status := _find_usable(command, accepted, wait)) is not None:
            return _with_differences(status, command, namespace)
        # Restart an unhealthy daemon only once: the new one may be unhealthy too, and in use by others.
        accepted = accepted._replace(on_unhealthy="accept")
        while not lock.try_acquire():
            wait.pause()
        while (status := _find_usable(command, accepted, wait)) is None:
            # Another process holds the name: it is starting or draining.
            if not lifetime.cleanup_endpoint(name, namespace=namespace):
                wait.pause()
            elif started_here := start(command, wait):
                # A second restart would start the same version again.
                on_mismatch = "error" if accepted.on_mismatch == "restart" else accepted.on_mismatch
                accepted = accepted._replace(on_mismatch=on_mismatch)
            elif not (tries := tries - 1):
                raise StartFailed(
                    f"{name!r} is not running in {namespace.runtime_dir}, but according to its command line it runs in another "
                    "directory: its program must call run_daemon without `namespace`, or with the same one"
                )
    except StartTimeout:
        raise _start_timeout(wait) from None
    finally:
        lock.release()
    return status if started_here else _with_differences(status, command, namespace)


def _start_timeout(wait: StartWait) -> DaemonTimeout:
    status = probe(wait.name, STATUS_TIMEOUT, wait.namespace, health=False)[0]
    doing = "no starting process has its name yet"
    if status.state == "starting" and status.since is not None:
        doing = f"pid {status.pid} has been starting for {time.time() - status.since:.1f} s"
    elif status.alive:
        doing = f"pid {status.pid} now has its name"
    elif status.state == "absent" and status.pid is not None:
        doing = f"pid {status.pid}, its predecessor, is still stopping"
    return DaemonTimeout(
        f"timed out after {wait.timeout:g} s waiting for the daemon {wait.name!r} to start: {doing}; allow a longer timeout, "
        f"or see its log {status.log_path}"
    )


def stop_daemon(name: str, *, timeout: float = STOP_TIMEOUT, namespace: Namespace | None = None) -> bool:
    """Stop the daemon `name`. Return whether there was one, after its process has ended and its lock and record are gone.

    It is asked to shut down, and has `timeout` seconds to finish requests in flight; then it is terminated, then killed. Only
    the process identified by the record is signalled, and never this process.

    Raises `DaemonTimeout` if it does not end or can't be identified, `AuthenticationFailed` if it belongs to another user,
    `IncompatibleDaemon`, `UnsafeDirectory` or `InvalidName`.
    """
    namespace = namespace or Namespace()
    try:
        record = records.read(name, again=True, namespace=namespace)
    except DaemonNotRunning:
        record = None
    is_self = record is not None and record.pid == os.getpid()
    identified = not is_self and record is not None and processes.is_same_process(record.public())
    agreed = False
    if record is not None:
        # Even if its process is not found: the key authenticates the daemon.
        agreed = (identified and record.state == records.DRAINING) or _ask_to_stop(
            record, min(timeout, STATUS_TIMEOUT), namespace
        )
        if identified:
            _end(record, timeout if agreed else 0.0)
    seconds = timeout + _KILL_PERIOD if identified or record is None else max(timeout, STATUS_TIMEOUT)
    deadline = deadline_after(seconds)
    while not lifetime.cleanup_endpoint(name, namespace=namespace):
        found = published_generation(name, namespace)
        if record is None and found is not None:
            # A removed record, which the daemon has restored.
            return stop_daemon(name, timeout=timeout, namespace=namespace)
        if record is not None and found not in (None, record.generation):
            break
        if not sleep_until_retry(deadline):
            why = "no record identifies the holder of its lock" if record is None else processes.why_unknown(record.public())
            why = "this process serves it: close its server" if is_self else why
            why = f"{why}; nothing was signalled" if why else "its lock is held by a process other than that of the record"
            raise DaemonTimeout(f"timed out after {seconds:g} s waiting for the daemon {name!r} to stop: {why}")
    return agreed or identified


def restart_daemon(
    name: str,
    *,
    timeout: float = START_TIMEOUT,
    stop_timeout: float = STOP_TIMEOUT,
    namespace: Namespace | None = None,
) -> DaemonStatus:
    """Stop the daemon `name` and start it again with the command line, directory and added environment in its record.

    It is not stopped if its program, script, module, interpreter or directory is missing. If the start fails, the record stays,
    so this can be called again.

    Raises `DaemonNotRunning` if there is no record, and what `stop_daemon` and `ensure_daemon` do.
    """
    namespace = namespace or Namespace()
    record = records.read(name, again=True, namespace=namespace)
    if not record.public().get("argv"):
        raise DaemonNotRunning(f"the record of {name!r} has no command line to start it with: start it yourself")
    if record.pid == os.getpid():
        raise StartFailed(f"this process serves {name!r}, and its command line would start all of it: close its server instead")
    command = Command.of(record)
    _check_can_start(name, command)
    try:
        stop_daemon(name, timeout=stop_timeout, namespace=namespace)
        return _ensure(command, _Accepted(), StartWait(name, timeout, namespace))
    except BaseException:
        lifetime.restore_record(record, namespace)
        raise


def _find_usable(command: Command, accepted: _Accepted, wait: StartWait) -> DaemonStatus | None:
    """Return the state of a running daemon that is accepted, or None if one has to be started. Raises `StartTimeout`."""
    name, namespace, (version, on_mismatch, on_unhealthy) = wait.name, wait.namespace, accepted
    status, error = probe(name, min(STATUS_TIMEOUT, wait.remaining()), namespace, health=on_unhealthy == "restart")
    if error is not None:
        raise error
    if not status.alive:
        return None
    is_other_version = version not in (None, status.app_version) and on_mismatch != "accept"
    if is_other_version and on_mismatch != "restart":
        found = status.app_version or "None (its run_daemon has no app_version)"
        raise IncompatibleDaemon(f"the running daemon {name!r} has version {found}, not {version}: restart it, or accept it")
    if not is_other_version and (on_unhealthy != "restart" or status.healthy is not False):
        return status
    _check_can_start(name, command)
    # Another process may have replaced it meanwhile.
    if published_generation(name, namespace) == status.generation:
        stop_daemon(name, namespace=namespace)
    return None


def _check_can_start(name: str, command: Command) -> None:
    if obstacle := command.find_obstacle():
        raise StartFailed(
            f"the daemon {name!r} was not stopped, since it can't be started again: {obstacle}; put it back, or stop it "
            "and start it in another way"
        )


def _with_differences(status: DaemonStatus, command: Command, namespace: Namespace) -> DaemonStatus:
    """Return the status of a running daemon with a `problem` that says how its start differs from `command`."""
    texts = [] if status.problem is None else [status.problem]
    with contextlib.suppress(HarnessIPCError):
        found = Command.of(records.read(status.name, namespace=namespace))
        if differences := "; ".join(found.find_differences(command)):
            texts.append(f"the running daemon was started differently: {differences}; stop it to start the requested one")
    return replace(status, problem="; ".join(texts) or None)


# Stopping.


def _ask_to_stop(record: records.Record, timeout: float, namespace: Namespace) -> bool:
    """Ask the generation of `record` to shut down. Return whether it agreed."""
    if record.state != records.READY:
        return False
    try:
        return client.shut_down(record.name, record.generation, timeout=timeout, namespace=namespace)
    except (AuthenticationFailed, ResourceExhausted):
        raise
    except HarnessIPCError:
        return False


def _end(record: records.Record, timeout: float) -> None:
    """Wait for the daemon's process to end; terminate it after `timeout` seconds, then kill it. Raises `DaemonTimeout`."""
    import psutil

    identity = record.public()
    for end, period in ((None, timeout), (psutil.Process.terminate, _TERMINATE_PERIOD), (psutil.Process.kill, _KILL_PERIOD)):
        process = processes.find_process(identity)
        try:
            if end is not None and process is not None:
                end(process)
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied as error:
            raise AuthenticationFailed(f"the daemon {record.name!r}, pid {record.pid}, is not yours to stop") from error
        deadline = deadline_after(period)
        # Does not wait for a zombie: only its parent can reap it.
        while processes.is_same_process(identity):
            if not sleep_until_retry(deadline):
                break
        else:
            return
    raise DaemonTimeout(
        f"timed out after {_KILL_PERIOD:g} s waiting for pid {record.pid} of the daemon {record.name!r} to end: it was killed, "
        "but still exists"
    )
