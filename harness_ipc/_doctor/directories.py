"""Checks of directories: privacy, free space, file system, length of paths."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING

from .._registry import files, trust
from .._registry.namespace import private_temporary_dir, runtime_root
from .._transport import listen
from ..errors import UnsafeDirectory
from .finding import Finding, quote, set_variable, without_remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._registry.namespace import Namespace

# Free bytes below which the disk counts as full.
_LOW_SPACE = 1024 * 1024
# File systems on which locks, atomic renames or sockets may fail. WSL mounts Windows disks as 9p.
_NETWORK = re.compile(r"(fuse\.)?(nfs\d?|cifs|smb\w*|afs|afpfs|9p|ceph|glusterfs|lustre|gpfs|beegfs|davfs|webdav|sshfs|s3fs)")


def runtime_directory(namespace: Namespace) -> Iterator[Finding]:
    """Check the runtime directory."""
    why = runtime_root()[1]
    yield _directory("runtime directory", namespace.runtime_dir, why, "HARNESS_IPC_RUNTIME_DIR", 0o077)


def log_directory(namespace: Namespace) -> Iterator[Finding]:
    """Check the directory of logs."""
    variable = "HARNESS_IPC_LOG_DIR"
    why = f"{variable} is set" if os.environ.get(variable) else "the platform's directory for logs"
    if namespace.log_dir.startswith(namespace.runtime_dir):
        why = "in the runtime directory, since HOME is not a directory"
    # Others may read its directory but not write to it, as in `open_private_log`.
    finding = _directory("log directory", namespace.log_dir, why, variable, files.LOG_DIRECTORY)
    if finding.level == "ok" and sys.platform == "win32" and _is_of_store() and "\\appdata\\" in namespace.log_dir.lower():
        text = f"{finding.text}; Python from the Store sees a private copy of AppData, so other programs don't find the logs"
        finding = Finding("warning", "log directory", text, set_variable(variable, r"%USERPROFILE%\.harness-ipc\log"))
    yield finding


def _is_of_store() -> bool:
    return "\\windowsapps\\" in f"{sys.base_prefix}\\".lower()


def _directory(topic: str, path: str, why: str, variable: str, forbidden: int) -> Finding:
    try:
        exists = files.check_private_dir(path, forbidden=forbidden)
        trust.check_ancestors(path)
    except UnsafeDirectory as error:
        return Finding("failure", topic, f"{without_remedy(error)} ({why})", error.remedy)
    elsewhere = set_variable(variable, "<a directory of your own on a local disk>")
    text, place = f"{path} ({why})", path
    if exists:
        if sys.platform != "win32":
            info = os.stat(path)
            text += f", owner uid {info.st_uid}, mode {info.st_mode & 0o7777:04o}"
            if info.st_mode & 0o300 != 0o300:
                return Finding("failure", topic, f"{text}: you can't write there", f"chmod 700 {quote(path)}")
    else:
        # A missing Windows drive has no parent.
        while not os.path.lexists(place) and place != os.path.dirname(place):
            place = os.path.dirname(place)
        text += ", will be created at the first start"
    if not os.path.isdir(place):
        return Finding("failure", topic, f"{text}, but {place} is not a directory", elsewhere)
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return Finding("failure", topic, f"{text}, but {place} can't be written", trust.chown_remedy(path) or elsewhere)
    kind = _file_system(place)
    if kind is not None:
        text += f", on {kind}"
        if _NETWORK.fullmatch(kind):
            return Finding("warning", topic, f"{text}, a network file system: locks and sockets may fail there", elsewhere)
    if (free := shutil.disk_usage(place).free) < _LOW_SPACE:
        return Finding("warning", topic, f"{text}: its disk is full ({free} bytes free): make room", elsewhere)
    return Finding("ok", topic, text)


def _file_system(path: str) -> str | None:
    if sys.platform == "win32":
        return None
    import psutil

    try:
        partitions = psutil.disk_partitions(all=True)
    except OSError:
        # Linux without /proc.
        return None
    real = os.path.realpath(path) + "/"
    # The last first: a later mount hides an earlier one at the same path.
    mounts = [
        (len(mount.mountpoint), mount.fstype)
        for mount in reversed(partitions)
        if real.startswith(mount.mountpoint.rstrip("/") + "/")
    ]
    return max(mounts, key=lambda mount: mount[0])[1] if mounts else None


if sys.platform == "win32":

    def socket_path(_: Namespace) -> Iterator[Finding]:
        """Yield nothing: a pipe is not in the file system."""
        return iter(())

else:
    MAX_ADDRESS = listen.MAX_ADDRESS

    def socket_path(namespace: Namespace) -> Iterator[Finding]:
        """Check the length of the path of a socket."""
        topic = "socket path"
        length = socket_length(namespace.runtime_dir)
        if length <= MAX_ADDRESS:
            yield Finding("ok", topic, f"{length} bytes, the operating system allows {MAX_ADDRESS}")
            return
        short = private_temporary_dir()
        text = f"{length} bytes in the runtime directory, the operating system allows {MAX_ADDRESS}"
        remedy = set_variable("HARNESS_IPC_RUNTIME_DIR", "<a directory with a shorter path>")
        if socket_length(short) > MAX_ADDRESS:
            yield Finding("failure", topic, f"{text}, and {short} is too long as well", remedy)
            return
        fallback = _directory(topic, short, "the short directory for sockets", "HARNESS_IPC_RUNTIME_DIR", 0o077)
        yield Finding(fallback.level, topic, f"{text}: instead, {fallback.text}", fallback.remedy)

    def socket_length(directory: str) -> int:
        """Return the bytes of the path of a socket in `directory`."""
        return len(os.fsencode(os.path.join(directory, f"{0:016x}.sock")))
