"""Starts of a daemon: slow, failed and detached ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import (
    DaemonTimeout,
    Namespace,
    StartFailed,
    daemon_status,
    ensure_daemon,
    identify,
    log_path,
    stop_daemon,
)
from tests.support.managed import (
    AT_ONCE,
    PROGRAM,
    assert_none_left,
    assert_one_daemon,
    at_once,
    command,
    ensure,
    in_thread,
    live_processes,
    started,
    the_log,
    waits_for_go,
)
from tests.support.marks import needs_linux, needs_posix
from tests.support.processes import PATIENCE, serves, spawn_daemon, spawn_python, wait_until

pytestmark = pytest.mark.usefixtures("base")


# Starts.


CALLER = """
import json, sys
from harness_ipc import ensure_daemon
print(ensure_daemon("test", json.loads(sys.argv[1])).pid, flush=True)
"""


@pytest.mark.parametrize("blocking", [False, True])
def test_a_slow_start_is_waited_for_by_all_and_repeated_by_none(base: Path, blocking: bool) -> None:
    before = time.time()
    argv = command(then=waits_for_go(blocking=blocking))
    with spawn_python("-c", CALLER, json.dumps(argv)) as one, spawn_python("-c", CALLER, json.dumps(argv)) as two:
        try:
            wait_until((base / "waiting").exists)
            status = daemon_status("test")
            assert (status.state, status.alive) == ("starting", False)
            assert [status.pid] == started(base)
            assert status.since is not None
            assert before - 1 <= status.since <= time.time() + 1
            with pytest.raises(DaemonTimeout, match="starting") as caught:
                ensure_daemon("test", argv, timeout=2.0)
            assert "\n" not in str(caught.value)
            # The start continues.
            assert daemon_status("test").state == "starting"
        finally:
            (base / "go").touch()
        assert one.read_line() == two.read_line() == str(identify("test"))
        assert (one.wait(), two.wait()) == (0, 0)
    assert started(base) == [identify("test")]
    assert_one_daemon()


REPORTS = """
from harness_ipc import report
class App(App):
    async def start(self):
        for n in range(5):
            await report({"loaded": n})
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            await asyncio.sleep(0.01)
        await report({"loaded": "all"})
        await super().start()
"""


def test_progress_of_a_start_reaches_all_waiting_processes(base: Path) -> None:
    argv = command(then=REPORTS)
    reports: list[Any] = []
    others: list[Any] = []
    with (
        in_thread(ensure_daemon, "test", argv, on_progress=reports.append) as first,
        in_thread(ensure_daemon, "test", argv, on_progress=others.append) as second,
    ):
        try:
            wait_until((base / "waiting").exists)
            # The last report of a second is recorded at the end of that second.
            wait_until(lambda: daemon_status("test").progress == {"loaded": 4})
            assert daemon_status("test").state == "starting"
            wait_until(lambda: {"loaded": 4} in reports and {"loaded": 4} in others)
        finally:
            (base / "go").touch()
        assert first.result(PATIENCE).pid == second.result(PATIENCE).pid == identify("test")
    all_of_them = [{"loaded": n} for n in (*range(5), "all")]
    by_pipe, by_record = sorted([reports, others], key=len, reverse=True)
    if sys.platform != "win32":
        assert by_pipe == all_of_them
    # At most one report in a second is recorded, in order.
    assert by_record == [report for report in all_of_them if report in by_record]
    assert len(by_record) <= 3
    assert daemon_status("test").progress is None
    assert_one_daemon()


def test_reports_of_a_daemon_without_the_pipe_are_passed_on(base: Path) -> None:
    close = "import os; os.environ.pop('HARNESS_IPC_START', None)\n"
    reports: list[Any] = []
    with in_thread(ensure_daemon, "test", command(first=close, then=REPORTS), on_progress=reports.append) as starting:
        try:
            wait_until(lambda: {"loaded": 4} in reports)
        finally:
            (base / "go").touch()
        assert starting.result(PATIENCE).pid == identify("test")
    assert len(reports) <= 3
    assert_one_daemon()


def test_a_callback_that_fails_ends_the_wait_and_not_the_start(base: Path) -> None:
    def fail(progress: Any) -> None:
        raise LookupError(progress["loaded"])

    with pytest.raises(LookupError):
        ensure_daemon("test", command(then=REPORTS), on_progress=fail)
    (base / "go").touch()
    assert ensure(then=REPORTS).pid == identify("test")
    assert started(base) == [identify("test")]


def test_a_start_that_reports_all_the_time_still_times_out(base: Path) -> None:
    busy = """
