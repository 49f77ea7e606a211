"""The process of a daemon: start, end and log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import (
    AlreadyRunning,
    ConnectionLost,
    DaemonNotRunning,
    RemoteError,
    StartFailed,
    UnsafeDirectory,
    cleanup_endpoint,
    connect_daemon,
    log_path,
    ping,
    request,
    run_daemon,
    runtime_dir,
)
from harness_ipc._registry import records
from tests.support.marks import needs_posix
from tests.support.processes import (
    PATIENCE,
    App,
    DaemonProcess,
    run_python,
    runtime_files,
    serves,
    spawn_daemon,
    spawn_python,
    wait_until,
)

# Seconds: longer than any test.
NEVER = 3600.0
LOG_BYTES = 5 * 2**20


class FailsToStart(App):
    async def start(self) -> None:
        raise LookupError("no such model: größer")


class FailsToStop(App):
    async def stop(self) -> None:
        await super().stop()
        raise LookupError("nothing to let go")


class StartsForEver(App):
    async def start(self) -> None:
        print("starting", flush=True)
        await asyncio.sleep(NEVER)


class StartsSlowly(App):
    """Its start blocks the loop."""

    async def start(self) -> None:
        print("starting", flush=True)
        assert sys.stdin.readline() or True


class Unstoppable(App):
    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        while message.get("method") == "sleep":
            with contextlib.suppress(asyncio.CancelledError):
                await super().handle(message)
        return await super().handle(message)


class Talkative(App):
    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        match message.get("method"):
            case "warn":
                warnings.simplefilter("always")
                warnings.warn("careful", stacklevel=1)
            case "log":
                for _ in range(message["lines"]):
                    logging.getLogger("talk").info("x" * 10_000)
            case "drop":  # an exception in a callback of the loop
                asyncio.get_running_loop().call_soon({"key": 1}.pop, "dropped")
        return {"result": None}


async def function(message: dict[str, Any]) -> dict[str, Any]:
    return {"result": message.get("params")}


@contextlib.contextmanager
def spawn_app(app: str, *, until: str = "ready", **options: Any) -> Iterator[DaemonProcess]:
    """Start an app of this module as the daemon "test", and yield it when it has printed `until`."""
    with spawn_python("-m", "tests.integration.test_daemon", app, json.dumps(options)) as daemon:
        assert daemon.read_line() == until
        yield daemon


def assert_clean() -> None:
    """Assert that no file of the daemon is left, and that its name is free."""
    assert runtime_files() == []
    assert cleanup_endpoint("test")


def the_log() -> str:
    return log_path("test").read_text(encoding="utf-8")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Its end.

SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP"]
ENDS = ["shutdown", *(pytest.param(name, marks=needs_posix) for name in SIGNALS)]


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.parametrize("app", ["function", "App"])
def test_a_daemon_serves_until_it_is_stopped(app: str, way: str) -> None:
    with spawn_app(app) as daemon:
        assert serves()
        if way == "shutdown":
            assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
        else:
            daemon.signal(signal.Signals[way])
        assert daemon.wait() == 0
        assert daemon.read_line() == ("stopped" if app == "App" else "")
        assert daemon.read_line() == ""
    assert_clean()


@contextlib.contextmanager
def in_flight(**params: Any) -> Iterator[Future[Any]]:
    """Send a request that sleeps, and yield its outcome once it has begun."""
    with connect_daemon("test") as client, ThreadPoolExecutor(1) as pool:
        job = pool.submit(client.call, "sleep", timeout=NEVER, **params)
        wait_until(lambda: bool(request("test", {"method": "log"})["result"]))
        yield job


def test_a_request_in_flight_finishes_before_the_end() -> None:
    with spawn_daemon("test", grace_period=NEVER) as daemon, in_flight(seconds=0.5, tag="slept") as job:
        assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
        assert job.result(PATIENCE) == "slept"
        assert daemon.wait() == 0
    assert_clean()


@pytest.mark.parametrize("app", ["App", "Unstoppable"])
def test_a_request_that_does_not_end_does_not_prevent_the_end(app: str) -> None:
    with spawn_app(app, grace_period=0.2) as daemon, in_flight(seconds=NEVER) as job:
        assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
        assert isinstance(job.exception(PATIENCE), (RemoteError, ConnectionLost))
        assert daemon.process.wait(15) == 0
    assert_clean()


@needs_posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_a_long_drain_at_once(number: str) -> None:
    with spawn_daemon("test", grace_period=NEVER) as daemon, in_flight(seconds=NEVER) as job:
        daemon.signal(signal.Signals[number])
        wait_until(lambda: records.read("test").state == "draining")
        assert daemon.process.poll() is None
        daemon.signal(signal.Signals[number])
        assert daemon.wait() != 0
        assert isinstance(job.exception(PATIENCE), (RemoteError, ConnectionLost))
    with spawn_daemon("test"):
        assert serves()


@needs_posix
def test_second_hangup_does_not_cut_the_drain_short() -> None:
    with spawn_daemon("test", grace_period=NEVER) as daemon, in_flight(seconds=1.0, tag="slept") as job:
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: "received SIGHUP" in the_log())
        daemon.signal(signal.SIGHUP)
        assert job.result(PATIENCE) == "slept"
        assert daemon.wait() == 0
        assert daemon.read_line() == "stopped"
    assert_clean()


@needs_posix
def test_hangup_that_was_ignored_at_the_start_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with spawn_daemon("test") as daemon:
            daemon.signal(signal.SIGHUP)
            assert serves()
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert "SIGHUP" not in the_log()


@needs_posix
def test_closing_the_terminal_of_serve_runs_stop(private_directories: Path) -> None:
    import pty

    (private_directories / "svc.py").write_text(
        "import os\n"
        "class App:\n"
        "    async def start(self): print('starting')\n"
        "    async def handle(self, message): return {'result': message.get('params')}\n"
        f"    async def stop(self): print('stopping'); open({str(private_directories / 'stopped')!r}, 'w').close()\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(private_directories)
        os.execv(sys.executable, [sys.executable, "-m", "harness_ipc", "serve", "svc:App", "--name", "test"])
    wait_until(lambda: ping("test"))
    os.close(terminal)
    os.waitpid(pid, 0)
    assert (private_directories / "stopped").exists()
    assert_clean()


HANDLER = """
import logging, sys
from harness_ipc import run_daemon
async def handle(message): return {}
"""


def run_in_terminal(program: str) -> str:
    """Run a program in a new terminal, and return its output."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    shown = b""
    # After the last writer has closed it, Linux raises EIO; other systems report EOF.
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return shown.decode()


