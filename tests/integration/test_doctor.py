"""What the doctor finds, with real daemons, living and dead; that its remedies mend it; and that it changes nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest

from harness_ipc import (
    __version__,
    _status,
    doctor,
    runtime_dir,
    runtime_path,
)
from harness_ipc._registry import records
from harness_ipc._server.server import acquire_name
from harness_ipc._transport import listen
from harness_ipc.doctor import Finding, examine
from harness_ipc.errors import AuthenticationFailed, StartFailed
from tests.support.marks import needs_posix, needs_root, needs_windows
from tests.support.processes import DaemonProcess, run_python, spawn_daemon, spawn_python, stopped

STRANGER = 12345

# A daemon whose start, or whose health, is as its argument says.
_SERVICE = """
import asyncio, sys
from harness_ipc import run_daemon

class App:
    async def start(self):
        print("starting", flush=True)
        if sys.argv[1] == "starting":
            await asyncio.Event().wait()
    async def handle(self, message): return message
    async def stop(self): pass
    async def health(self): raise LookupError("no\\nbrowser")

run_daemon(App(), "svc", on_ready=lambda _: print("ready", flush=True))
"""


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a process of its own, as a user does."""
    return run_python("-m", "harness_ipc", "doctor", *arguments)


def found(topic: str) -> Finding:
    """Return the one finding about `topic`."""
    (finding,) = [finding for finding in examine() if finding.topic == topic]
    return finding


def troubles() -> list[Finding]:
    return [finding for finding in examine() if finding.level != "ok"]


def everything(directory: Path) -> list[tuple[str, int, int]]:
    """Return what is in `directory`, with the times at which it was changed."""
    return [(str(path), path.lstat().st_mtime_ns, path.lstat().st_mode) for path in sorted(directory.rglob("*"))]


def apply(remedy: str | None) -> None:
    """Do what a person does who was told to."""
    assert remedy is not None
    if remedy.startswith("harness-ipc "):
        assert run_python("-m", "harness_ipc", *remedy.split()[1:]).returncode == 0
    else:
        subprocess.run(["/bin/sh", "-c", remedy], check=True)


@pytest.fixture
def run(private_directories: Path) -> Path:
    """A runtime directory that exists."""
    directory = private_directories / "run"
    directory.mkdir(mode=0o700)
    return directory


@contextlib.contextmanager
def service(kind: str) -> Iterator[DaemonProcess]:
    with spawn_python("-c", _SERVICE, kind) as daemon:
        assert daemon.read_line() == "starting"
        if kind != "starting":
            assert daemon.read_line() == "ready"
        yield daemon


def kill(daemon: DaemonProcess) -> None:
    daemon.process.kill()
    daemon.wait()


# Well.


