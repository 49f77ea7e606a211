"""The findings of the doctor as rows of a table. Its remedies work, and it changes nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import psutil
import pytest
from _pytest.mark import ParameterSet

from harness_ipc import (
    __version__,
    _status,
    doctor,
    runtime_path,
)
from harness_ipc._doctor import round_trip
from harness_ipc._doctor.finding import Finding
from harness_ipc._registry import records, trust
from harness_ipc._server.server import acquire_name
from harness_ipc._transport import listen
from harness_ipc.doctor import examine
from harness_ipc.errors import AuthenticationFailed, StartFailed
from tests.support.marks import needs_posix, needs_root, needs_windows
from tests.support.processes import DaemonProcess, run_python, spawn_daemon, spawn_python, stopped

STRANGER = 12345

# A daemon that does not finish its start, or is unhealthy, depending on its argument.
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
    """Run the command in a new process."""
    return run_python("-m", "harness_ipc", "doctor", *arguments)


def found(topic: str) -> Finding:
    """Return the finding on `topic`."""
    (finding,) = [finding for finding in examine() if finding.topic == topic]
    return finding


def troubles() -> list[Finding]:
    return [finding for finding in examine() if finding.level != "ok"]


def everything(directory: Path) -> list[tuple[str, int, int]]:
    """Return path, time and mode of each file in `directory`, without logs, which daemons write."""
    paths = [path for path in sorted(directory.rglob("*")) if path.suffix != ".log"]
    return [(str(path), path.lstat().st_mtime_ns, path.lstat().st_mode) for path in paths]


def apply(remedy: str | None) -> None:
    """Run a remedy."""
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


def draft(run: Path, content: dict[str, Any] | str, name: str = "svc") -> Path:
    path = run / f"{name}.{'0a' * 16}.tmp"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    return path


class Setting(NamedTuple):
    """The fixtures of a row: a directory, patches, and a stack of contexts that end with the test."""

    base: Path
    patch: pytest.MonkeyPatch
    stack: contextlib.ExitStack

    @property
    def run(self) -> Path:
        """The runtime directory, created on first access."""
        path = self.base / "run"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def set_runtime_dir(self, path: Path) -> None:
        self.patch.setenv("HARNESS_IPC_RUNTIME_DIR", str(path))

    def become_stranger(self) -> None:
        os.seteuid(STRANGER)
        self.stack.callback(os.seteuid, 0)


Words = dict[str, object]


# Arrangements: each function returns the words for the texts of its row.


def killed(setting: Setting) -> Words:
    daemon = setting.stack.enter_context(spawn_daemon("svc"))
    setting.stack.enter_context(spawn_daemon("other"))
    address = records.load("svc").address
    kill(daemon)
    return {"address": address}


def suspended(setting: Setting) -> Words:
    daemon = setting.stack.enter_context(spawn_daemon("svc"))
    setting.stack.enter_context(stopped(daemon))
    return {"pid": daemon.pid}


def starting(setting: Setting) -> Words:
    return {"pid": setting.stack.enter_context(service("starting")).pid}


def killed_while_starting(setting: Setting) -> Words:
    kill(setting.stack.enter_context(service("starting")))
    return {}


def unhealthy(setting: Setting) -> Words:
    return {"pid": setting.stack.enter_context(service("ready")).pid}


def later_schema(setting: Setting) -> Words:
    daemon = setting.stack.enter_context(spawn_daemon("svc"))
    path = runtime_path("svc", "json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 3}))
    return {"pid": daemon.pid}


def readable_record(setting: Setting) -> Words:
    setting.stack.enter_context(spawn_daemon("svc"))
    path = runtime_path("svc", "json")
    path.chmod(0o644)
    return {"path": path}


def damaged_record(setting: Setting) -> Words:
    path = setting.run / "svc.json"
    path.write_text("{")
    path.chmod(0o600)
    return {}


def drafted(content: Any, name: str = "svc", *, living: bool = False) -> Callable[[Setting], Words]:
    def arrange(setting: Setting) -> Words:
        if living:
            setting.stack.enter_context(spawn_daemon(name))
        return {"path": draft(setting.run, content, name)}

    return arrange


def socket_without_record(setting: Setting) -> Words:
    run = setting.base / "it's"
    run.mkdir(mode=0o700)
    setting.set_runtime_dir(run)
    address = listen.new_address(str(run), records.new_generation_id())
    listener = listen.Listener(address)
    # A listening socket is not stale: a draining daemon withdraws its record first.
    assert troubles() == []
    os.rename(address, run / "kept")
    listener.close()
    os.rename(run / "kept", address)
    return {"address": address, "quoted": shlex.quote(address)}


def mode_of(directory: str, mode: int) -> Callable[[Setting], Words]:
    def arrange(setting: Setting) -> Words:
        path = setting.base / directory
        path.mkdir()
        path.chmod(mode)
        return {"path": path}

    return arrange


def linked(setting: Setting) -> Words:
    (setting.base / "elsewhere").mkdir(mode=0o700)
    path = setting.base / "run"
    path.symlink_to(setting.base / "elsewhere")
    return {"path": path}


def foreign(setting: Setting) -> Words:
    os.chown(setting.run, STRANGER, STRANGER)
    home = shlex.quote(str(trust.home()))
    moved = f"{home}/.harness-ipc/run HARNESS_IPC_LOG_DIR={home}/.harness-ipc/log"
    return {"uid": os.geteuid(), "home": moved}


def unwritable_parent(setting: Setting) -> Words:
    setting.base.chmod(0o755)
    setting.become_stranger()
    return {"base": setting.base}


def parent_of_root(setting: Setting) -> Words:
    path = setting.base / "local"
    setting.set_runtime_dir(path / "run")
    path.mkdir(0o755)
    os.chown(setting.base, STRANGER, STRANGER)
    setting.become_stranger()
    return {"path": path}


def open_parent(setting: Setting) -> Words:
    path = setting.base / "parent"
    setting.set_runtime_dir(path / "run")
    path.mkdir()
    path.chmod(0o777)
    return {"path": path}


def file_in_the_way(setting: Setting) -> Words:
    path = setting.base / "file"
    path.touch()
    setting.set_runtime_dir(path / "run")
    return {"path": path}


def without_home(setting: Setting) -> Words:
    for variable in ("HARNESS_IPC_LOG_DIR", "HOME", "XDG_STATE_HOME"):
        setting.patch.delenv(variable, raising=False)
    return {"path": setting.base / "run" / ".log"}


def python_of_the_store(setting: Setting) -> Words:
    setting.patch.delenv("HARNESS_IPC_LOG_DIR")
    base = r"C:\Program Files\WindowsApps\PythonSoftwareFoundation.Python.3.12"
    setting.patch.setattr(sys, "base_prefix", base)
    return {}


def network_file_system(setting: Setting) -> Words:
    mounts = [("/", "ext4"), (str(setting.base), "ext4"), (str(setting.base), "nfs4"), ("/x", "tmpfs")]
    found = [SimpleNamespace(mountpoint=os.path.realpath(place), fstype=kind) for place, kind in mounts]
    setting.patch.setattr(psutil, "disk_partitions", lambda **_: found)
    return {}


def long_runtime_dir(setting: Setting) -> Words:
    setting.patch.setattr(tempfile, "tempdir", str(setting.base))
    setting.set_runtime_dir(setting.base / ("x" * 100))
    return {"short": setting.base / f"harness-ipc-{os.geteuid()}"}


def open_short_dir(setting: Setting) -> Words:
    words = long_runtime_dir(setting)
    short = Path(str(words["short"]))
    short.mkdir(mode=0o700)
    short.chmod(0o755)
    return words


def two_long_dirs(setting: Setting) -> Words:
    long = setting.base / ("x" * 100)
    long.mkdir(mode=0o700)
    setting.patch.setattr(tempfile, "tempdir", str(long))
    setting.set_runtime_dir(long)
    return {}


def without_filelock(setting: Setting) -> Words:
    setting.patch.setitem(sys.modules, "filelock", None)
    return {"python": shlex.quote(sys.executable) if os.name == "posix" else f'"{sys.executable}"'}


def without_metadata(setting: Setting) -> Words:
    setting.patch.setattr(importlib.metadata, "version", raising(importlib.metadata.PackageNotFoundError("psutil")))
    return {}


def pypy(setting: Setting) -> Words:
    setting.patch.setattr("platform.python_implementation", lambda: "PyPy")
    return {}


def without_sockets(setting: Setting) -> Words:
    setting.patch.setattr(listen, "Listener", raising(StartFailed("a sandbox may forbid it")))
    return {}


def refusing_server(setting: Setting) -> Words:
    setting.patch.setattr(round_trip, "ServerProtocol", raising(AuthenticationFailed("as told")))
    return {}


def raising(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


def row(
    name: str,
    arrange: Callable[[Setting], Words],
    level: str,
    topic: str,
    text: str,
    remedy: str | None = None,
    *,
    fixed: bool = False,
    also: Sequence[str] = (),
    marks: Sequence[pytest.MarkDecorator] = (),
) -> ParameterSet:
    """Return the row of one finding. `text` is a part of its text. `text` and `remedy` may have words of `arrange` in braces.

    With `fixed`, all findings are ok after the remedy. `also` are the topics of other findings that are not ok.
    """
    return pytest.param(arrange, level, topic, text, remedy, fixed, also, id=name, marks=marks)


RUNTIME, LOG = "runtime directory", "log directory"
POSIX, ROOT, WINDOWS = [needs_posix], [needs_posix, needs_root], [needs_windows]
STOP = "harness-ipc stop --name svc"
SET_RUNTIME, SET_LOG = "export HARNESS_IPC_RUNTIME_DIR=", "export HARNESS_IPC_LOG_DIR="
ELSEWHERE = "<a directory of your own on a local disk>"
STORE = r"set HARNESS_IPC_LOG_DIR=%USERPROFILE%\.harness-ipc\log"
DRAFT = "{path}: left by a daemon that died while starting or draining"
KILLED_EARLY = "stale: the daemon 'svc' is still starting, or was killed meanwhile"
SCHEMA = "incompatible, pid {pid}: the daemon's record has schema 3"
READABLE = "forbidden: {path} has mode 0644, so it is not private to you"
SOCKET, OTHER_SOCKET = (
    "{address}: the socket of a daemon that died",
    "{address}: a socket without a record, where nobody listens",
)
OPEN = "{path} has mode 0777, so it is not private to you (HARNESS_IPC_RUNTIME_DIR is set)"
SHORT = "instead, {short} (the short directory for sockets), will be created"
CONTENTS: list[Any] = ["", "[]", {}, {"pid": "1", "create_time": []}, {"pid": 1, "create_time": 1.0}]

# fmt: off
ROWS = [
    # Daemons.
    row("killed", killed, "warning", "daemon svc", "stale: ", STOP, fixed=True, also=["leftovers"], marks=POSIX),
    row("its socket", killed, "warning", "leftovers", SOCKET, STOP, fixed=True, also=["daemon svc"], marks=POSIX),
    row("suspended", suspended, "failure", "daemon svc", "unresponsive, pid {pid}", marks=POSIX),
    row("starting", starting, "ok", "daemon svc", "starting, pid {pid}"),
    row("killed while starting", killed_while_starting, "warning", "daemon svc", KILLED_EARLY, STOP, fixed=True),
    row("unhealthy", unhealthy, "warning", "daemon svc", "running, pid {pid}, for "),
    row("later schema", later_schema, "failure", "daemon svc", SCHEMA, marks=POSIX),
    row("readable record", readable_record, "failure", "daemon svc", READABLE, "chmod 600 {path}", fixed=True, marks=POSIX),
    row("damaged record", damaged_record, "warning", "daemon svc", "is damaged (it is not a JSON object", STOP, fixed=True),
    # Stale files.
    *(row(f"draft {one!r}", drafted(one), "warning", "leftovers", DRAFT, STOP, fixed=True) for one in CONTENTS),
    row("draft of -x", drafted({}, "-x"), "warning", "leftovers", DRAFT, "harness-ipc stop --name=-x", fixed=True),
    row("draft, running", drafted({}, living=True), "warning", "leftovers", DRAFT, "rm {path}", fixed=True, marks=POSIX),
    row("socket", socket_without_record, "warning", "leftovers", OTHER_SOCKET, "rm {quoted}", fixed=True, marks=POSIX),
    # Directories.
    row("run 0777", mode_of("run", 0o777), "failure", RUNTIME, OPEN, "chmod 700 {path}", fixed=True, marks=POSIX),
    row("log 0755", mode_of("log", 0o755), "ok", LOG, "{path} (HARNESS_IPC_LOG_DIR is set), owner uid", marks=POSIX),
    row("log 0775", mode_of("log", 0o775), "failure", LOG, "mode 0775", "chmod 700 {path}", fixed=True, marks=POSIX),
    row("log 0500", mode_of("log", 0o500), "failure", LOG, "can't write", "chmod 700 {path}", fixed=True, marks=POSIX),
    row("link", linked, "failure", RUNTIME, "is a symbolic link", "rm {path}", fixed=True, marks=POSIX),
    row("foreign", foreign, "failure", RUNTIME, "uid 12345, not to {uid}", SET_RUNTIME + "{home}", marks=ROOT),
    row("unwritable", unwritable_parent, "failure", RUNTIME, "but {base} can't be written", SET_RUNTIME + ELSEWHERE,
        also=[LOG], marks=ROOT),
    row("root's", parent_of_root, "failure", RUNTIME, "", "sudo chown -R 12345 {path}", marks=ROOT),
    row("open parent", open_parent, "failure", RUNTIME, "others can write", "chmod go-w {path}", marks=POSIX),
    row("file", file_in_the_way, "failure", RUNTIME, "but {path} is not a directory", SET_RUNTIME + ELSEWHERE,
        marks=POSIX),
    row("no home", without_home, "ok", LOG, "{path} (in the runtime directory, since HOME", marks=POSIX),
    row("Store", python_of_the_store, "warning", LOG, "a private copy of AppData", STORE, marks=WINDOWS),
    row("nfs", network_file_system, "warning", LOG, "on nfs4, a network file system", SET_LOG + ELSEWHERE,
        also=[RUNTIME], marks=POSIX),
    row("long path", long_runtime_dir, "ok", "socket path", SHORT, marks=POSIX),
    row("open short path", open_short_dir, "failure", "socket path", "mode 0755", "chmod 700 {short}", fixed=True, marks=POSIX),
    row("two long paths", two_long_dirs, "failure", "socket path", "is too long as well",
        SET_RUNTIME + "<a directory with a shorter path>", marks=POSIX),
    # The interpreter and the round trip.
    row("no filelock", without_filelock, "failure", "filelock", "it can't be imported: ",
        "{python} -m pip install --force-reinstall filelock"),
    row("no metadata", without_metadata, "ok", "psutil", "its version is unknown"),
    row("PyPy", pypy, "warning", "python", "only CPython is supported"),
    row("no socket", without_sockets, "failure", "round trip", "it failed: StartFailed: a sandbox may forbid it"),
    row("refused", refusing_server, "failure", "round trip", "; the other side: AuthenticationFailed: as told"),
]
# fmt: on


@pytest.mark.parametrize(("arrange", "level", "topic", "text", "remedy", "fixed", "also"), ROWS)
def test_a_finding(
    arrange: Callable[[Setting], Words],
    level: str,
    topic: str,
    text: str,
    remedy: str | None,
    fixed: bool,
    also: Sequence[str],
    private_directories: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with contextlib.ExitStack() as stack:
        words = arrange(Setting(private_directories, monkeypatch, stack))
        before, threads = everything(private_directories), threading.active_count()
        status = doctor.run(as_json=True)
        report = json.loads(capsys.readouterr().out)
        (finding,) = [one for one in report["findings"] if one["topic"] == topic]
        assert list(finding) == ["level", "topic", "text", "remedy"]
        assert finding["level"] == level
        assert text.format(**words) in finding["text"]
        assert finding["remedy"] == (None if remedy is None else remedy.format(**words))
        assert {one["topic"] for one in report["findings"] if one["level"] != "ok"} == {
            *also,
            *([topic] if level != "ok" else []),
        }
        failed = any(one["level"] == "failure" for one in report["findings"])
        assert (status, report["ok"]) == (int(failed), not failed)
        assert (everything(private_directories), threading.active_count()) == (before, threads)
        if fixed:
            apply(finding["remedy"])
            assert troubles() == []


def test_a_clean_machine_is_ok_and_stays_clean(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_report_has_a_line_for_each_finding(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = draft(run, "")
    assert doctor.run() == 0
    text = DRAFT.format(path=path)
    assert capsys.readouterr().out.splitlines()[-1] == f"WARNING  leftovers: {text} -> {STOP}"


def test_no_thread_and_no_descriptor_stays(run: Path) -> None:
    examine()
    threads, descriptors = threading.active_count(), os.dup(0)
    os.close(descriptors)
    examine()
    again = os.dup(0)
    os.close(again)
    assert (threading.active_count(), again) == (threads, descriptors)


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
def test_foreign_files_are_ignored(run: Path) -> None:
    for name in ("svc.lock", "svc.start", "notes.txt", "a b.starting", "svc.0a.tmp", "0a.sock", f"{'0A' * 8}.sock", ".json"):
        (run / name).touch()
    (run / "socket.json").mkdir()
    assert [trouble.topic for trouble in troubles()] == ["daemon socket"]


def test_a_round_trip_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trip, "ROUND_TRIP_TIMEOUT", 0.1)
    done = threading.Event()

    def hang(*_: object) -> NoReturn:
        done.wait(60.0)
        raise AuthenticationFailed("too late")

    monkeypatch.setattr(round_trip, "ServerProtocol", hang)
    (trouble,) = troubles()
    done.set()
    assert trouble.topic == "round trip"
    assert "DaemonTimeout: " in trouble.text


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
def test_paths_in_findings_are_escaped(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", f"{private_directories}/é\n\x1b[31m")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    seen = run_doctor()
    assert (seen.returncode, seen.stderr) == (0, "")
    assert f"runtime directory: {private_directories}/\\xe9\\n\\x1b[31m (HARNESS" in seen.stdout
    assert all(line.startswith("OK  ") for line in seen.stdout.splitlines())


@needs_posix
def test_an_interrupted_doctor_leaves_nothing(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(private_directories))
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(private_directories / "run"))
    program = (
        "from harness_ipc import doctor\n"
        "from harness_ipc._doctor import round_trip\n"
        "def silent(port, protocol, deadline):\n"
        "    print('ready', flush=True)\n"
        "    while port.wait(deadline, reading=True, limit=256): pass\n"
        "round_trip.write = silent\n"
        "try: doctor.examine()\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    with spawn_python("-c", program) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGINT)
        assert process.read_line() == "interrupted"
        assert process.wait() == 0
    assert os.listdir(private_directories) == []
