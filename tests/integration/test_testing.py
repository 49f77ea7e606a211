"""`harness_ipc.testing` and the pytest fixtures."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import (
    AlreadyRunning,
    DaemonTimeout,
    StartFailed,
    daemon_alive,
    ensure_daemon,
    request,
    restart_daemon,
    start_daemon_server,
    stop_daemon,
    testing,
)
from tests.support.marks import needs_posix
from tests.support.processes import PATIENCE, lives, wait_until

pytest_plugins = "pytester"

Run = Callable[[str], pytest.RunResult]

# The module of a user's app.
MODULE = """
import os, signal, subprocess, sys, time

async def app(message):
    match message.get("method"):
        case "pid":
            return {"result": os.getpid()}
        case "ignore signals":
            for number in {"SIGTERM", "SIGINT"} & set(dir(signal)):
                signal.signal(getattr(signal, number), signal.SIG_IGN)
            return {"result": None}
        case "wedge":
            time.sleep(3600)
        case "leave a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", "a worker"])
            return {"result": child.pid}
        case "say":
            print(message["params"]["text"], flush=True)
            return {"result": message["params"]["text"]}
"""


class Counter:
    """An app that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")

    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(message["method"])
        return {"result": len(self.calls)}

    async def stop(self) -> None:
        self.calls.append("stop")

    async def health(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an app in a module that only this process can import."""
    (tmp_path / "users_daemon.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "users_daemon:app"


# Namespaces.


def test_two_namespaces_share_nothing_and_leave_nothing() -> None:
    with testing.private_namespace() as first, testing.private_namespace() as second:
        with testing.running(Counter(), namespace=first):
            assert daemon_alive("test", namespace=first)
            assert not daemon_alive("test", namespace=second)
        assert os.path.isdir(first.runtime_dir)
    assert not os.path.exists(os.path.dirname(first.runtime_dir))


@needs_posix
def test_a_long_temporary_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("d" * 80)))
    with testing.running(Counter()) as daemon, daemon.connect() as client:
        assert len(daemon.namespace.runtime_dir) < 40
        assert client.call("count") == 2


def test_a_daemon_that_ignores_signals_and_is_wedged_ends(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "STOP_TIMEOUT", 0.2)
    with testing.private_namespace() as namespace:
        # Started like a daemon of the code under test, without the fixtures.
        command = [sys.executable, "-P", "-m", "harness_ipc", "serve", module, "--name=other"]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pid = ensure_daemon("other", command, namespace=namespace, env=env).pid
        request("other", {"method": "ignore signals"}, namespace=namespace)
        with pytest.raises(DaemonTimeout):
            request("other", {"method": "wedge"}, timeout=1.0, namespace=namespace)
    assert pid is not None
    assert not lives(pid)


def test_a_process_that_outlives_its_daemon_is_named_and_killed(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "EXIT_PERIOD", 0.5)
    with pytest.raises(AssertionError, match="left running, and killed: ") as caught, testing.running(module) as daemon:
        pid = request("test", {"method": "leave a child"}, namespace=daemon.namespace)["result"]
    assert f"pid {pid}," in str(caught.value)
    assert "a worker" in str(caught.value)
    wait_until(lambda: not lives(pid))


def test_a_start_that_never_ends_is_named_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "EXIT_PERIOD", 0.5)
    command = [sys.executable, "-c", "import time; time.sleep(3600)"]
    with pytest.raises(DaemonTimeout) as caught, testing.private_namespace() as namespace:
        ensure_daemon("test", command, timeout=1.0, namespace=namespace)
    pids = re.findall(r"left running, and killed: pid (\d+), .*3600", "\n".join(caught.value.__notes__))
    assert pids
    wait_until(lambda: not any(lives(int(pid)) for pid in pids))


# Daemons.


def test_an_app_is_started_asked_and_stopped_in_a_thread() -> None:
    app = Counter()
    with testing.running(app) as daemon:
        assert request("test", {"meta": "health"}, namespace=daemon.namespace) == {"health": {"calls": 1}}
        with daemon.connect() as client:
            assert client.call("count") == 2
    assert app.calls == ["start", "count", "stop"]


def test_an_app_runs_on_the_loop_of_the_test() -> None:
    async def main() -> None:
        app, loop = Counter(), asyncio.get_running_loop()

        async def handle(message: dict[str, Any]) -> dict[str, Any]:
            assert asyncio.get_running_loop() is loop
            return await app.handle(message)

        async with testing.serving(handle) as daemon, await daemon.aconnect() as client:
            assert await client.call("count") == 1
        async with testing.serving(app) as daemon, await daemon.aconnect() as client:
            assert await client.call("count") == 3
        assert app.calls == ["count", "start", "count", "stop"]

    asyncio.run(main())


def test_a_module_is_found_where_the_test_finds_it(module: str) -> None:
    with testing.running(module, "users") as daemon:
        with daemon.connect() as client:
            pid = client.call("pid")
        assert pid != os.getpid()
        assert lives(pid)
    wait_until(lambda: not lives(pid))


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_second_daemon_of_a_name_is_refused(kind: str, module: str) -> None:
    app: Any = module if kind == "process" else Counter()
    with testing.running(app) as daemon, pytest.raises(AlreadyRunning), testing.running(app, namespace=daemon.namespace):
        pass


def test_errors_of_start_and_stop_are_raised(module: str) -> None:
    class Broken(Counter):
        async def start(self) -> None:
            raise LookupError("no start")

    class Unstoppable(Counter):
        async def stop(self) -> None:
            raise LookupError("no stop")

    with pytest.raises(LookupError, match="no start"), testing.running(Broken()):
        pass
    with pytest.raises(LookupError, match="no stop"), testing.running(Unstoppable()):
        pass
    with pytest.raises(StartFailed, match="nonesuch"), testing.running("nonesuch:app"):
        pass


def test_a_thread_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "STOP_TIMEOUT", 0.2)
    go = threading.Event()

    class Blocked(Counter):
        async def stop(self) -> None:
            go.wait(PATIENCE)

    with pytest.raises(AssertionError, match="thread of the daemon 'test' did not end"), testing.running(Blocked()):
        pass
    go.set()


def test_a_daemon_of_this_process_cannot_be_restarted() -> None:
    app = Counter()
    with testing.running(app) as daemon:
        with pytest.raises(StartFailed, match="this process serves 'test'"):
            restart_daemon("test", namespace=daemon.namespace)
        assert app.calls == ["start"]
        assert stop_daemon("test", namespace=daemon.namespace)
    assert app.calls == ["start", "stop"]


def test_a_server_that_a_test_has_forgotten_is_named() -> None:
    async def main() -> None:
        forgotten = "the daemon 'forgotten' of this process: close its server"
        with pytest.raises(AssertionError, match=forgotten), testing.private_namespace() as namespace:
            server, _ = await start_daemon_server(Counter().handle, "forgotten", namespace=namespace)
        async with server:
            pass

    asyncio.run(main())


# The fixtures.


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs a user's tests in a process, with warnings as errors and without this suite's variables."""
    monkeypatch.delenv("HARNESS_IPC_RUNTIME_DIR")
    monkeypatch.delenv("HARNESS_IPC_LOG_DIR")
    pytester.makepyfile(users_daemon=MODULE)

    def run_tests(source: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-W", "error", "-p", "no:cacheprovider", timeout=100)

    return run_tests


def test_nothing_is_imported_before_a_fixture_is_used(run: Run) -> None:
    result = run(
        """
        import sys

        def test_before(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("harness_ipc")
            assert [name for name in sys.modules if name.partition(".")[0] == "harness_ipc"] == []

        def test_then(ipc_namespace):
            assert "harness_ipc.testing" in sys.modules
        """,
    )
    result.assert_outcomes(passed=2)


def test_fixtures_serve_sync_and_async_tests_and_their_processes(run: Run) -> None:
    result = run(
        """
        import asyncio, subprocess, sys
        import harness_ipc

        async def handle(message):
            return {"result": message["params"]["n"] + 1}

        def test_thread(ipc_daemon):
            with ipc_daemon(handle).connect() as client:
                assert client.call("next", n=1) == 2

        def test_process(ipc_daemon, ipc_namespace):
            program = "import harness_ipc, users_daemon; harness_ipc.run_daemon(users_daemon.app, 'words')"
            daemon = ipc_daemon([sys.executable, "-c", program], "words")
            assert daemon.namespace == ipc_namespace == harness_ipc.Namespace()
            ask = "import harness_ipc; print(harness_ipc.request('words', {'method': 'pid'})['result'])"
            pid = int(subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True).stdout)
            assert pid == harness_ipc.daemon_status("words").pid

        def test_program_of_an_application(ipc_daemon, ipc_namespace):
            program = "import users_daemon as u; from harness_ipc import *; run_daemon(u.app, 'a', namespace=Namespace('tool'))"
            daemon = ipc_daemon([sys.executable, "-c", program], "a", namespace=harness_ipc.Namespace("tool"))
            assert daemon.namespace.runtime_dir.startswith(ipc_namespace.runtime_dir)
            with daemon.connect() as client:
                assert client.call("pid") == harness_ipc.daemon_status("a", namespace=daemon.namespace).pid

        def test_async(ipc_daemon):
            async def main():
                async with await ipc_daemon(handle).aconnect() as client:
                    assert await client.call("next", n=1) == 2
            asyncio.run(main())

        def test_another_application_is_private_too(ipc_namespace):
            other = harness_ipc.Namespace("other-tool")
            assert other.runtime_dir.startswith(ipc_namespace.runtime_dir)
            serve = ["serve", "users_daemon:app", "--name=words"]
            harness_ipc.ensure_daemon("words", [sys.executable, "-m", "harness_ipc", *serve], namespace=other)
        """,
    )
    result.assert_outcomes(passed=5)


def test_a_failed_test_shows_the_log_and_ends_its_daemons(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        """
        from pathlib import Path

        def test_it(ipc_daemon):
            with ipc_daemon("users_daemon:app", "words").connect() as client:
                client.call("ignore signals")
                client.call("say", text="said by the daemon")
                Path("pids").write_text(f"{client.pid} {client.call('leave a child')}")
            raise LookupError("failed")
        """,
    )
    result.assert_outcomes(failed=1, errors=1)
    for line in ("*left running, and killed: pid *a worker*", "*LookupError: failed", "said by the daemon"):
        result.stdout.fnmatch_lines([line])
    pids = [int(pid) for pid in (pytester.path / "pids").read_text().split()]
    wait_until(lambda: not any(map(lives, pids)))
