"""Registration of a name: one process at a time holds it, even if files are removed; living daemons are unaffected."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from harness_ipc import cleanup_endpoint
from harness_ipc._registry import files, lifetime, records
from harness_ipc._registry.locks import NameLock
from harness_ipc._server.server import acquire_name
from harness_ipc.errors import AlreadyRunning, DaemonNotRunning, StartFailed, UnsafeDirectory
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, run_python

# A pid that no system has.
NO_PID = 2**31 - 1


@pytest.fixture
def run(private_directories: Path) -> Path:
    """The runtime directory, which exists."""
    path = private_directories / "run"
    files.create_private_dir(str(path))
    return path


def publish(name: str = "d") -> lifetime.Registration:
    registration = acquire_name(name)
    registration.publish(app_version=None, max_message=1000)
    return registration


def leave_dead(run: Path, name: str = "d", **changes: Any) -> records.Record:
    """Write the record of a process that has ended, with `changes`."""
    registration = publish(name)
    fields = {**json.loads((run / f"{name}.json").read_bytes()), "pid": NO_PID, **changes}
    registration.release()
    write(run / f"{name}.json", json.dumps(fields).encode())
    return records.Record(fields)


def write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    files.write_private_file(str(path), data)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in directory.iterdir()}


def fail(number: int) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


# Acquire.


def test_one_process_has_a_name(run: Path) -> None:
    first = acquire_name("d")
    for _ in range(2):
        with pytest.raises(AlreadyRunning, match="'d'") as caught:
            acquire_name("d")
        assert caught.value.pid == os.getpid()
    acquire_name("other").release()
    first.release()
    first.release()
    acquire_name("d").release()


@needs_posix
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_is_a_failed_start(number: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fail(number))
    with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR"):
        acquire_name("d")
    assert set(content(run)) == {"d.lock"}


@pytest.mark.parametrize("state", ["starting", "ready", "draining"])
def test_a_living_process_keeps_its_name_without_its_lock(state: str, run: Path) -> None:
    first = acquire_name("d")
    if state != "starting":
        first.publish(app_version=None, max_message=1000)
    if state == "draining":
        first.drain()
    if sys.platform != "win32":
        (run / "d.lock").unlink()
    with pytest.raises(AlreadyRunning) as caught:
        acquire_name("d")
    assert caught.value.pid == os.getpid()
    assert cleanup_endpoint("d") is False
    assert records.read("d").state == state
    first.release()
    assert cleanup_endpoint("d") is True


@pytest.mark.parametrize(
    "dead",
    [{}, {"pid": 10**30}, {"pid": os.getpid(), "create_time": 1.5, "start_ticks": 1}, {"state": "starting"}],
    ids=["dead pid", "impossible pid", "reused pid", "starting"],
)
def test_a_dead_process_leaves_its_name(dead: dict[str, Any], run: Path) -> None:
    leave_dead(run, **dead)
    registration = acquire_name("d")
    assert records.read("d").generation == registration.record.generation
    registration.release()
    assert set(content(run)) == {"d.lock"}


@pytest.mark.parametrize("data", [b"", b"torn", b'{"schema": 3}', b"[" * 100_000], ids=["empty", "torn", "later", "deep"])
def test_a_damaged_record_does_not_block_the_name(data: bytes, run: Path) -> None:
    for path in (run / "d.json", run / f"d.{'0' * 32}.tmp"):
        write(path, data)
    assert cleanup_endpoint("d") is True
    assert set(content(run)) == {"d.lock"}
    write(run / "d.json", data)
    acquire_name("d").release()


@needs_posix
def test_a_successor_removes_the_socket_of_a_killed_start(run: Path) -> None:
    script = """