def test_a_clean_machine_is_well_and_stays_clean(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = private_directories / "tmp"
    temporary.mkdir()
    for variable in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(variable, str(temporary))
    seen = run_doctor()
    assert (seen.returncode, seen.stderr) == (0, "")
    lines = seen.stdout.splitlines()
    assert all(line.startswith("OK       ") for line in lines), seen.stdout
    topics = [line[9:].partition(":")[0] for line in lines]
    expected = ["python", "harness_ipc", "platformdirs", "filelock", "psutil", "processes"]
    expected += ["runtime directory", "log directory"]
    expected += ["socket path"] if listen.FAMILY == "AF_UNIX" else []
    assert topics == [*expected, "round trip", "daemons", "leftovers"]
    assert f"OK       harness_ipc: {__version__}, " in seen.stdout
    run = private_directories / "run"
    assert f"runtime directory: {run} (HARNESS_IPC_RUNTIME_DIR is set), will be created at the first start" in seen.stdout
    assert everything(private_directories) == [(str(temporary), temporary.stat().st_mtime_ns, temporary.stat().st_mode)]


def test_json() -> None:
    seen = run_doctor("--json")
    assert (seen.returncode, seen.stderr) == (0, "")
    report = json.loads(seen.stdout)
    assert sorted(report) == ["findings", "ok"]
    assert report["ok"] is True
    assert all(list(finding) == ["level", "topic", "text", "remedy"] for finding in report["findings"])
    assert {finding["level"] for finding in report["findings"]} == {"ok"}
    assert report["findings"][0]["text"].endswith(f", {sys.executable}")


def test_a_running_daemon_is_ok_and_unchanged(private_directories: Path) -> None:
    with spawn_daemon("one") as daemon, spawn_daemon("two"):
        before = everything(private_directories)
        seen = run_doctor()
        assert seen.returncode == 0, seen.stdout
        assert f"OK       daemon one: running, pid {daemon.pid}, for " in seen.stdout
        assert "OK       daemon two: running, pid " in seen.stdout
        assert "OK       leftovers: none" in seen.stdout
        assert "daemons:" not in seen.stdout
        assert everything(private_directories) == before


def test_no_thread_and_no_descriptor_stays(run: Path) -> None:
    examine()
    threads, descriptors = threading.active_count(), os.dup(0)
    os.close(descriptors)
    examine()
    again = os.dup(0)
    os.close(again)
    assert (threading.active_count(), again) == (threads, descriptors)


# Daemons.


@needs_posix
def test_a_killed_daemon(run: Path) -> None:
    with spawn_daemon("dead") as daemon, spawn_daemon("other"):
        address = records.load("dead").address
        kill(daemon)
        before = everything(run)
        seen = run_doctor()
        assert seen.returncode == 0
        assert everything(run) == before
        stale, socket = troubles()
        assert (stale.level, stale.topic, stale.remedy) == ("warning", "daemon dead", "harness-ipc stop --name dead")
        assert stale.text.startswith("stale: ")
        assert socket == Finding("warning", "leftovers", f"{address}: the socket of a daemon that died", stale.remedy)
        assert f"WARNING  {stale.topic}: {stale.text} -> {stale.remedy}\n" in seen.stdout
        apply(stale.remedy)
        assert troubles() == []


@needs_posix
def test_a_stopped_daemon_is_a_failure() -> None:
    with spawn_daemon("svc") as daemon:
        with stopped(daemon):
            seen = run_doctor()
            assert seen.returncode == 1
            assert f"FAILURE  daemon svc: unresponsive, pid {daemon.pid}" in seen.stdout
            assert "OK       leftovers: none" in seen.stdout
        assert troubles() == []


def test_a_starting_daemon_is_ok_and_stale_if_it_dies() -> None:
    with service("starting") as daemon:
        assert found("daemon svc").level == "ok"
        assert found("daemon svc").text.startswith(f"starting, pid {daemon.pid}")
        assert troubles() == []
        kill(daemon)
        (stale,) = troubles()
        assert stale.text.startswith("stale: the daemon 'svc' is still starting, or was killed meanwhile")
        assert (stale.level, stale.topic, stale.remedy) == ("warning", "daemon svc", "harness-ipc stop --name svc")
        apply(stale.remedy)
        assert troubles() == []


def test_a_daemon_that_is_not_healthy_is_a_warning() -> None:
    with service("ready") as daemon:
        seen = run_doctor()
        assert seen.returncode == 0
        (line,) = [line for line in seen.stdout.splitlines() if line.startswith("WARNING")]
        assert line.startswith(f"WARNING  daemon svc: running, pid {daemon.pid}, for ")
        assert "LookupError: no" in line


@needs_posix
def test_a_record_of_another_schema_is_a_failure() -> None:
    with spawn_daemon("svc") as daemon:
        path = runtime_path("svc", "json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 3}))
        (trouble,) = troubles()
        assert (trouble.level, trouble.topic) == ("failure", "daemon svc")
        assert trouble.text.startswith(f"incompatible, pid {daemon.pid}: the daemon's record has schema 3")


@needs_posix
def test_a_record_that_others_can_read_is_a_failure() -> None:
    with spawn_daemon("svc"):
        path = runtime_path("svc", "json")
        path.chmod(0o644)
        (trouble,) = troubles()
        assert trouble == Finding(
            "failure",
            "daemon svc",
            f"forbidden: {path} has mode 0644, so it is not private to you",
            f"chmod 600 {path}",
        )
        apply(trouble.remedy)
        assert troubles() == []


def test_a_damaged_record(run: Path) -> None:
    (run / "svc.json").write_text("{")
    (run / "svc.json").chmod(0o600)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("warning", "daemon svc", "harness-ipc stop --name svc")
    assert "is damaged (it is not a JSON object" in trouble.text
    apply(trouble.remedy)
    assert troubles() == []


# What dead ones left.


def draft(run: Path, content: dict[str, Any] | str, name: str = "svc") -> Path:
    path = run / f"{name}.{'0a' * 16}.tmp"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("content", ["", "[]", {}, {"pid": "1", "create_time": []}, {"pid": 1, "create_time": 1.0}], ids=str)
def test_a_draft_of_a_dead_daemon(run: Path, content: dict[str, Any] | str) -> None:
    path = draft(run, content)
    text = f"{path}: left by a daemon that died while starting or draining"
    assert troubles() == [Finding("warning", "leftovers", text, "harness-ipc stop --name svc")]
    apply("harness-ipc stop --name svc")
    assert troubles() == []


def test_a_name_that_looks_like_an_option(run: Path) -> None:
    draft(run, {}, name="-x")
    (trouble,) = troubles()
    assert trouble.remedy == "harness-ipc stop --name=-x"
    apply(trouble.remedy)
    assert troubles() == []


@needs_posix
def test_the_remedy_for_a_draft_spares_a_living_daemon() -> None:
    with spawn_daemon("svc"):
        path = draft(runtime_dir(), {})
        (trouble,) = troubles()
        assert trouble.remedy == f"rm {path}"
        apply(trouble.remedy)
        assert troubles() == []
        assert found("daemon svc").text.startswith("running")


@needs_posix
def test_a_draft_of_a_living_process_is_not_stale(run: Path) -> None:
    socket = run / f"{'0a' * 8}.sock"
    socket.touch()
    registration = acquire_name("svc")
    registration.release()
    path = draft(run, registration.record.replace(address=str(socket)).to_json().decode())
    assert troubles() == []
    path.unlink()
    assert [trouble.remedy for trouble in troubles()] == [f"rm {socket}"]


@needs_posix
def test_a_socket_without_a_record(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_directories / "it's"
    run.mkdir(mode=0o700)
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(run))
    address = listen.new_address(str(run), records.new_generation_id())
    listener = listen.Listener(address)
    # Of a daemon that has just withdrawn its record, perhaps.
    assert troubles() == []
    os.rename(address, run / "kept")
    listener.close()
    os.rename(run / "kept", address)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("warning", "leftovers")
    assert trouble.text == f"{address}: a socket without a record, where nobody listens"
    assert os.path.exists(address)
    apply(trouble.remedy)
    assert troubles() == []
    assert os.listdir(run) == []


@needs_posix
def test_foreign_processes_are_ignored(run: Path) -> None:
    for name in ("svc.lock", "svc.start", "notes.txt", "a b.starting", "svc.0a.tmp", "0a.sock", f"{'0A' * 8}.sock", ".json"):
        (run / name).touch()
    (run / "socket.json").mkdir()
    assert [trouble.topic for trouble in troubles()] == ["daemon socket"]


# Directories.


@needs_posix
def test_a_runtime_directory_that_is_open_to_others(run: Path) -> None:
    run.chmod(0o777)
    seen = run_doctor()
    assert (seen.returncode, seen.stderr) == (1, "")
    text = f"{run} has mode 0777, so it is not private to you (HARNESS_IPC_RUNTIME_DIR is set)"
    assert f"FAILURE  runtime directory: {text} -> chmod 700 {run}\n" in seen.stdout
    # Once is enough.
    assert seen.stdout.count("FAILURE") == 1
    assert json.loads(run_doctor("--json").stdout)["ok"] is False
    apply(found("runtime directory").remedy)
    assert troubles() == []
    assert f"{run} (HARNESS_IPC_RUNTIME_DIR is set), owner uid {os.geteuid()}, mode 0700" in found("runtime directory").text


@needs_posix
@pytest.mark.parametrize(("mode", "level"), [(0o755, "ok"), (0o775, "failure"), (0o500, "failure")])
def test_the_log_directory(private_directories: Path, mode: int, level: str) -> None:
    log = private_directories / "log"
    log.mkdir()
    log.chmod(mode)
    finding = found("log directory")
    assert finding.level == level
    if level == "failure":
        assert finding.remedy == f"chmod 700 {log}"
        apply(finding.remedy)
    assert troubles() == []
    assert "(HARNESS_IPC_LOG_DIR is set)" in found("log directory").text


@needs_posix
def test_a_runtime_directory_that_is_a_link(private_directories: Path) -> None:
    (private_directories / "elsewhere").mkdir(mode=0o700)
    (private_directories / "run").symlink_to(private_directories / "elsewhere")
    assert "is a symbolic link" in found("runtime directory").text
    apply(found("runtime directory").remedy)
    assert troubles() == []


@needs_posix
@needs_root
def test_a_runtime_directory_of_another_user(run: Path) -> None:
    os.chown(run, STRANGER, STRANGER)
    finding = found("runtime directory")
    assert finding.level == "failure"
    assert str(finding.remedy).startswith("export HARNESS_IPC_RUNTIME_DIR=")
    assert f"belongs to uid {STRANGER}, not to {os.geteuid()}" in finding.text


@needs_posix
@needs_root
def test_a_directory_that_can_not_be_made(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / "run"))
    private_directories.chmod(0o755)
    os.seteuid(STRANGER)
    try:
        finding = found("runtime directory")
    finally:
        os.seteuid(0)
    assert finding.level == "failure"
    assert f"but {private_directories} can't be written" in finding.text
    assert finding.remedy == "export HARNESS_IPC_RUNTIME_DIR=<a directory of your own on a local disk>"


@needs_root
@needs_posix
def test_a_parent_that_root_made(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / "local" / "run"))
    (private_directories / "local").mkdir(0o755)
    os.chown(private_directories, STRANGER, STRANGER)
    os.seteuid(STRANGER)
    try:
        finding = found("runtime directory")
    finally:
        os.seteuid(0)
    assert (finding.level, finding.remedy) == ("failure", f"sudo chown -R {STRANGER} {private_directories / 'local'}")


