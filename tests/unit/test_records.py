"""Records of any schema: valid, or a typed error that never quotes them."""

from __future__ import annotations

import errno
import json
import os
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from harness_ipc._registry import files, records
from harness_ipc._registry.lifetime import Registration
from harness_ipc._server.server import acquire_name
from harness_ipc.errors import DaemonNotRunning, HarnessIPCError, IncompatibleDaemon, StartFailed, UnsafeDirectory
from tests.support.marks import needs_posix, needs_root

MISSING = object()
LASTING = ("schema", "name", "generation", "address", "authkey", "pid", "create_time", "start_ticks", "boot_id")


@pytest.fixture
def run(private_directories: Path) -> Path:
    """The runtime directory, which exists."""
    path = private_directories / "run"
    files.create_private_dir(str(path))
    return path


@pytest.fixture
def starting(run: Path) -> Iterator[Registration]:
    """A registration of the name `d` by this process."""
    registration = acquire_name("d", environment={"COLOUR": "red"})
    try:
        yield registration
    finally:
        registration.release()


@pytest.fixture
def ready(starting: Registration) -> Registration:
    starting.publish(app_version="1.0", max_message=1000)
    return starting


def write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    files.write_private_file(str(path), data)


def fields_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))


def fail(number: int) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def load_error(key: str) -> HarnessIPCError:
    """Return the error of loading, after checking that it quotes no part of the key."""
    with pytest.raises(HarnessIPCError) as caught:
        records.load("d")
    text = "".join(traceback.format_exception(caught.value))
    assert not any(key[start : start + 8] in text for start in range(len(key) - 7))
    return caught.value


# States.


def test_a_record_is_loaded_as_it_was_published(ready: Registration, run: Path) -> None:
    record = records.load("d")
    assert record.authkey == ready.record.authkey
    assert len(record.authkey) == 32
    assert record.public() == ready.record.public()
    assert (record.name, record.pid, record.max_message, record.public()["app_version"]) == ("d", os.getpid(), 1000, "1.0")
    assert {path.name for path in run.iterdir()} == {"d.json", "d.lock"}


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_record_that_is_not_ready_has_no_key(state: str, starting: Registration, run: Path) -> None:
    if state == "draining":
        starting.publish(app_version=None, max_message=1000)
        starting.drain()
    record = records.read("d")
    assert (record.state, record.authkey) == (state, b"")
    assert "authkey" not in fields_of(run / "d.json")
    for field in ("generation", "address", "pid"):
        assert getattr(record, field) == getattr(starting.record, field)
    assert record.public()["argv"] == starting.record.public()["argv"] != []
    assert record.public()["cwd"] == os.getcwd()
    assert record.environment == {"COLOUR": "red"}
    with pytest.raises(DaemonNotRunning, match="'d'"):
        records.load("d")


def test_each_change_of_state_is_seen_immediately(run: Path) -> None:
    generations = set()
    for _ in range(20):
        registration = acquire_name("d")
        for _ in range(2):
            assert records.read("d").state == "starting"
        registration.publish(app_version=None, max_message=1000)
        for _ in range(2):
            assert records.load("d").generation == registration.record.generation
        registration.drain()
        assert records.read("d").state == "draining"
        registration.release()
        with pytest.raises(DaemonNotRunning):
            records.read("d")
        record = registration.record
        generations |= {record.generation, record.address}
    assert len(generations) == 40


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o777])
def test_record_and_lock_are_private_whatever_the_umask(mask: int, run: Path) -> None:
    previous = os.umask(mask)
    try:
        registration = acquire_name("d")
        registration.publish(app_version=None, max_message=1000)
    finally:
        os.umask(previous)
    assert [stat.S_IMODE(path.stat().st_mode) for path in run.iterdir()] == [0o600, 0o600]
    registration.release()


def test_neither_key_nor_values_of_the_environment_are_shown(ready: Registration) -> None:
    record = records.load("d")
    assert record.public()["environment"] == ["COLOUR"]
    for shown in (repr(record), str(record), f"{record}", json.dumps(record.public()), repr(ready), str(vars(ready))):
        assert record.authkey.hex() not in shown
        assert repr(record.authkey)[2:-1] not in shown
        assert "red" not in shown


def test_a_record_above_the_limit_is_a_failed_start(run: Path) -> None:
    with pytest.raises(StartFailed, match="262144"):
        acquire_name("d", environment={"LARGE": "x" * 262_144})
    assert {path.name for path in run.iterdir()} == {"d.lock"}
    acquire_name("d").release()


# Other schemas.


@pytest.mark.parametrize("schema", [1, 3, 10**30])
def test_any_schema_with_the_lasting_fields_can_be_reached(schema: int, ready: Registration, run: Path) -> None:
    fields = fields_of(run / "d.json")
    lasting = {key: fields[key] for key in LASTING if key in fields}
    write(run / "d.json", json.dumps({**lasting, "schema": schema, "state": 7, "argv": "python", "later": {}}).encode())
    with pytest.raises(IncompatibleDaemon, match="schema"):
        records.load("d")
    record = records.load("d", any_schema=True)
    assert (record.schema, record.address, record.authkey) == (schema, ready.record.address, ready.record.authkey)
    assert "argv" not in record.public()


