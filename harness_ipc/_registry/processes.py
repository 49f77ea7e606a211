"""Process identity: a pid together with the start of its process, since pids are reused.

An identity is a JSON object: ``pid``, ``create_time`` (seconds since 1970) and on Linux ``start_ticks``, ``boot_id``,
``pid_namespace`` and ``time_namespace``, which make it exact whatever the clock was set to. A pid means something only in its
own PID namespace: an identity of another one is unknown, never a match.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from ..errors import StartFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import psutil

    Identity = dict[str, Any]

# Seconds by which two readings of one process's creation time may differ where there are no ticks.
_CLOCK_SLACK = 2.0
# What an identity has on Linux beside its pid and creation time; a process is the same only if all of them are.
_EXACT = ("start_ticks", "boot_id", "pid_namespace", "time_namespace")


def own_identity() -> Identity:
    """Return the identity of this process. Raises `StartFailed` where the system does not tell (Linux without ``/proc``)."""
    try:
        return _identify(os.getpid())
    except OSError as error:
        why = why_identity_is_unavailable() or error
        raise StartFailed(f"this process can't be identified: {why}; mount /proc in this container or chroot") from error


def process_identity(pid: int) -> Identity | None:
    """Return what tells the process `pid` from a later one with the same pid, or None if there is none or it can't be told.

    ```python
    identity = process_identity(child.pid)
    ...
    if identity is not None and is_same_process(identity):
        os.kill(identity["pid"], signal.SIGTERM)
    ```

    The identity is a JSON object: it can be written to a file and compared by another process of the same machine.
    """
    if pid != os.getpid() and why_identity_is_unavailable() is not None:
        return None
    try:
        return _identify(pid)
    except OSError:
        return None


def is_same_process(identity: Identity) -> bool:
    """Return whether the process with this `identity` still runs. False for a zombie, and where it can't be told."""
    return find_process(identity) is not None


def find_process(identity: Identity) -> psutil.Process | None:
    """Return the process with this `identity`, to signal it or to wait for it; None if it has ended or can't be told."""
    pid = identity.get("pid")
    # type(): bool is a subclass of int.
    if type(pid) is not int or pid <= 0 or why_unknown(identity) is not None:
        return None
    import psutil

    # psutil raises OverflowError for a pid that no system can have.
    with contextlib.suppress(psutil.Error, OverflowError, OSError):
        process = psutil.Process(pid)
        if _is_same(identity, _identify(pid)) and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _is_same(identity: Identity, found: Identity) -> bool:
    if "start_ticks" in found:
        return all(identity.get(key) == found[key] for key in _EXACT)
    created = identity.get("create_time")
    return type(created) in (int, float) and abs(created - found["create_time"]) < _CLOCK_SLACK


def why_unknown(identity: Identity) -> str | None:
    """Return why it can't be told here whether the process with this `identity` runs, or None if it can.

    Such a process must not be signalled: its pid may be another process's here.
    """
    if sys.platform != "linux":
        return None
    if (why := why_identity_is_unavailable()) is not None:
        return why
    if "start_ticks" not in identity:
        return "it does not say when its process started"
    for kind in ("pid", "time"):
        if identity.get(f"{kind}_namespace") != _namespace(kind):
            return f"it belongs to a process in another {'PID' if kind == 'pid' else 'time'} namespace (a container?)"
    return None


def why_identity_is_unavailable() -> str | None:
    """Return why this system can't tell processes apart, or None if it can: Linux without a usable ``/proc``."""
    if sys.platform != "linux":
        return None
    try:
        if os.readlink("/proc/self") == str(os.getpid()):
            return None
    except OSError:
        return "/proc is not mounted, so processes can't be told apart"
    return "/proc shows another PID namespace, so processes can't be told apart (mount it anew: unshare --mount-proc)"


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        # A kernel without them (time: before 5.6) has one for all.
        return ""


def _identify(pid: int) -> Identity:
    """Return the identity of the process `pid`. Raises `OSError`."""
    if sys.platform != "linux":
        import psutil

        try:
            return {"pid": pid, "create_time": psutil.Process(pid).create_time()}
        except (psutil.Error, ValueError, OverflowError) as error:
            raise ProcessLookupError(str(error)) from error
    # "self": a foreign /proc shows this process by another pid.
    with open(f"/proc/{'self' if pid == os.getpid() else pid}/stat", "rb") as file:
        # proc_pid_stat(5): field 22 is the start in clock ticks since boot; field 2, in parentheses, may contain any byte.
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    boot_id = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    # Like psutil's, but without /proc/stat, which a sandbox may hide: the start in seconds since 1970 by today's clock.
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return {
        "pid": pid,
        "create_time": booted + ticks / os.sysconf("SC_CLK_TCK"),
        "start_ticks": ticks,
        "boot_id": boot_id,
        # Of this process: one that can be seen in our /proc by its pid is known by that pid here, whatever namespace it is in.
        "pid_namespace": _namespace("pid"),
        "time_namespace": _namespace("time"),
    }