import os, socket
from harness_ipc._server.server import acquire_name
socket.socket(socket.AF_UNIX).bind(acquire_name("d").record.address)
os._exit(0)
"""
    assert run_python("-W", "ignore", "-c", script).returncode == 0
    assert len(list(run.glob("*.sock"))) == 1
    acquire_name("d").release()
    assert list(run.glob("*.sock")) == []


@needs_posix
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_a_failed_start(number: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", fail(number))
    with pytest.raises(StartFailed, match="to a directory of your own on a local disk"):
        acquire_name("d")


@needs_posix
@pytest.mark.parametrize("kind", ["link", "dangling link", "0644", "directory", "fifo"])
def test_a_lock_that_others_could_hold_is_refused(kind: str, run: Path) -> None:
    path, target = run / "d.lock", run / "target"
    match kind:
        case "link":
            target.write_bytes(b"precious")
            path.symlink_to(target)
        case "dangling link":
            path.symlink_to(target)
        case "0644":
            path.touch(0o644)
            path.chmod(0o644)
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path, 0o600)
    before = content(run)
    for use in (acquire_name, cleanup_endpoint):
        with pytest.raises(UnsafeDirectory) as caught:
            use("d")
        assert str(path) in caught.value.remedy
    assert content(run) == before


@pytest.mark.parametrize("what", ["open", "write", "link"])
def test_a_full_disk_is_a_failed_start_that_leaves_nothing(what: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire_name("d").release()
    before = content(run)
    if what == "write":
        if sys.platform == "win32":
            pytest.skip("only POSIX limits the size of a process's files")
        import resource

        # A real limit: files of this process can't grow above 100 bytes.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR"):
                acquire_name("d")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename" if (what, sys.platform) == ("link", "win32") else what, fail(errno.ENOSPC))
            with pytest.raises(StartFailed, match=os.strerror(errno.ENOSPC)):
                acquire_name("d")
    assert content(run) == before


# Publish, restore and drain.


def test_record_that_cannot_be_replaced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = acquire_name("d")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail(errno.ENOSPC))
        with pytest.raises(StartFailed, match=os.strerror(errno.ENOSPC)):
            registration.publish(app_version=None, max_message=1000)
    assert records.read("d").state == "starting"
    registration.publish(app_version=None, max_message=1000)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail(errno.ENOSPC))
        registration.drain()
    with pytest.raises(DaemonNotRunning):
        records.read("d")
    registration.release()


@needs_posix
def test_removed_files_are_restored(run: Path) -> None:
    registration = publish()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(registration.record.address)
        for swept in ({"d.lock"}, {"d.json"}, {"d.lock", "d.json"}):
            before = content(run)
            for name in swept:
                (run / name).unlink()
            assert registration.look() is True
            assert content(run) == before
            assert records.load("d").authkey == registration.record.authkey
        os.unlink(registration.record.address)
        assert registration.look() is False
    registration.release()
    assert set(content(run)) == {"d.lock"}


@needs_posix
@pytest.mark.parametrize("trouble", ["open directory", "no descriptor"])
def test_repairable_problems_do_not_end_a_daemon(trouble: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = publish()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(registration.record.address)
        (run / "d.lock").unlink()
        if trouble == "open directory":
            run.chmod(0o755)
            assert registration.look() is True
            run.chmod(0o700)
        else:
            with monkeypatch.context() as patched:
                patched.setattr(os, "open", fail(errno.EMFILE))
                assert registration.look() is True
        assert registration.look() is True
    registration.release()


@needs_posix
def test_a_directory_that_is_gone_ends_a_daemon(run: Path) -> None:
    registration = publish()
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    assert registration.look() is False
    registration.release()
    assert not run.exists()


@needs_posix
def test_another_living_generation_ends_a_daemon(run: Path) -> None:
    first = publish()
    for name in ("d.json", "d.lock"):
        (run / name).unlink()
    second = publish()
    assert first.look() is False
    first.release()
    assert records.load("d").generation == second.record.generation
    second.release()


@needs_linux
def test_times_of_all_files_are_updated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = publish()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(registration.record.address)
        files = [run, *run.iterdir()]
        for path in files:
            os.utime(path, (1, 1))
        assert registration.look() is True
        assert {path.stat().st_mtime for path in files} == {1}
        monkeypatch.setattr(lifetime, "TOUCH_INTERVAL", 0.0)
        assert registration.look() is True
        assert all(time.time() - path.stat().st_mtime < PATIENCE for path in files)
        assert len(files) == 4
    registration.release()


@needs_linux
def test_a_cleaner_that_respects_locks_skips_the_directory(run: Path) -> None:
    import fcntl

    registrations = [publish("d"), publish("e")]
    cleaner = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for registration in registrations:
            with pytest.raises(BlockingIOError):
                fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            registration.release()
        fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(cleaner)


# Release and clean up.


@needs_posix
def test_a_forked_child_removes_neither_record_nor_lock(run: Path) -> None:
    registration = publish()
    pid = os.fork()
    if pid == 0:
        registration.drain()
        registration.release()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert records.load("d").generation == registration.record.generation
    assert not NameLock(str(run / "d.lock")).try_acquire()
    registration.release()


@needs_posix
def test_a_forked_child_does_not_keep_the_name(run: Path) -> None:
    reader, writer = os.pipe()
    registration = publish()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os._exit(0)
    registration.release()
    acquire_name("d").release()
    os.write(writer, b"x")
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("data", [b"torn", b'{"schema": 3}'])
def test_a_record_that_is_not_ours_is_not_removed(data: bytes, run: Path) -> None:
    registration = publish()
    write(run / "d.json", data)
    registration.release()
    assert content(run)["d.json"] == data


def test_cleanup_removes_one_dead_generation_only(run: Path) -> None:
    sockets: dict[str, set[str]] = {}
    for name in ("d", "d-2", "e"):
        # A generation that died while it wrote a draft, and one that was published.
        found = [leave_dead(run, name)]
        draft = (run / f"{name}.json").read_bytes()
        found.append(leave_dead(run, name))
        write(run / f"{name}.{'0' * 32}.tmp", draft)
        sockets[name] = {os.path.basename(record.address) for record in found}
        if sys.platform != "win32":
            for record in found:
                with socket.socket(socket.AF_UNIX) as dead:
                    dead.bind(record.address)
    before = set(content(run))
    assert cleanup_endpoint("d") is True
    gone = {entry for entry in before if entry.startswith("d.") and entry != "d.lock"} | sockets["d"]
    assert set(content(run)) == before - gone
    assert records.read("d-2")
    # Idempotent.
    assert cleanup_endpoint("d") is True


def test_nothing_of_a_living_daemon_is_touched(run: Path) -> None:
    registration = publish()
    before = content(run)
    assert cleanup_endpoint("d") is False
    assert content(run) == before
    # The lock shows it while the record can't be read.
    write(run / "d.json", b"torn")
    assert cleanup_endpoint("d") is False
    assert (run / "d.json").read_bytes() == b"torn"
    registration.release()
    assert cleanup_endpoint("d") is True


@needs_posix
@pytest.mark.parametrize("name", ["precious", "precious.sock", "0123456789abcdef.sock.txt", "0123456789abcdef.sock"])
def test_a_damaged_record_does_not_choose_what_is_removed(name: str, run: Path) -> None:
    precious = run.parent / "precious" / name
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    for address in (str(precious), f"{run}/../precious/{name}"):
        leave_dead(run, address=address)
        assert cleanup_endpoint("d") is True
        assert precious.read_bytes() == b"precious"
    assert not (run / "d.json").exists()