from harness_ipc import report
class App(App):
    async def start(self):
        while not (folder / "go").exists():
            await report(time.time())
            await asyncio.sleep(0)
        await super().start()
"""
    with pytest.raises(DaemonTimeout, match="starting"):
        ensure_daemon("test", command(then=busy), timeout=3.0, on_progress=lambda progress: None)
    # On a loaded machine, the timeout may expire before the child has acquired the name.
    wait_until(lambda: daemon_status("test").state == "starting")
    (base / "go").touch()
    assert ensure(then=busy).pid == identify("test")
    assert_one_daemon()


def test_a_start_continues_after_its_first_caller_times_out(base: Path) -> None:
    argv = command(then=waits_for_go())
    with pytest.raises(DaemonTimeout, match="starting"):
        ensure_daemon("test", argv, timeout=3.0)
    # On a loaded machine, the timeout may expire before the child has acquired the name.
    wait_until(lambda: daemon_status("test").state == "starting")
    with in_thread(ensure_daemon, "test", argv) as second:
        (base / "go").touch()
        assert second.result(PATIENCE).pid == identify("test")
    assert started(base) == [identify("test")]
    assert_one_daemon()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_daemon_can_be_stopped_while_it_starts(base: Path, blocking: bool) -> None:
    with in_thread(ensure_daemon, "test", command(then=waits_for_go(blocking=blocking))) as starting:
        wait_until((base / "waiting").exists)
        with at_once():
            assert stop_daemon("test", timeout=0.5) is True
            assert isinstance(starting.exception(PATIENCE), StartFailed)
    assert daemon_status("test").state == "absent"
    assert_none_left()
    (base / "go").touch()
    ensure()
    assert_one_daemon()


def test_a_start_imports_neither_filelock_nor_asyncio(base: Path) -> None:
    code = f"import sys\n{CALLER}\nprint(*{{'asyncio', 'filelock'}} & set(sys.modules))"
    with spawn_python("-c", code, json.dumps(command())) as starter:
        assert starter.read_line() == str(identify("test"))
        assert starter.read_line() == ""
    assert_one_daemon()


FAILURES = {
    "fails in start": (command(then="async def fail(self): raise LookupError('no model')\nApp.start = fail"), "no model"),
    "syntax error": ([sys.executable, "-c", "def ("], "SyntaxError"),
    "no such module": ([sys.executable, "-m", "no_such_module_of_ours"], "no_such_module_of_ours"),
    "exits at once": ([sys.executable, "-c", "import sys; print('what a pity', file=sys.stderr); sys.exit(3)"], "what a pity"),
    "exits silently": ([sys.executable, "-c", "raise SystemExit(7)"], "7"),
    "is no daemon": ([sys.executable, "-c", "pass"], "0"),
    "is another daemon": (command("other"), "other"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_start_has_its_reason_and_is_logged(failure: str) -> None:
    argv, reason = FAILURES[failure]
    logs = [""]
    for _ in range(2):
        with at_once(), pytest.raises(StartFailed) as caught:
            ensure_daemon("test", argv)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
        assert 'File "' not in str(caught.value)
        logs.append(the_log())
        assert logs[-1].startswith(logs[-2])
        assert "-c" in logs[-1][len(logs[-2]) :] or "-m" in logs[-1][len(logs[-2]) :]  # the banner
        if failure not in ("exits silently", "is no daemon", "is another daemon"):
            assert reason in caught.value.log_tail
            assert reason in logs[-1][len(logs[-2]) :]
        wait_until(lambda: not live_processes())
    assert daemon_status("test").state == "absent"
    # On Windows, terminating the other daemon leaves its record.
    assert stop_daemon("other") is False
    assert_none_left()
    ensure()
    assert the_log().startswith(logs[-1])
    assert_one_daemon()


@pytest.mark.parametrize("program", ["missing", "directory", "no program"])
def test_an_unexecutable_program_is_a_failed_start(base: Path, program: str) -> None:
    path = base / "program"
    if program == "directory":
        path.mkdir()
    elif program == "no program":
        path.write_text("not executable")
    for argv in ([str(path)], [str(path), "a\nb"]):
        with at_once(), pytest.raises(StartFailed) as caught:
            ensure_daemon("test", argv)
        assert ascii(str(path)) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(StartFailed):
        ensure_daemon("test", command(), cwd=str(base / "missing"))
    assert daemon_status("test").state == "absent"
    ensure()
    assert_one_daemon()


# Inheritance from the starter, and independence of it.

STARTER = """
import json, os, sys
from harness_ipc import ensure_daemon
inherited = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
for descriptor in (inherited, *os.pipe()):
    os.set_inheritable(descriptor, True)
