"""The state of a daemon, from its record, its process and its answers. Creates, changes and signals nothing."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from . import client, endpoint, messages, paths
from ._registry import processes
from ._registry.namespace import DEFAULT_APP, Namespace, log_path
from .errors import (
    AuthenticationFailed,
    ConnectionLost,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    IncompatibleDaemon,
    ResourceExhausted,
    UnsafeDirectory,
)
from .transport import deadline_after

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds for a daemon to report its state: its loop gets a quarter of one.
STATUS_TIMEOUT = 2.0
# Seconds between two polls of a state that nothing announces: the end of a process that is not our child, a held lock.
POLL_INTERVAL = 0.01
# Daemons that are asked at once.
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """What is known of the daemon `name`. Times are seconds, `since` and `uptime`'s start seconds since 1970.

    `state` is "absent", "starting", "running", "unresponsive" (it lives, but its loop is blocked or it does not answer),
    "stale" (the record of a dead process), "incompatible" (of another schema) or "forbidden" (not ours to use).
    """

    name: str
    state: str
    log_path: str
    pid: int | None = None
    since: float | None = None
    generation: str | None = None
    version: str | None = None
    app_version: str | None = None
    python: str | None = None
    uptime: float | None = None
    connections: int | None = None
    requests: int | None = None
    errors: int | None = None
    loop_lag: float | None = None
    idle: float | None = None
    detached: str | None = None
    health: dict[str, Any] | None = None
    problem: str | None = None
    app: str = DEFAULT_APP

    @property
    def alive(self) -> bool:
        """Whether the daemon's process is there and has published itself."""
        return self.state in ("running", "unresponsive")

    def to_json(self) -> dict[str, Any]:
        """Return all fields, in their order: the documented shape."""
        return asdict(self)


def daemon_status(name: str, *, timeout: float = STATUS_TIMEOUT, namespace: Namespace | None = None) -> DaemonStatus:
    """Return the state of the daemon `name`; `timeout` in seconds bounds each of the two questions to it.

    Creates and changes nothing. Raises `InvalidName`, and `ResourceExhausted` if this process has no free descriptor.
    """
    return probe(name, timeout, namespace or Namespace(), health=True)[0]


def daemon_alive(name: str, *, namespace: Namespace | None = None) -> bool:
    """Return whether the daemon `name` runs, responsive or not. Raises `InvalidName` or `ResourceExhausted`."""
    return probe(name, STATUS_TIMEOUT, namespace or Namespace(), health=False)[0].alive


def list_daemons(*, timeout: float = STATUS_TIMEOUT, namespace: Namespace | None = None) -> list[DaemonStatus]:
    """Return the states of all daemons of `namespace` that run, start or left a record, by name. Creates nothing.

    Raises `UnsafeDirectory` or `ResourceExhausted`.
    """
    namespace = namespace or Namespace()
    names = set()
    if paths.check_private_dir(namespace.runtime_dir):
        for entry in os.listdir(namespace.runtime_dir):
            stem, _, ext = entry.partition(".")
            if ext in ("json", *endpoint.PHASES) and paths.is_name(stem):
                names.add(stem)
    # At once: one that does not answer takes its timeout.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        states = list(pool.map(partial(daemon_status, timeout=timeout, namespace=namespace), sorted(names)))
    return [status for status in states if status.state != "absent" or status.pid is not None]


def probe(name: str, timeout: float, namespace: Namespace, *, health: bool) -> tuple[DaemonStatus, HarnessIPCError | None]:
    """Return the state and, if it is "incompatible" or "forbidden", the error that says so."""
    status: Callable[..., DaemonStatus] = partial(
        DaemonStatus, name, log_path=str(log_path(name, namespace=namespace)), app=namespace.app
    )
    deadline = deadline_after(timeout)
    while True:
        try:
            record = endpoint.load(name, again=True, namespace=namespace)
        except DaemonNotRunning as error:
            return _without_daemon(status, name, namespace, error), None
        except IncompatibleDaemon as error:
            return status(state="incompatible", problem=str(error)), error
        except (UnsafeDirectory, ConnectionLost) as error:
            return status(state="forbidden", problem=str(error)), error
        public = record.public()
        known = {key: public.get(key) for key in ("pid", "generation", "version", "app_version", "python", "detached")}
        began = public["started_at"]
        try:
            pong = client.request(name, {"meta": messages.PING}, timeout=timeout, namespace=namespace)
        except AuthenticationFailed as error:
            return status(state="forbidden", problem=str(error), **known), error
        except ResourceExhausted:
            # Of this process: it says nothing of the daemon.
            raise
        except HarnessIPCError as error:
            if published_generation(name, namespace) != record.generation:
                continue
            if processes.find_process(record.public()) is None:
                return _without_daemon(status, name, namespace, error), None
            # A process that is just being killed hangs up before it is gone; one that hangs answers nothing.
            if not isinstance(error, DaemonTimeout) and sleep_until_retry(deadline):
                continue
            problem = f"pid {record.pid} lives but does not answer ({error}); see its log, or stop it"
            return status(state="unresponsive", problem=problem, **known), None
        if pong.get("generation") == record.generation:
            break
    known.update({key: pong.get(key) for key in ("connections", "requests", "errors", "loop_lag", "idle")})
    known["uptime"] = max(0.0, time.time() - began)
    if not pong.get("responsive"):
        lag = float(pong.get("loop_lag") or 0.0)
        problem = f"its event loop has been blocked for {lag:.1f} s: wait, or stop it"
        return status(state="unresponsive", since=time.time() - lag, problem=problem, **known), None
    if isinstance(limit := pong.get("full"), str):
        known["problem"] = f"new requests are refused (Busy): {limit}"
    return status(state="running", since=began, health=_health(name, timeout, namespace) if health else None, **known), None


def _without_daemon(
    status: Callable[..., DaemonStatus], name: str, namespace: Namespace, error: HarnessIPCError
) -> DaemonStatus:
    """Return the state where no living process has a record: there may be one that is starting, or that drains."""
    if (noted := endpoint.find_unrecorded(name, namespace)) is not None:
        process, since, phase = noted
        if phase == "starting":
            problem = "it is starting: wait, or see its log"
            return status(state="starting", pid=process.pid, since=since, problem=problem)
        problem = f"pid {process.pid} is finishing what is in flight: wait, or stop it"
        return status(state="absent", pid=process.pid, problem=problem)
    left = os.path.lexists(os.path.join(namespace.runtime_dir, f"{name}.json"))
    return status(state="stale" if left else "absent", problem=str(error))


def _health(name: str, timeout: float, namespace: Namespace) -> dict[str, Any] | None:
    try:
        reply = client.request(name, {"meta": messages.HEALTH}, timeout=timeout, namespace=namespace)
    except HarnessIPCError as error:
        return messages.error_reply(error)
    if "error" in reply:
        return {"error": reply["error"]}
    health = reply.get("health")
    return health if isinstance(health, dict) else None


def published_generation(name: str, namespace: Namespace) -> str | None:
    """Return the generation that the record of `name` names now, if there is one."""
    try:
        return endpoint.load(name, again=True, namespace=namespace).generation
    except HarnessIPCError:
        return None


def sleep_until_retry(deadline: float) -> bool:
    """Wait a moment for what nothing announces. Return whether there was time left."""
    time.sleep(POLL_INTERVAL)
    return time.monotonic() < deadline