@needs_posix
def test_in_a_terminal_the_log_is_shown_too() -> None:
    log = "on_ready=lambda _: logging.getLogger('app').info('red \\x1b[31m')"
    shown = run_in_terminal(f"{HANDLER}run_daemon(handle, 'test', idle_timeout=0.0, {log})")
    lines = shown.splitlines()
    assert lines[0].startswith("INFO harness_ipc.daemon: ready at ")
    assert lines[1:] == ["INFO app: red \\x1b[31m", "INFO harness_ipc.daemon: idle for 0 s", *lines[3:]]
    assert "\x1b" not in shown
    # The log file has each line once.
    assert the_log().count("ready at") == 1
    assert the_log().count("starting test: pid") == 1


@needs_posix
def test_in_a_terminal_a_program_keeps_its_own_logging() -> None:
    own = "logging.basicConfig(level='INFO', format='OWN %(message)s')"
    shown = run_in_terminal(f"{HANDLER}{own}\nrun_daemon(handle, 'test', idle_timeout=0.0)")
    assert shown.count("ready at") == shown.count("OWN ready at") == 1


@needs_posix
def test_an_error_that_ends_it_is_shown_once_in_a_terminal() -> None:
    fails = """
class App:
    async def handle(self, message): ...
    async def start(self): raise LookupError("no model")
try:
    run_daemon(App(), "test")
except Exception as error:
    print("caught", error)
"""
    assert run_in_terminal(HANDLER + fails) == "caught the app's start failed: LookupError: no model\r\n"


