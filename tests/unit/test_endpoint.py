"""The endpoint record: whole or refused in a typed error, never quoted, and discarded by its own generation only."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from harness_ipc import Namespace, endpoint, paths, transport
from harness_ipc.errors import (
    AlreadyRunning,
    DaemonNotRunning,
    HarnessIPCError,
    IncompatibleDaemon,
    StartFailed,
    UnsafeDirectory,
)
from tests.marks import needs_posix, needs_root

MISSING = object()


@pytest.fixture
def run(private_directories: Path) -> Path:
    """The runtime directory, made."""
    path = private_directories / "run"
    paths.create_private_dir(str(path))
    return path


def new_generation(name: str = "d", *, address: str | None = None) -> endpoint.Generation:
    identity = endpoint.new_generation_id()
    return endpoint.Generation(
        name,
        family=transport.FAMILY,
        address=address or transport.new_address(Namespace().runtime_dir, identity),
        generation=identity,
        app_version="1.0",
        max_message=1000,
    )


def publish(name: str = "d", *, address: str | None = None) -> endpoint.Record:
    generation = new_generation(name, address=address)
    generation.publish()
    return generation.record


def write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    paths.write_private_file(str(path), data)


def fields_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in directory.iterdir()}


def fail(number: int) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def load_error(key: str) -> HarnessIPCError:
    """Return the error with which loading ends, after a look that it quotes no part of the key."""
    with pytest.raises(HarnessIPCError) as caught:
        endpoint.load("d")
    told = "".join(traceback.format_exception(caught.value))
    assert not any(key[start : start + 8] in told for start in range(len(key) - 7))
    return caught.value


# Publish and load.


def test_what_is_published_is_what_is_loaded(run: Path) -> None:
    generation = new_generation()
    with pytest.raises(DaemonNotRunning):
        endpoint.load("d")
    generation.publish()
    record = endpoint.load("d")
    assert record.authkey == generation.record.authkey
    assert len(record.authkey) == 32
    assert record.public() == generation.record.public()
    assert (record.name, record.pid, record.max_message, record.public()["app_version"]) == ("d", os.getpid(), 1000, "1.0")
    assert [path.name for path in run.iterdir()] == ["d.json"]


def test_each_generation_has_an_address_and_a_key_of_its_own(run: Path) -> None:
    records = [publish() for _ in range(3)]
    for field in ("address", "authkey", "generation"):
        assert len({getattr(record, field) for record in records}) == 3


def test_what_is_loaded_is_what_is_there_now_and_not_what_was_loaded_before(run: Path) -> None:
    for _ in range(50):
        generation = new_generation()
        generation.publish()
        for _ in range(2):
            assert endpoint.load("d").generation == generation.record.generation
    generation.discard()
    with pytest.raises(DaemonNotRunning):
        endpoint.load("d")


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o777])
def test_the_record_is_private_from_the_first_byte_on(mask: int, run: Path) -> None:
    previous = os.umask(mask)
    try:
        generation = new_generation()
    finally:
        os.umask(previous)
    assert [stat.S_IMODE(path.stat().st_mode) for path in run.iterdir()] == [0o600]
    generation.publish()
    assert [stat.S_IMODE(path.stat().st_mode) for path in run.iterdir()] == [0o600]


def test_the_key_is_shown_nowhere(run: Path) -> None:
    generation = new_generation()
    generation.publish()
    record = endpoint.load("d")
    for shown in (repr(record), str(record), f"{record}", json.dumps(record.public()), repr(generation), str(vars(generation))):
        assert record.authkey.hex() not in shown
        assert repr(record.authkey)[2:-1] not in shown


@pytest.mark.parametrize("what", ["open", "write", "replace"])
def test_a_full_disk_is_a_failed_start_that_leaves_nothing(what: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    before = content(run)
    if what == "write":
        if sys.platform == "win32":
            pytest.skip("only POSIX limits the size of a process's files")
        import resource

        # The real thing: files of this process may not grow above 100 bytes.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR"):
                new_generation()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        with monkeypatch.context() as patched:
            patched.setattr(os, what, fail(errno.ENOSPC))
            with pytest.raises(StartFailed, match=os.strerror(errno.ENOSPC)):
                new_generation().publish()
    assert content(run) == before


# Damaged records.


def test_no_record_is_no_daemon(run: Path) -> None:
    with pytest.raises(DaemonNotRunning, match="'d'"):
        endpoint.load("d")


def test_every_torn_record_is_no_daemon(run: Path) -> None:
    key = publish().authkey.hex()
    whole = (run / "d.json").read_bytes().rstrip()
    for size in range(len(whole)):
        write(run / "d.json", whole[:size])
        assert type(load_error(key)) is DaemonNotRunning, size
    write(run / "d.json", whole)
    assert endpoint.load("d").authkey.hex() == key


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
def test_what_is_no_record_is_no_daemon(data: bytes, run: Path) -> None:
    write(run / "d.json", data)
    with pytest.raises(DaemonNotRunning, match="damaged"):
        endpoint.load("d")


def wrong_fields() -> Iterator[tuple[str, Any]]:
    nan, infinity = float("nan"), float("inf")
    for text in ("name", "generation", "family", "address", "authkey", "version", "python", "state"):
        yield from ((text, value) for value in (MISSING, None, True, 1, nan, ["d"], {}))
    for number in ("create_time", "started_at"):
        yield from ((number, value) for value in (MISSING, None, True, "1", nan, infinity, 10**400, [1], {}))
    yield from (("pid", value) for value in (MISSING, None, True, False, "1", 0, -1, nan, infinity, 1.5, [1], {}))
    yield from (("max_message", value) for value in (MISSING, None, True, "1", 0, -1, nan, 1.5, {}))
    yield from (("argv", value) for value in (MISSING, None, True, "python", 1, {}))
    # Of the real key: it must not be quoted.
    yield from (("authkey", change) for change in (lambda key: key[1:], lambda key: key + "0", lambda key: "z" + key[1:]))
    yield from (("authkey", value) for value in ("", "ab" * 31, "ab" * 33, "zz" * 32, " " * 64, "é" * 64))
    yield from (("address", value) for value in ("", "a\0b", "\ud800"))
    yield from (("name", value) for value in ("", "other", "../d", "D"))
    yield from (("schema", value) for value in (MISSING, None, True, "1", nan, [], {}))


@pytest.mark.parametrize(
    ("field", "value"), list(wrong_fields()), ids=lambda value: "missing" if value is MISSING else ascii(value)[:20]
)
def test_a_record_with_one_wrong_field_is_no_daemon(field: str, value: Any, run: Path) -> None:
    key = publish().authkey.hex()
    fields = fields_of(run / "d.json")
    if value is MISSING:
        del fields[field]
    else:
        fields[field] = value(fields[field]) if callable(value) else value
    write(run / "d.json", json.dumps(fields).encode())
    assert type(load_error(key)) is DaemonNotRunning


@pytest.mark.parametrize("schema", [0, 2, -1, 10**30])
def test_a_record_of_another_schema_is_incompatible_whatever_else_it_says(schema: int, run: Path) -> None:
    key = publish().authkey.hex()
    for fields in ({"schema": schema}, {**fields_of(run / "d.json"), "schema": schema}):
        write(run / "d.json", json.dumps(fields).encode())
        assert type(load_error(key)) is IncompatibleDaemon


def test_fields_of_a_later_version_do_not_disturb(run: Path) -> None:
    record = publish()
    write(run / "d.json", json.dumps({**fields_of(run / "d.json"), "later": {"a": [1]}}).encode())
    assert endpoint.load("d").generation == record.generation


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ENAMETOOLONG], ids=errno.errorcode.get)
def test_a_record_that_cannot_be_read_is_a_typed_error(
    call: str, number: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail(number))
        with pytest.raises(HarnessIPCError) as caught:
            endpoint.load("d")
    assert os.strerror(number) in str(caught.value)
    # It says nothing about the daemon, which may well run.
    assert not isinstance(caught.value, DaemonNotRunning)


@needs_posix
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "0644", "directory 0750"])
def test_a_record_that_others_could_have_planted_or_read_is_refused(kind: str, run: Path) -> None:
    key = publish().authkey.hex()
    assert endpoint.load("d")
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
def test_a_strangers_record_is_refused(whose: str, run: Path) -> None:
    key = publish().authkey.hex()
    assert endpoint.load("d")
    os.chown(run.parent / whose, 12345, 12345)
    assert type(load_error(key)) is UnsafeDirectory


# Discard and clean up.


def test_a_generation_never_discards_its_successors_record(run: Path) -> None:
    first, second, unpublished = new_generation(), new_generation(), new_generation()
    unpublished.discard()
    first.publish()
    second.publish()
    first.discard()
    assert endpoint.load("d").generation == second.record.generation
    second.discard()
    second.discard()
    assert content(run) == {}


@pytest.mark.parametrize("data", [b"torn", b'{"schema": 2}'])
def test_discarding_is_quiet_when_the_record_is_not_ours_any_more(data: bytes, run: Path) -> None:
    generation = new_generation()
    generation.publish()
    write(run / "d.json", data)
    generation.discard()
    assert content(run) == {"d.json": data}


def test_cleaning_up_removes_all_of_a_dead_generation_and_nothing_of_other_names(run: Path) -> None:
    sockets: dict[str, set[str]] = {}
    for name in ("d", "d-2", "e"):
        records = [publish(name), new_generation(name).record]
        sockets[name] = {os.path.basename(record.address) for record in records}
        if sys.platform != "win32":
            for record in records:
                with socket.socket(socket.AF_UNIX) as dead:
                    dead.bind(record.address)
    before = set(content(run))
    assert endpoint.cleanup_endpoint("d") is True
    gone = {entry for entry in before if entry.startswith("d.")} | sockets["d"]
    assert set(content(run)) - {"d.lock"} == before - gone
    with pytest.raises(DaemonNotRunning):
        endpoint.load("d")
    assert endpoint.load("d-2")
    # Nothing left to do is no error.
    assert endpoint.cleanup_endpoint("d") is True


@needs_posix
def test_the_lock_file_stays_since_two_daemons_could_hold_it_otherwise(run: Path) -> None:
    endpoint.lock_lifetime("d").release()
    before = (run / "d.lock").stat().st_ino
    assert endpoint.cleanup_endpoint("d") is True
    assert (run / "d.lock").stat().st_ino == before


def test_nothing_of_a_living_daemon_is_touched(run: Path) -> None:
    lock = endpoint.lock_lifetime("d")
    try:
        publish()
        new_generation()
        before = content(run)
        assert endpoint.cleanup_endpoint("d") is False
        assert content(run) == before
        # While it writes nothing yet, or nothing that can be read, it is alive all the same.
        write(run / "d.json", b"torn")
        assert endpoint.cleanup_endpoint("d") is False
        assert (run / "d.json").read_bytes() == b"torn"
    finally:
        lock.release()
    assert endpoint.cleanup_endpoint("d") is True


@pytest.mark.parametrize("data", [b"", b"torn", b'{"schema": 2}', b"[" * 100_000], ids=["empty", "torn", "later", "deep"])
def test_cleaning_up_removes_a_record_that_says_nothing(data: bytes, run: Path) -> None:
    write(run / "d.json", data)
    write(run / "d.0123.tmp", data)
    assert endpoint.cleanup_endpoint("d") is True
    assert set(content(run)) <= {"d.lock"}


@needs_posix
@pytest.mark.parametrize("name", ["precious", "precious.sock", "0123456789abcdef.sock.txt", "0123456789abcdef.sock"])
def test_a_damaged_record_does_not_choose_what_is_removed(name: str, run: Path) -> None:
    precious = run.parent / "precious" / name
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    for address in (str(precious), f"{run}/../precious/{name}"):
        publish(address=address)
        assert endpoint.cleanup_endpoint("d") is True
        assert precious.read_bytes() == b"precious"
    assert not (run / "d.json").exists()


# The lifetime lock.


def test_the_lifetime_lock_is_taken_once(run: Path) -> None:
    lock = endpoint.lock_lifetime("d")
    try:
        with pytest.raises(AlreadyRunning, match="'d'") as caught:
            endpoint.lock_lifetime("d")
        assert caught.value.pid is None
        publish()
        with pytest.raises(AlreadyRunning) as caught:
            endpoint.lock_lifetime("d")
        assert caught.value.pid == os.getpid()
        endpoint.lock_lifetime("other").release()
    finally:
        lock.release()
    endpoint.lock_lifetime("d").release()


@pytest.mark.parametrize(
    "other",
    [{"create_time": 1.5}, {"pid": 2**31 - 1}, {"pid": 10**30}, {"create_time": 10**400}, {"schema": 2}],
    ids=["reused pid", "dead pid", "impossible pid", "impossible time", "later version"],
)
def test_the_lock_names_no_pid_that_is_not_the_holders(other: dict[str, Any], run: Path) -> None:
    lock = endpoint.lock_lifetime("d")
    try:
        publish()
        fields = fields_of(run / "d.json")
        # Where the time of creation is all that is known.
        fields.pop("start_ticks", None)
        write(run / "d.json", json.dumps({**fields, **other}).encode())
        with pytest.raises(AlreadyRunning) as caught:
            endpoint.lock_lifetime("d")
        assert caught.value.pid is None
    finally:
        lock.release()


@needs_posix
def test_the_lock_file_is_private_and_a_lock_that_cannot_be_taken_is_a_failed_start(run: Path) -> None:
    previous = os.umask(0)
    try:
        endpoint.lock_lifetime("d").release()
    finally:
        os.umask(previous)
    assert stat.S_IMODE((run / "d.lock").stat().st_mode) == 0o600
    (run / "d.lock").unlink()
    (run / "d.lock").mkdir()
    with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR"):
        endpoint.lock_lifetime("d")