@pytest.mark.parametrize("schema", [0, 1, 3, -1, 10**30])
def test_another_schema_without_common_fields_is_incompatible(schema: int, ready: Registration, run: Path) -> None:
    key = ready.record.authkey.hex()
    for fields in ({"schema": schema}, {**fields_of(run / "d.json"), "schema": schema, "pid": "1"}):
        write(run / "d.json", json.dumps(fields).encode())
        assert type(load_error(key)) is IncompatibleDaemon


# Damaged records.


def test_without_a_record_no_daemon_is_running(run: Path) -> None:
    with pytest.raises(DaemonNotRunning, match="'d'"):
        records.load("d")


def test_a_truncated_record_is_not_running(ready: Registration, run: Path) -> None:
    key = ready.record.authkey.hex()
    whole = (run / "d.json").read_bytes().rstrip()
    # Under Wine each takes 20 ms.
    for size in range(0, len(whole), 1 if os.name == "posix" else 7):
        write(run / "d.json", whole[:size])
        assert type(load_error(key)) is DaemonNotRunning, size
    write(run / "d.json", whole)
    assert records.load("d").authkey.hex() == key


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"\0" * 700,
        b"\xff\xfe{\0}\0",
        b"\x80\x04K\x01.",
        b"null",
        b"[]",
        b"{}",
        b'"d"',
        b"1" * 5000,
        b"[" * 100_000,
        b'{"schema":' * 20_000,
        b"{" + b" " * 300_000 + b"}",
    ],
    ids=lambda data: ascii(data[:12]),
)
def test_an_invalid_record_is_not_running(data: bytes, run: Path) -> None:
    write(run / "d.json", data)
    with pytest.raises(DaemonNotRunning, match="damaged"):
        records.load("d")


def wrong_fields() -> Iterator[tuple[str, Any]]:
    nan, infinity = float("nan"), float("inf")
    for text in ("name", "generation", "family", "address", "authkey", "version", "python", "state"):
        yield from ((text, value) for value in (MISSING, None, True, 1, nan, ["d"], {}))
    for number in ("create_time", "started_at"):
        yield from ((number, value) for value in (MISSING, None, True, "1", nan, infinity, 10**400, [1], {}))
    yield from (("pid", value) for value in (MISSING, None, True, False, "1", 0, -1, nan, infinity, 1.5, [1], {}))
    yield from (("max_message", value) for value in (MISSING, None, True, "1", 0, -1, nan, 1.5, {}))
    yield from (("argv", value) for value in (MISSING, None, True, "python", 1, {}, [1]))
    yield from (("environment", value) for value in (MISSING, None, [], {"A": 1}))
    yield from [("cwd", None), ("cwd", 1), ("cwd", [])]
    # A part of the real key, which must not be quoted.
    yield from (("authkey", change) for change in (lambda key: key[1:], lambda key: key + "0", lambda key: "z" + key[1:]))
    yield from (("authkey", value) for value in ("", "ab" * 31, "ab" * 33, "zz" * 32, " " * 64, "é" * 64))
    yield from (("address", value) for value in ("", "a\0b", "\ud800"))
    yield from (("name", value) for value in ("", "other", "../d", "D"))
    yield from (("schema", value) for value in (MISSING, None, True, "1", nan, [], {}))


@pytest.mark.parametrize(
    ("field", "value"), list(wrong_fields()), ids=lambda value: "missing" if value is MISSING else ascii(value)[:20]
)
def test_a_record_with_one_wrong_field_is_not_running(field: str, value: Any, ready: Registration, run: Path) -> None:
    key = ready.record.authkey.hex()
    fields = fields_of(run / "d.json")
    if value is MISSING:
        del fields[field]
    else:
        fields[field] = value(fields[field]) if callable(value) else value
    write(run / "d.json", json.dumps(fields).encode())
    assert type(load_error(key)) is DaemonNotRunning


def test_fields_of_a_later_version_are_ignored(ready: Registration, run: Path) -> None:
    write(run / "d.json", json.dumps({**fields_of(run / "d.json"), "later": {"a": [1]}}).encode())
    assert records.load("d").generation == ready.record.generation


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ENAMETOOLONG], ids=errno.errorcode.get)
def test_a_record_that_cannot_be_read_is_a_typed_error(
    call: str, number: int, ready: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail(number))
        with pytest.raises(HarnessIPCError) as caught:
            records.load("d")
    assert os.strerror(number) in str(caught.value)
    # It says nothing about the daemon, which may be running.
    assert not isinstance(caught.value, DaemonNotRunning)


@needs_posix
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "0644", "directory 0750"])
def test_a_record_open_to_others_is_refused(kind: str, ready: Registration, run: Path) -> None:
    key = ready.record.authkey.hex()
    assert records.load("d")
    path = run / "d.json"
    match kind:
        case "link":
            path.rename(run / "target")
            path.symlink_to(run / "target")
        case "fifo":
            path.unlink()
            os.mkfifo(path, 0o600)
        case "directory":
            path.unlink()
            path.mkdir(0o700)
        case "0644":
            path.chmod(0o644)
        case _:
            run.chmod(0o750)
    assert type(load_error(key)) is UnsafeDirectory


@needs_root
@pytest.mark.parametrize("whose", ["run", "run/d.json"])
def test_a_strangers_record_is_refused(whose: str, ready: Registration, run: Path) -> None:
    key = ready.record.authkey.hex()
    assert records.load("d")
    os.chown(run.parent / whose, 12345, 12345)
    assert type(load_error(key)) is UnsafeDirectory