def test_without_a_terminal_the_log_is_in_its_file_alone() -> None:
    done = run_python("-c", f"{HANDLER}run_daemon(handle, 'test', idle_timeout=0.0)")
    assert (done.stdout, done.stderr) == ("", "")
    assert the_log().count("ready at") == 1


@needs_posix
def test_soft_limit_of_descriptors_is_raised() -> None:
    program = """
import resource
from harness_ipc import run_daemon

async def handle(message): return {}
def limits(): return resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits()[1]))
run_daemon(handle, "test", idle_timeout=0.0, on_ready=lambda _: print(*limits()))
"""
    soft, hard = run_python("-c", program).stdout.split()
    assert soft in (hard, "10240")


def test_a_stop_that_fails_is_logged_and_leaves_nothing() -> None:
    with spawn_app("FailsToStop") as daemon:
        assert serves()
        request("test", {"meta": "shutdown"})
        daemon.wait()
        assert "nothing to let go" in the_log()
    assert_clean()


def test_a_daemon_ends_by_itself_only_when_idle() -> None:
    with spawn_daemon("test", idle_timeout=2.0) as daemon, connect_daemon("test") as kept:
        # Longer than the idle timeout.
        assert kept.call("sleep", seconds=3.0, tag="slept") == "slept"
        assert serves()
        # Pings and kept connections do not count as use.
        wait_until(lambda: not ping("test"))
        assert daemon.wait() == 0
        assert daemon.read_line() == "stopped"
        with pytest.raises(DaemonNotRunning):
            kept.call("echo")
    assert_clean()


# Its start.


def test_a_second_daemon_is_refused_with_the_first_pid() -> None:
    with spawn_daemon("test") as daemon:
        with pytest.raises(AlreadyRunning, match=rf"\b{daemon.pid}\b") as caught:
            run_daemon(App(), "test")
        assert caught.value.pid == daemon.pid
        second = run_python("-m", "tests.support.processes", "test", "{}")
        assert second.returncode != 0
        assert f"pid {daemon.pid}" in second.stderr
        assert second.stdout == ""  # it printed neither "ready" nor "stopped"
        assert serves()


def test_a_starting_daemon_already_holds_the_name() -> None:
    with spawn_app("StartsForEver", until="starting") as daemon:
        with pytest.raises(AlreadyRunning) as caught:
            run_daemon(App(), "test")
        assert caught.value.pid == daemon.pid
        assert not ping("test")


def test_a_failed_start_has_its_reason_and_leaves_nothing() -> None:
    failed = run_python("-m", "tests.integration.test_daemon", "FailsToStart", "{}")
    assert failed.returncode != 0
    assert "StartFailed" in failed.stderr
    assert failed.stdout == "stopped\n"
    log = the_log()
    assert "Traceback" in log
    assert "LookupError: no such model: größer" in log
    assert_clean()


@needs_posix
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_start_that_takes_long(number: str) -> None:
    with spawn_app("StartsForEver", until="starting") as daemon:
        assert runtime_files() == ["test.json"]
        assert records.read("test").state == "starting"
        daemon.signal(signal.Signals[number])
        assert daemon.wait() == 0
        assert daemon.read_line() == "stopped"
    assert_clean()


class SyncStart:
    def start(self) -> None: ...

    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        return message


def sync_handler(message: dict[str, Any]) -> dict[str, Any]:
    return message


@pytest.mark.parametrize(
    ("app", "text"),
    [
        (object(), r"app must be an async function or an object with an async handle\(\), not object"),
        (None, "not NoneType"),
        (App, r"App is a class: write run_daemon\(App\(\)\)"),
        (sync_handler, r"sync_handler is not async: write `async def sync_handler\("),
        (lambda message: message, r"write `async def lambda\("),
        (SyncStart(), r"SyncStart.start is not async: write `async def start\("),
    ],
)
def test_unusable_app_is_refused_before_anything_is_done(app: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        run_daemon(app, "test")
    with pytest.raises(FileNotFoundError):
        runtime_files()


def test_run_daemon_inside_a_running_loop_is_refused() -> None:
    async def main() -> None:
        run_daemon(function, "test")

    with pytest.raises(RuntimeError, match="await start_daemon_server"):
        asyncio.run(main())


class OnlyHandle:
    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"result": message.get("params")}


