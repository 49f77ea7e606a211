"""Process identity: a pid together with its start time, since pids are reused.

An identity is a JSON object: ``pid``, ``create_time`` (seconds since 1970) and on Linux ``start_ticks``, ``boot_id``,
``pid_namespace`` and ``time_namespace``, which make it exact even if the clock is changed. A pid is valid only in its own PID
namespace: an identity from another one is unknown, never a match.
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

# Seconds by which two readings of a creation time may differ, on systems without start ticks.
_CLOCK_SLACK = 2.0
# Additional keys on Linux: a process is the same only if all of them match.
_EXACT = ("start_ticks", "boot_id", "pid_namespace", "time_namespace")


def own_identity() -> Identity:
    """Return the identity of this process. Raises `StartFailed` if it is unavailable (Linux without ``/proc``)."""
    try:
        return _identify(os.getpid())
    except OSError as error:
        why = why_identity_is_unavailable() or error
        raise StartFailed(f"this process can't be identified: {why}; mount /proc in this container or chroot") from error


def process_identity(pid: int) -> Identity | None:
    """Return the identity of the process `pid`, or None if there is no such process or the identity is unavailable.

    ```python
    identity = process_identity(child.pid)
    ...
    if identity is not None and is_same_process(identity):
        os.kill(identity["pid"], signal.SIGTERM)
    ```

    The identity is a JSON object that other processes of the same machine can compare.
    """
    if pid != os.getpid() and why_identity_is_unavailable() is not None:
        return None
    try:
        return _identify(pid)
    except OSError:
        return None


def is_same_process(identity: Identity) -> bool:
    """Return whether the process with this `identity` still runs. False for a zombie, and if unknown."""
    return find_process(identity) is not None


def find_process(identity: Identity) -> psutil.Process | None:
    """Return the process with this `identity`, to signal or to wait for it; None if it has ended, and if unknown."""
    pid = identity.get("pid")
    # type(): bool is a subclass of int.
    if type(pid) is not int or pid <= 0 or why_unknown(identity) is not None:
        return None
    import psutil

    # psutil raises OverflowError for a pid out of range.
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
    """Return why it is unknown whether the process with this `identity` runs, or None if it can be determined.

    Such a process must not be signalled: its pid may belong to another process here.
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
    """Return why process identities are unavailable (Linux without a usable ``/proc``), or None if they are available."""
    if sys.platform != "linux":
        return None
    try:
        if os.readlink("/proc/self") == str(os.getpid()):
            return None
    except OSError:
        return "/proc is not mounted, so processes can't be identified"
    return "/proc shows another PID namespace, so processes can't be identified (remount it: unshare --mount-proc)"


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        # A kernel without namespaces of this kind (time: before 5.6).
        return ""


def _identify(pid: int) -> Identity:
    """Return the identity of the process `pid`. Raises `OSError`."""
    if sys.platform != "linux":
        import psutil

        try:
            return {"pid": pid, "create_time": psutil.Process(pid).create_time()}
        except (psutil.Error, ValueError, OverflowError) as error:
            raise ProcessLookupError(str(error)) from error
    # "self": in the /proc of another PID namespace this process has another pid.
    with open(f"/proc/{'self' if pid == os.getpid() else pid}/stat", "rb") as file:
        # proc_pid_stat(5): field 22 is the start in clock ticks since boot; field 2, in parentheses, may contain any byte.
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    boot_id = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    # As in psutil, but without /proc/stat, which a sandbox may hide: the start in seconds since 1970 by the current clock.
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return {
        "pid": pid,
        "create_time": booted + ticks / os.sysconf("SC_CLK_TCK"),
        "start_ticks": ticks,
        "boot_id": boot_id,
        # This process's own: the pid is the one seen from here, even if the process is in a nested namespace.
        "pid_namespace": _namespace("pid"),
        "time_namespace": _namespace("time"),
    }
