"""The state of a daemon, from its record, its process and its replies. Creates, changes and signals nothing."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from . import client
from ._protocol import messages
from ._registry import files, processes, records
from ._registry.namespace import DEFAULT_APP, Namespace, is_name, log_path
from ._transport import deadline_after
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

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds for a daemon to answer. A ping waits 0.25 s of them for the daemon's event loop.
STATUS_TIMEOUT = 2.0
# Seconds between polls, for the end of a process that is not our child, or for a lock.
_POLL_INTERVAL = 0.01
# Daemons that are queried concurrently.
_MAX_CONCURRENT = 8
# Fields that are copied from the record.
_RECORD_FIELDS = ("pid", "generation", "version", "app_version", "python", "detached", "argv", "cwd", "environment", "progress")


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The state of the daemon `name`. Times are in seconds.

    `state` is "absent", "starting", "running", "unresponsive" (alive, but its loop is blocked or it does not answer), "stale"
    (the record of a dead process), "incompatible" (of another schema) or "forbidden" (unsafe, or another user's). `since`, in
    seconds since 1970, is when the daemon began to start or, if it is "unresponsive", when its loop was blocked; None if
    unknown. `uptime` counts from the beginning of the start too. `argv` and `cwd` are those of the start, `environment` has the
    names of the variables that the starter added. `health` is the result of the app's `health`, or has its error. `healthy` is
    False if the app's `health` raised an error or returned an "error", True if it returned anything else, and None if the app
    has no `health` or did not answer. `progress` is the last progress of a start, at most a second old.
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
    argv: list[str] | None = None
    cwd: str | None = None
    environment: list[str] | None = None
    app: str = DEFAULT_APP
    healthy: bool | None = None
    progress: Any = None

    @property
    def alive(self) -> bool:
        """Whether the daemon runs, responsive or not."""
        return self.state in ("running", "unresponsive")

    def to_json(self) -> dict[str, Any]:
        """Return all fields, in order."""
        return asdict(self)


def daemon_status(name: str, *, timeout: float = STATUS_TIMEOUT, namespace: Namespace | None = None) -> DaemonStatus:
    """Return the state of the daemon `name`; `timeout` in seconds applies to each of two requests, ping and health.

    Creates and changes nothing. Raises `InvalidName`, `ResourceExhausted` if this process has no free descriptor, and like
    `Namespace` `UnsafeDirectory` if the directory can't be determined.
    """
    return probe(name, timeout, namespace or Namespace(), health=True)[0]


def daemon_alive(name: str, *, namespace: Namespace | None = None) -> bool:
    """Return whether the daemon `name` runs, responsive or not. Raises what `daemon_status` does."""
    return probe(name, STATUS_TIMEOUT, namespace or Namespace(), health=False)[0].alive


def list_daemons(*, timeout: float = STATUS_TIMEOUT, namespace: Namespace | None = None) -> list[DaemonStatus]:
    """Return the states of all daemons of `namespace` that have a record, sorted by name. Creates nothing.

    Raises `UnsafeDirectory` or `ResourceExhausted`.
    """
    namespace = namespace or Namespace()
    entries = (entry.partition(".") for entry in files.list_private_dir(namespace.runtime_dir))
    names = {stem for stem, _, ext in entries if ext == "json" and is_name(stem)}
    # Concurrently: one that does not answer takes the whole timeout.
    with ThreadPoolExecutor(_MAX_CONCURRENT) as pool:
        states = list(pool.map(partial(daemon_status, timeout=timeout, namespace=namespace), sorted(names)))
    return [status for status in states if status.state != "absent" or status.pid is not None]


def probe(name: str, timeout: float, namespace: Namespace, *, health: bool) -> tuple[DaemonStatus, HarnessIPCError | None]:
    """Return the state and, if it is "incompatible" or "forbidden", the error."""
    status: Callable[..., DaemonStatus] = partial(
        DaemonStatus, name, log_path=str(log_path(name, namespace=namespace)), app=namespace.app
    )
    deadline = deadline_after(timeout)
    while True:
        try:
            record = records.read(name, again=True, namespace=namespace)
        except DaemonNotRunning as error:
            left = os.path.lexists(os.path.join(namespace.runtime_dir, f"{name}.json"))
            return status(state="stale" if left else "absent", problem=str(error)), None
        except IncompatibleDaemon as error:
            return status(state="incompatible", problem=str(error)), error
        except (UnsafeDirectory, ConnectionLost) as error:
            return status(state="forbidden", problem=str(error)), error
        known = {key: value for key, value in record.public().items() if key in _RECORD_FIELDS}
        try:
            pong = client.request(name, {"meta": messages.PING}, timeout=timeout, namespace=namespace)
        except AuthenticationFailed as error:
            return status(state="forbidden", problem=str(error), **known), error
        except ResourceExhausted:
            # A problem of this process, not of the daemon.
            raise
        except HarnessIPCError as error:
            if published_generation(name, namespace) != record.generation:
                continue
            found = _without_answer(record, error)
            if found["state"] == "stale":
                # The pid may have been reused.
                known.pop("pid")
            answer = status(**found, **known)
            # A killed process closes its connections before it disappears: retry. A hanging one times out instead.
            if answer.alive and not isinstance(error, DaemonTimeout) and sleep_until_retry(deadline):
                continue
            if record.schema == records.SCHEMA or not answer.alive:
                return answer, None
            break
        # The daemon may have become ready, or been replaced, since the record was read.
        if pong.get("generation") == record.generation and record.state == records.READY:
            break
    if record.schema != records.SCHEMA:
        incompatible = records.incompatible(record.schema)
        return status(state="incompatible", problem=str(incompatible), **known), incompatible
    found = _with_answer(record, pong)
    if health and found["state"] == "running":
        found["health"], found["healthy"] = _ask_health(name, timeout, namespace)
    return status(**known, **found), None


def _with_answer(record: records.Record, pong: dict[str, Any]) -> dict[str, Any]:
    """Return the status fields of a daemon that has answered a ping with `pong`."""
    found = {key: pong.get(key) for key in ("connections", "requests", "errors", "loop_lag", "idle")}
    since = record.public()["started_at"]
    found["uptime"] = max(0.0, time.time() - since)
    if not pong.get("responsive"):
        lag = float(pong.get("loop_lag") or 0.0)
        problem = f"its event loop has been blocked for {lag:.1f} s: wait, or stop it"
        return {**found, "state": "unresponsive", "since": time.time() - lag, "problem": problem}
    if isinstance(limit := pong.get("full"), str):
        found["problem"] = f"new requests are refused (Busy): {limit}"
    return {**found, "state": "running", "since": since}


def _without_answer(record: records.Record, error: HarnessIPCError) -> dict[str, Any]:
    """Return the status fields of a daemon that does not answer: it is dead, starting, draining, or hangs."""
    public = record.public()
    is_alive = processes.is_same_process(public)
    unknown = None if is_alive else processes.why_unknown(public)
    if not is_alive and not (unknown and isinstance(error, DaemonTimeout)):
        return {"state": "stale", "problem": f"{error} ({unknown})" if unknown else str(error)}
    if record.state == records.STARTING:
        return {"state": "starting", "since": public.get("started_at"), "problem": "it is starting: wait, or see its log"}
    if record.state == records.DRAINING:
        return {"state": "absent", "problem": f"pid {record.pid} is finishing requests in flight: wait, or stop it"}
    problem = f"pid {record.pid} is alive but does not answer ({error}); see its log, or stop it"
    if unknown:
        problem = f"it does not answer ({error}), and can't be signalled from here: {unknown}"
    return {"state": "unresponsive", "problem": problem}


def _ask_health(name: str, timeout: float, namespace: Namespace) -> tuple[dict[str, Any] | None, bool | None]:
    """Return `DaemonStatus.health` and `DaemonStatus.healthy`."""
    try:
        reply = client.request(name, {"meta": messages.HEALTH}, timeout=timeout, namespace=namespace)
    except HarnessIPCError as error:
        return messages.error_reply(error), None
    health = {"error": reply["error"]} if "error" in reply else reply.get("health")
    return (health, "error" not in health) if isinstance(health, dict) else (None, None)


def published_generation(name: str, namespace: Namespace) -> str | None:
    """Return the generation in the current record of `name`, or None."""
    try:
        return records.read(name, again=True, namespace=namespace).generation
    except HarnessIPCError:
        return None


def sleep_until_retry(deadline: float) -> bool:
    """Wait until the next poll. Return False if the deadline has passed."""
    time.sleep(_POLL_INTERVAL)
    return time.monotonic() < deadline