class Callable:
    async def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"result": message.get("params")}


@pytest.mark.parametrize("app", ["OnlyHandle", "Callable"])
def test_app_needs_no_more_than_an_async_handler(app: str) -> None:
    with spawn_app(app) as daemon:
        assert serves()
        request("test", {"meta": "shutdown"})
        assert daemon.wait() == 0
    assert_clean()


def test_it_runs_in_a_thread_that_may_not_handle_signals() -> None:
    ready = threading.Event()
    thread = threading.Thread(target=run_daemon, args=(function, "test"), kwargs={"on_ready": lambda _: ready.set()})
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        assert serves()
    finally:
        request("test", {"meta": "shutdown"})
        thread.join()
    assert_clean()


# Its log.


@pytest.mark.parametrize("obstacle", ["a file where the directory belongs", "a file above it", "a directory for the log"])
def test_an_unwritable_log_is_an_error_with_advice(
    private_directories: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    directory = private_directories / "log"
    with monkeypatch.context() as patch:
        if obstacle == "a directory for the log":
            log_path("test").mkdir(parents=True)
        else:
            directory.write_text("in the way")
            if obstacle == "a file above it":
                patch.setenv("HARNESS_IPC_LOG_DIR", str(directory / "log"))
        with pytest.raises((StartFailed, UnsafeDirectory), match=r"HARNESS_IPC_LOG_DIR|run `(mv|move) "):
            run_daemon(App(), "test")
        assert runtime_files() == []
    if directory.is_dir():
        log_path("test").rmdir()
    else:
        assert directory.read_text() == "in the way"
        directory.unlink()
    assert_clean()


def test_the_log_is_utf8_and_private_and_each_run_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(variable, value)
    umask = os.umask(0)
    try:
        for run in (1, 2):
            with spawn_daemon("test") as daemon:
                with connect_daemon("test") as client, pytest.raises(RemoteError, match="größer ☃ \ud800"):
                    client.call("raise", text="größer ☃ \ud800")
                request("test", {"meta": "shutdown"})
                assert daemon.wait() == 0
            log = the_log()
            assert log.count("starting test: pid") == log.count("stopped test") == run
            assert f"starting test: pid {daemon.pid}," in log
            assert log.count("ValueError: größer ☃ \\ud800") == log.count("Traceback") == run
    finally:
        os.umask(umask)
    if os.name == "posix":
        assert (mode(log_path("test")), mode(log_path("test").parent), mode(runtime_dir())) == (0o600, 0o700, 0o700)


def test_warnings_and_uncaught_exceptions_are_logged() -> None:
    with spawn_app("Talkative"):
        assert request("test", {"method": "warn"}) == {"result": None}
        assert request("test", {"method": "drop"}) == {"result": None}
        assert request("test", {"method": "echo"}) == {"result": None}
        log = the_log()
        assert "UserWarning: careful" in log
        assert "KeyError: 'dropped'" in log


def test_a_long_log_is_rotated_and_one_predecessor_kept() -> None:
    log = log_path("test")
    predecessor = log.with_name("test.log.1")
    with spawn_app("Talkative") as daemon:
        for _ in range(3):
            assert request("test", {"method": "log", "lines": 400}, timeout=PATIENCE) == {"result": None}
        assert request("test", {"method": "echo"}) == {"result": None}
        request("test", {"meta": "shutdown"})
        assert daemon.wait() == 0
    assert sorted(path.name for path in log.parent.iterdir()) == ["test.log", "test.log.1"]
    assert LOG_BYTES - 11_000 < predecessor.stat().st_size <= LOG_BYTES
    assert 0 < log.stat().st_size <= LOG_BYTES
    assert "stopped test" in the_log()
    if os.name == "posix":
        assert (mode(log), mode(predecessor)) == (0o600, 0o600)
    assert_clean()


if __name__ == "__main__":
    app = globals()[sys.argv[1]]
    run_daemon(
        app() if isinstance(app, type) else app,
        "test",
        on_ready=lambda _: print("ready", flush=True),
        **json.loads(sys.argv[2]),
    )