print(ensure_daemon("test", json.loads(sys.argv[1])).pid, flush=True)
sys.stdin.read()
while True:
    os.read(os.pipe()[0], 1)
"""


@contextlib.contextmanager
def lasting_starter(base: Path, argv: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the pids of an idle starter in a new session, and of its daemon."""
    outer = "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    with spawn_python("-c", outer, "-c", STARTER, json.dumps(argv), str(base / "opened")) as starter:
        yield starter.pid, int(starter.read_line())


def descriptors(pid: int) -> dict[int, str]:
    """Return the target of each descriptor of a process. Those that it closes meanwhile are left out."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


@needs_linux
def test_a_daemon_inherits_nothing_and_prints_to_the_log(base: Path) -> None:
    argv = command(first="import sys; print('first words: größer', file=sys.stderr)\n")
    with lasting_starter(base, argv) as (starter, daemon):
        of_starter = set(descriptors(starter).values()) - {os.devnull}
        assert str(base / "opened") in of_starter
        # The daemon closes the pipe shortly after it has reported that it is ready.
        wait_until(lambda: not [target for target in descriptors(daemon).values() if target.startswith("pipe:")])
        found = descriptors(daemon)
        assert (found[0], found[1], found[2]) == (os.devnull, *[str(log_path("test"))] * 2)
        assert not of_starter & set(found.values())
        log = the_log()
        assert log.index("first words: gr") < log.index("starting test: pid")
        assert daemon_status("test").detached == "session"
        assert_serves_beside(starter)


def assert_serves_beside(starter: int) -> None:
    assert serves()
    assert sorted(process.pid for process in live_processes()) == sorted(pid for pid in (starter, identify("test")) if pid)


@needs_posix
def test_it_survives_its_starters_process_group_and_session(base: Path) -> None:
    with lasting_starter(base, command()) as (starter, daemon):
        assert os.getsid(daemon) not in (os.getsid(starter), os.getsid(0))
        assert os.getpgid(daemon) not in (os.getpgid(starter), os.getpgid(0))
        assert os.getpgid(starter) == starter
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
            os.killpg(starter, number)
    assert identify("test") == daemon
    assert_one_daemon()


@needs_posix
def test_a_stopped_daemon_leaves_no_zombie(base: Path) -> None:
    with lasting_starter(base, command()) as (starter, daemon):
        assert stop_daemon("test") is True
        wait_until(lambda: not psutil.pid_exists(daemon), AT_ONCE)
        assert psutil.Process(starter).children() == []
    assert_none_left()


def test_a_daemon_in_another_namespace_is_not_taken_for_this_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Namespace(runtime_dir=base / "elsewhere")
    program = command(
        first="from harness_ipc import Namespace", options=f"namespace=Namespace(runtime_dir={elsewhere.runtime_dir!r})"
    )
    with pytest.raises(StartFailed, match=r"starts the daemon 'test' in .*elsewhere, not 'test' in .*: give run_daemon"):
        ensure_daemon("test", program)
    # The daemon in the wrong namespace was terminated; on Windows that leaves its record.
    wait_until(
        lambda: (
            daemon_status("test", namespace=elsewhere).state in ("absent", "stale")
            and stop_daemon("test", namespace=elsewhere) is False
        )
    )
    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as patched:
            patched.setenv("HARNESS_IPC_RUNTIME_DIR", elsewhere.runtime_dir)
            other = stack.enter_context(spawn_daemon("test"))
        before = len(started(base))
        with pytest.raises(StartFailed, match="must call run_daemon without `namespace`"):
            ensure_daemon("test", program)
        assert len(started(base)) - before == 3
        assert other.process.poll() is None
    assert ensure_daemon("test", command()).pid == identify("test")
    assert_one_daemon()


# Texts of errors.


@pytest.mark.parametrize("argv", ["python -m index", b"python", Path("python"), [], ["python", 3]])
def test_an_invalid_command_line_is_refused_with_advice(argv: Any) -> None:
    error = ValueError if argv == [] else TypeError
    with pytest.raises(error, match="argv" if argv != ["python", 3] else "int"):
        ensure_daemon("test", argv)
    assert daemon_status("test").state == "absent"


def test_a_command_line_may_have_paths(base: Path) -> None:
    assert ensure_daemon("test", [Path(sys.executable), *command()[1:]]).state == "running"


def test_a_timeout_names_daemon_operation_and_seconds(base: Path) -> None:
    argv = command(then=waits_for_go())
    with in_thread(ensure_daemon, "test", argv) as starting:
        wait_until((base / "waiting").exists)
        with pytest.raises(
            DaemonTimeout, match=r"^timed out after 0\.5 s waiting for the daemon 'test' to start: pid \d+ has been start"
        ):
            ensure_daemon("test", argv, timeout=0.5)
        (base / "go").touch()
        assert starting.result(PATIENCE).state == "running"


def test_a_timeout_names_the_operation(base: Path) -> None:
    text = r"^timed out after 0 s waiting for the daemon 'test' to start: {}; allow a longer timeout, or see its log .*$"
    with pytest.raises(DaemonTimeout, match=text.format("no starting process has its name yet")):
        ensure_daemon("test", command(), timeout=0)
    assert started(base) == []
    pid = ensure().pid
    with pytest.raises(DaemonTimeout, match=text.format(f"pid {pid} now has its name")):
        ensure_daemon("test", command(), timeout=0)
    assert_one_daemon()


@pytest.mark.parametrize(
    ("then", "type", "reason", "text"),
    [
        (
            "async def fail(self): raise LookupError('no model')\nApp.start = fail",
            "LookupError",
            "no model",
            "LookupError: no model",
        ),
        (
            "import harness_ipc\nasync def fail(self): raise harness_ipc.RemoteError('locked', type='Ill')\nApp.start = fail",
            "Ill",
            "locked",
            "Ill: locked",
        ),
        ("raise ValueError('no\\nuse')", "", "use", "ended with status 1 before it was ready (use)"),
    ],
)
def test_a_failed_start_has_its_reason_once(then: str, type: str, reason: str, text: str) -> None:
    with pytest.raises(StartFailed) as caught:
        ensure_daemon("test", command(then=then))
    assert (caught.value.type, caught.value.reason) == (type, reason)
    assert str(caught.value).count(text) == 1
    assert str(caught.value).count("its log") == 1


@pytest.mark.parametrize("by", ["a program", "serve"])
def test_the_log_has_the_reason_of_a_failed_start_once(by: str, base: Path) -> None:
    then = "async def fail(self): raise LookupError('no ' + 'model')\nApp.start = fail"
    argv = command(then=then)
    if by == "serve":
        (base / "service.py").write_text(PROGRAM.replace("sys.argv[1]", "'test'") + then)
        argv = [sys.executable, "-m", "harness_ipc", "serve", "service:App", "--name=test"]
    with pytest.raises(StartFailed, match="no model"):
        ensure_daemon("test", argv, cwd=str(base))
    assert [the_log().count(text) for text in ("start failed", "Traceback", "LookupError: no model\n")] == [1, 1, 2]


@needs_posix
@pytest.mark.parametrize(("name", "words"), [("SIGKILL", "SIGKILL"), ("SIGTERM", "stopped while starting")])
def test_a_start_that_a_signal_ends_names_the_signal(name: str, words: str) -> None:
    number = int(signal.Signals[name])
    then = f"async def end(self): os.kill(os.getpid(), {number}); await asyncio.sleep(60)\nApp.start = end"
    with pytest.raises(StartFailed, match=words) as caught:
        ensure_daemon("test", command(then=then))
    assert caught.value.type == name
    assert "INFO" not in str(caught.value)
