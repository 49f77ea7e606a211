"""The record of a daemon: the file ``<name>.json`` in the runtime directory, which describes it to other processes.

Its `state` is "starting", "ready" (clients can connect) or "draining". It contains the key only while it is ready. This module
reads records; `lifetime` writes them.
"""

from __future__ import annotations

import json
import os

from ..errors import DaemonNotRunning, IncompatibleDaemon
from . import files
from .namespace import private_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .namespace import Namespace

SCHEMA = 2
_STATES = STARTING, READY, DRAINING = "starting", "ready", "draining"
# The limit of a record in bytes: it takes about 700, plus argv and the added environment.
MAX_RECORD = 256 * 1024

# Seconds since 1970: the year 9999, the last one of datetime.
_END_OF_TIME = 253_402_300_800
_KEY_BYTES = 32

_TEXT, _NUMBER, _INTEGER = (str,), (int, float), (int,)
_Types = dict[str, tuple[type, ...]]
# Part of every schema: with these fields any version can ping, report and stop a daemon of any other version.
_LASTING: _Types = {**dict.fromkeys(("name", "generation", "address"), _TEXT), "pid": _INTEGER, "create_time": _NUMBER}
_REQUIRED: _Types = {
    **dict.fromkeys(("family", "version", "python", "state"), _TEXT),
    "started_at": _NUMBER,
    "argv": (list,),
    "environment": (dict,),
}
# `authkey`, `start_ticks` and `boot_id` are part of every schema too. Only Linux has the latter two; `cwd` may be removed.
_OPTIONAL: _Types = {
    **dict.fromkeys(("authkey", "boot_id", "pid_namespace", "time_namespace", "app_version", "cwd", "detached"), _TEXT),
    **dict.fromkeys(("start_ticks", "max_message"), _INTEGER),
    "leaves_cwd": (bool,),
    # The last progress that the app reported during its start: any JSON.
    "progress": (str, int, float, bool, list, dict),
}


class Record:
    """How to reach one generation of a daemon, and its description.

    `authkey` has 32 bytes, or 0 if the record is not ready. `max_message` is the limit of a message to the daemon in bytes.
    `environment` has the variables that the starter added, with values: do not show them.
    """

    __slots__ = (
        *("schema", "state", "name", "generation", "address", "family", "pid"),
        *("authkey", "max_message", "environment", "_fields"),
    )

    def __init__(self, fields: dict[str, Any]) -> None:
        """Validate the fields of a record, of any schema. Raises `ValueError`, which quotes none of the values."""
        self.schema: int = fields["schema"]
        required, optional = (_LASTING | _REQUIRED, _OPTIONAL) if self.schema == SCHEMA else (_LASTING, _OPTIONAL | _REQUIRED)
        # type(): bool is a subclass of int.
        wrong = {key for key, kinds in required.items() if type(fields.get(key)) not in kinds}
        odd = {key for key, kinds in optional.items() if key in fields and type(fields[key]) not in kinds}
        if wrong or (odd and self.schema == SCHEMA):
            raise ValueError(f"its {min(wrong or odd)} is missing or of a wrong type")
        # In another schema the field may have another meaning.
        fields = {key: value for key, value in fields.items() if key not in odd}
        self.authkey = bytes.fromhex(fields.pop("authkey", ""))
        state = fields.get("state")
        self.state: str = state if state in _STATES else READY if self.authkey else STARTING
        self.name: str = fields["name"]
        self.generation: str = fields["generation"]
        self.address: str = fields["address"]
        self.family: str | None = fields.get("family")
        self.pid: int = fields["pid"]
        self.max_message: int = fields.get("max_message", MAX_RECORD)
        self.environment: dict[str, str] = fields.get("environment", {})
        self._fields = fields
        # As in the key derivation. Raises UnicodeError, a ValueError.
        self.address.encode("utf-8", "surrogateescape")
        possible = self.pid > 0 and self.max_message > 0 and self.address != "" and "\0" not in self.address
        possible &= all(0 <= fields.get(key, 0) < _END_OF_TIME for key in ("create_time", "started_at"))
        possible &= len(self.authkey) in (0, _KEY_BYTES)
        if self.schema == SCHEMA:
            possible &= self.state == state and (self.state != READY or (self.authkey != b"" and "max_message" in fields))
            possible &= all(isinstance(word, str) for word in (*fields["argv"], *self.environment.values()))
        if not possible:
            raise ValueError("one of its values is impossible")

    def public(self) -> dict[str, Any]:
        """Return the fields without secrets: no authkey, and only the names of the environment."""
        return {**self._fields, "environment": sorted(self.environment)}

    def replace(self, **changes: Any) -> Record:
        """Return this record with `changes`; a field that becomes None is removed."""
        fields = {**self._fields, "authkey": self.authkey.hex(), **changes}
        return Record({key: value for key, value in fields.items() if value is not None})

    def to_json(self) -> bytes:
        """Return the content of the record's file, with the authkey if it is ready."""
        key = {"authkey": self.authkey.hex()} if self.state == READY else {}
        return json.dumps({**self._fields, **key}, indent=1).encode("ascii") + b"\n"

    def __repr__(self) -> str:
        return f"<Record {self.name!r} generation={self.generation!r} pid={self.pid} address={self.address!r}>"