@needs_posix
def test_a_parent_where_others_can_write(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = private_directories / "parent"
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(parent / "run"))
    parent.mkdir()
    parent.chmod(0o777)
    finding = found("runtime directory")
    assert (finding.level, finding.remedy) == ("failure", f"chmod go-w {parent}")


@needs_posix
def test_logs_without_a_home(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HARNESS_IPC_LOG_DIR", "HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    finding = found("log directory")
    assert finding.level == "ok"
    assert f"{private_directories / 'run' / '.log'} (in the runtime directory, since HOME" in finding.text


@needs_windows
def test_python_from_the_store_sees_other_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_IPC_LOG_DIR")
    monkeypatch.setattr(sys, "base_prefix", r"C:\Program Files\WindowsApps\PythonSoftwareFoundation.Python.3.12")
    finding = found("log directory")
    assert (finding.level, finding.remedy) == ("warning", r"set HARNESS_IPC_LOG_DIR=%USERPROFILE%\.harness-ipc\log")


def test_a_file_in_the_way(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (private_directories / "file").touch()
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / "file" / "run"))
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("failure", "runtime directory")
    assert f"but {private_directories / 'file'} is not a directory" in trouble.text


@needs_posix
def test_a_network_file_system_is_a_warning(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), (str(private_directories), "ext4"), (str(private_directories), "nfs4"), ("/x", "tmpfs")]
    monkeypatch.setattr(
        psutil,
        "disk_partitions",
        lambda **_: [SimpleNamespace(mountpoint=os.path.realpath(place), fstype=kind) for place, kind in mounts],
    )
    assert [(trouble.level, trouble.topic) for trouble in troubles()] == [
        ("warning", "runtime directory"),
        ("warning", "log directory"),
    ]
    assert "on nfs4, a network file system" in found("log directory").text
    assert found("log directory").remedy == "export HARNESS_IPC_LOG_DIR=<a directory of your own on a local disk>"