# The last record read, by path, with the file's fingerprint. Parsing is most of the cost of finding a daemon. A file with the
# same fingerprint is the same record, since each change creates a new file.
_last_read: dict[str, tuple[tuple[int, ...], Record]] = {}


def load(name: str, *, again: bool = False, any_schema: bool = False, namespace: Namespace | None = None) -> Record:
    """Return the record of the daemon `name` if clients can connect to it. `again` reads it even if it seems unchanged.

    Raises what `read` does, `DaemonNotRunning` if the daemon is starting or draining, and `IncompatibleDaemon` if the record
    has another schema, unless `any_schema`.
    """
    record = read(name, again=again, namespace=namespace)
    if record.state != READY:
        doing = "still starting" if record.state == STARTING else "stopping"
        raise DaemonNotRunning(f"the daemon {name!r} is {doing}, or was killed meanwhile: see its log, or start it again")
    if record.schema != SCHEMA and not any_schema:
        raise incompatible(record.schema)
    return record


def read(name: str, *, again: bool = False, namespace: Namespace | None = None) -> Record:
    """Return the record of the daemon `name` in any state. Creates nothing.

    Raises `DaemonNotRunning` if there is none or if it is damaged, `IncompatibleDaemon` for an unknown schema, and
    `UnsafeDirectory` if another user could have written or read it.
    """
    path = private_path(name, "json", namespace)
    try:
        # Before the content: if the record is replaced in between, it is read again next time.
        fingerprint = files.file_fingerprint(path)
        last = _last_read.get(path)
        if last is not None and last[0] == fingerprint and not again:
            return last[1]
        record = read_file(path, name)
    except FileNotFoundError:
        raise DaemonNotRunning(f"no daemon {name!r} is running: start it first") from None
    except ValueError as error:
        raise DaemonNotRunning(
            f"the record {path} is damaged ({error}): start the daemon {name!r} again, which replaces it"
        ) from None
    _last_read[path] = fingerprint, record
    return record


def read_file(path: str, name: str) -> Record:
    """Return the record of `name` in the file `path`.

    Raises `ValueError`, which never quotes the file, `IncompatibleDaemon` if it has another schema and lacks a field of every
    schema, and what `files.read_private_file` does.
    """
    data = files.read_private_file(path, MAX_RECORD)
    if len(data) > MAX_RECORD:
        raise ValueError(f"it is larger than {MAX_RECORD} bytes")
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or type(schema := fields.get("schema")) is not int:
        raise ValueError("it is not a JSON object with a schema")
    try:
        record = Record(fields)
    except ValueError:
        if schema == SCHEMA:
            raise
        raise incompatible(schema) from None
    if record.name != name:
        raise ValueError("it is the record of another daemon")
    return record


def incompatible(schema: int) -> IncompatibleDaemon:
    """Return the error for a record of another `schema`."""
    return IncompatibleDaemon(
        f"the daemon's record has schema {str(schema)[:20]}, this version knows {SCHEMA}: "
        "use the version of harness_ipc that started the daemon, or stop it and start it again"
    )


def new_generation_id() -> str:
    """Return a new random id of a generation: 32 hexadecimal digits."""
    return os.urandom(16).hex()