@needs_posix
def test_a_runtime_directory_that_is_too_long(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(private_directories))
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / ("x" * 100)))
    short = private_directories / f"harness-ipc-{os.geteuid()}"
    finding = found("socket path")
    assert finding.level == "ok"
    assert f"instead, {short} (the short directory for sockets), will be created" in finding.text
    assert troubles() == []
    assert os.listdir(private_directories) == []
    short.mkdir(mode=0o700)
    short.chmod(0o755)
    assert found("socket path").remedy == f"chmod 700 {short}"
    apply(found("socket path").remedy)
    assert troubles() == []


@needs_posix
def test_two_directories_that_are_too_long(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = private_directories / ("x" * 100)
    long.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(long))
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("failure", "socket path")
    assert trouble.text.endswith("is too long as well")
    assert trouble.remedy == "export HARNESS_IPC_RUNTIME_DIR=<a directory with a shorter path>"


# The interpreter and the channel.


def test_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert found("filelock").level == "failure"
    remedy = found("filelock").remedy
    assert remedy is not None
    assert remedy.endswith(" -m pip install --force-reinstall filelock")
    assert found("psutil").level == "ok"


def test_a_dependency_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", refuse)
    assert found("psutil").text.startswith("its version is unknown")


def test_another_interpreter_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_implementation", lambda: "PyPy")
    assert found("python").level == "warning"


def test_no_socket_can_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> NoReturn:
        raise StartFailed("a sandbox may forbid it")

    monkeypatch.setattr(listen, "Listener", refuse)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("failure", "round trip")
    assert trouble.text.endswith("it failed: StartFailed: a sandbox may forbid it")


def test_a_failed_round_trip_has_the_other_sides_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AuthenticationFailed("as told")

    monkeypatch.setattr(doctor, "ServerProtocol", refuse)
    before = threading.active_count()
    (trouble,) = troubles()
    assert trouble.topic == "round trip"
    assert trouble.text.endswith("; the other side: AuthenticationFailed: as told")
    assert threading.active_count() == before


def test_a_round_trip_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ROUND_TRIP", 0.1)
    done = threading.Event()

    def hang(*_: object) -> NoReturn:
        done.wait(60.0)
        raise AuthenticationFailed("too late")

    monkeypatch.setattr(doctor, "ServerProtocol", hang)
    (trouble,) = troubles()
    done.set()
    assert trouble.topic == "round trip"
    assert "DaemonTimeout: " in trouble.text


# The report.


def test_a_check_that_fails_is_a_failure_among_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> NoReturn:
        raise RuntimeError("one\ntwo\x1b[2J\u2028\ud800")

    monkeypatch.setattr(_status, "list_daemons", fail)
    monkeypatch.setattr(records, "new_generation_id", fail)
    assert doctor.run() == 1
    lines = capsys.readouterr().out.splitlines()
    text = "the check failed: RuntimeError: one\\ntwo\\x1b[2J\\u2028\\ud800"
    assert [line for line in lines if not line.startswith("OK ")] == [
        f"FAILURE  round trip: {text}",
        f"FAILURE  daemons: {text}",
    ]


@needs_posix
def test_a_path_ends_no_line_and_fits_any_console(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", f"{private_directories}/é\n\x1b[31m")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    seen = run_doctor()
    assert (seen.returncode, seen.stderr) == (0, "")
    assert f"runtime directory: {private_directories}/\\xe9\\n\\x1b[31m (HARNESS" in seen.stdout
    assert all(line.startswith("OK  ") for line in seen.stdout.splitlines())


@needs_posix
def test_an_interrupted_tour_leaves_nothing(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(private_directories))
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / "run"))
    program = (
        "from harness_ipc import doctor\n"
        "def silent(port, protocol, deadline):\n"
        "    print('ready', flush=True)\n"
        "    while port.wait(deadline, reading=True, limit=256): pass\n"
        "doctor._write = silent\n"
        "try: doctor.examine()\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    with spawn_python("-c", program) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGINT)
        assert process.read_line() == "interrupted"
        assert process.wait() == 0
    assert os.listdir(private_directories) == []
