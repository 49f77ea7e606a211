"""Random operations of users, crashes and other programs on two names, with invariants.

``HARNESS_TEST_EXAMPLES`` is the number of examples, 10 by default; if it is set, they are different each time.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import hypothesis.configuration
import psutil
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from harness_ipc import (
    Client,
    DaemonNotRunning,
    DaemonTimeout,
    HarnessIPCError,
    connect_daemon,
    daemon_status,
    ensure_daemon,
    identify,
    manager,
    request,
    restart_daemon,
    runtime_path,
    stop_daemon,
)
from harness_ipc._registry import files, records
from tests.conftest import set_directories, temporary_directory
from tests.support.managed import command, ensure, kill_all, live_processes, spawn_bystander
from tests.support.processes import PATIENCE, DaemonProcess, runtime_files, serves, wait_until

# Keep files of hypothesis out of the working directory.
_HOME = tempfile.mkdtemp(prefix="hi-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
hypothesis.configuration.set_hypothesis_home_dir(_HOME)

# Starting a process takes a second on Windows.
EXAMPLES = 10 if os.name == "posix" else 2
STEPS = 12
NAMES = ("a", "b")
ENDS = ("stopped", "restarted", "killed")
# Seconds: the timeout of a call that is not answered.
SHORT = 0.1

# Each reply has the tag of its request.
TAGGED = """
class App(App):
    async def handle(self, message):
        if message.get("method") != "tag":
            return await super().handle(message)
        await asyncio.sleep(message["params"]["seconds"])
        return {"result": message["params"]["tag"]}
"""


def tagged(tag: str, seconds: float = 0.0) -> dict[str, Any]:
    return {"method": "tag", "params": {"tag": tag, "seconds": seconds}}


# Ways to damage a record. Each returns whether it was possible.
Damage = Callable[[Path, dict[str, Any], Path], bool]
# An unrelated process. Records get its pid without its creation time, so it must not be signalled.
bystander: DaemonProcess | None = None


def delete(path: Path, record: dict[str, Any], other: Path) -> bool:
    if not path.exists():
        return False
    # On Windows, a file that is being read cannot be removed.
    files.retry_on_sharing_violation(os.unlink, path)
    return True


def write(content: bytes) -> Damage:
    def damage(path: Path, record: dict[str, Any], other: Path) -> bool:
        return overwrite(path, content)

    return damage


def overwrite(path: Path, content: bytes) -> bool:
    # The directory may not exist yet.
    if path.parent.exists():
        path.touch(mode=0o600)
        path.write_bytes(content)
    return path.exists()


def tear(path: Path, record: dict[str, Any], other: Path) -> bool:
    return bool(record) and overwrite(path, json.dumps(record).encode()[:200])


def take_others(path: Path, record: dict[str, Any], other: Path) -> bool:
    return other.exists() and overwrite(path, other.read_bytes())


def name_bystander(path: Path, record: dict[str, Any], other: Path) -> bool:
    assert bystander is not None
    changed = {"pid": bystander.pid, "create_time": psutil.Process(bystander.pid).create_time() - 60}
    return bool(record) and overwrite(path, json.dumps({**record, **changed}).encode())


def change_generation(path: Path, record: dict[str, Any], other: Path) -> bool:
    return bool(record) and overwrite(path, json.dumps({**record, "generation": "0" * 32}).encode())


def delete_socket(path: Path, record: dict[str, Any], other: Path) -> bool:
    # Only if the record names a socket of its own name.
    if (record.get("family"), record.get("name")) != ("AF_UNIX", path.stem) or not os.path.exists(record["address"]):
        return False
    os.unlink(record["address"])
    return True


DAMAGES: dict[str, Damage] = {
    "deleted": delete,
    "empty": write(b""),
    "garbage": write(b"\0\xff{nonsense"),
    "torn": tear,
    "another daemon's": take_others,
    "of a bystander": name_bystander,
    "of another generation": change_generation,
    "without a socket": delete_socket,
}
# As often as all others together, since a wrong signal is the worst consequence.
OFTEN = ["of a bystander"] * (len(DAMAGES) - 1) + sorted(DAMAGES)


class Name:
    """The state of one name: "absent", "running", "suspended", or "unknown" after its files were damaged."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "absent"
        self.suspended = False
        self.clients: list[Client] = []
        self.by_hand: list[subprocess.Popen[str]] = []

    @property
    def argv(self) -> list[str]:
        return command(self.name, then=TAGGED, options="on_ready=lambda _: print('ready', flush=True)")

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in live_processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[-1:] == [self.name]:
                    found.append(process)
        return found

    def patience(self) -> float:
        return SHORT if self.suspended else PATIENCE

    def resume(self) -> None:
        for process in self.processes() if self.suspended else ():
            process.resume()
        self.suspended = False

    def serves(self) -> bool:
        with contextlib.suppress(HarnessIPCError):
            return request(self.name, tagged("honest")) == {"result": "honest"}
        return False


class Machine(RuleBasedStateMachine):
    """It performs operations, and compares the results with the expected state of each name."""

    def __init__(self) -> None:
        super().__init__()
        global bystander
        self.stack = contextlib.ExitStack()
        # Started before the variables are set, so it does not count as a daemon of the test.
        bystander = self.stack.enter_context(spawn_bystander())
        self.patch = pytest.MonkeyPatch()
        self.directory = temporary_directory()
        self.base = set_directories(self.patch, self.directory.name)
        # A suspended process does not react to SIGTERM, so do not wait for it.
        self.patch.setattr(manager, "_TERMINATE_PERIOD", SHORT)
        self.names = [Name(name) for name in NAMES]
        self.tags = itertools.count()
        # Sockets whose record was damaged. They may be left, since only the record named them.
        self.lost: set[str] = set()

    def settle(self, name: Name, status: Any) -> None:
        """Update the state after a start."""
        assert status.alive
        if status.state == "running" and name.state != "running":
            with contextlib.suppress(HarnessIPCError):
                if records.load(name.name, again=True).pid in [process.pid for process in name.processes()]:
                    name.state = "running"

    # Starts and ends.

    @initialize(both=st.booleans())
    def begin(self, both: bool) -> None:
        for index in (0, 1) if both else (0,):
            self.ensure(index=index)

    @rule(index=st.integers(0, 1))
    def ensure(self, index: int) -> None:
        name = self.names[index]
        try:
            status = ensure_daemon(name.name, name.argv, timeout=5 * SHORT if name.suspended else PATIENCE)
        except HarnessIPCError as error:
            note(repr(error))
            assert name.suspended
        else:
            self.settle(name, status)

    @rule(index=st.integers(0, 1))
    def start_by_hand(self, index: int) -> None:
        name = self.names[index]
        process = subprocess.Popen(
            name.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        name.by_hand.append(process)
        assert process.stdout is not None
        if process.stdout.readline() == "ready\n":
            assert name.state in ("absent", "unknown")
            assert not name.suspended
            name.state = "running"
        else:
            # The start was refused, since the name is taken.
            assert name.state != "absent"
            assert process.wait(PATIENCE) == 1

    @rule(index=st.integers(0, 1), how=st.sampled_from(ENDS))
    def end(self, index: int, how: str) -> None:
        name = self.names[index]
        if how == "killed":
            self.kill(name)
        elif how == "stopped":
            self.stop(name)
        else:
            self.restart(name)

    def stop(self, name: Name) -> None:
        if name.suspended and name.state == "unknown":
            return  # without a valid record its process is unknown, and the stop would take its whole timeout
        assert stop_daemon(name.name, timeout=name.patience()) or name.state in ("absent", "unknown")
        assert not runtime_path(name.name, "json").exists()
        wait_until(lambda: not name.processes())
        name.state, name.suspended = "absent", False

    def restart(self, name: Name) -> None:
        if name.suspended and name.state == "unknown":
            return
        before = [process.pid for process in name.processes()]
        try:
            status = restart_daemon(name.name, stop_timeout=name.patience())
        except HarnessIPCError as error:
            note(repr(error))
            assert name.state in ("absent", "unknown")
        else:
            assert status.state == "running"
            assert status.pid not in before
            name.state, name.suspended = "running", False

    def kill(self, name: Name) -> None:
        for process in name.processes():
            process.kill()
            process.wait(PATIENCE)
        name.state, name.suspended = "absent", False

    @precondition(lambda self: os.name == "posix")
    @rule(index=st.integers(0, 1))
    def suspend(self, index: int) -> None:
        name = self.names[index]
        for process in name.processes():
            process.suspend()
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED)  # noqa: B023
            name.suspended = True

    @precondition(lambda self: any(name.suspended for name in self.names))
    @rule()
    def resume(self) -> None:
        for name in self.names:
            name.resume()

    # Damage.

    @rule(index=st.integers(0, 1), damage=st.sampled_from(OFTEN), then=st.sampled_from([*ENDS, "nothing"]))
    def damage(self, index: int, damage: str, then: str) -> None:
        self.damage_record(index, damage)
        if then != "nothing":
            # At once, since a daemon notices the damage within two seconds and ends.
            self.end(index=index, how=then)

    def damage_record(self, index: int, damage: str) -> None:
        name, other = self.names[index], self.names[1 - index]
        path = runtime_path(name.name, "json")
        record: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            record = json.loads(path.read_bytes())
        if not DAMAGES[damage](path, record, runtime_path(other.name, "json")):
            return
        if address := record.get("address"):
            self.lost.add(os.path.basename(address))
        if name.state != "absent":
            name.state = "unknown"

    # Requests.

    def check(self, name: Name, ask: Callable[[str], Any]) -> None:
        """Send a tag. The reply must have it, unless the state explains an error."""
        tag = f"{next(self.tags)}"
        answer = failure = None
        try:
            answer = ask(tag)
        except HarnessIPCError as error:
            note(repr(error))
            failure = error
        if name.state == "running":
            assert isinstance(failure, DaemonTimeout) if name.suspended else failure is None
        elif name.state == "absent":
            assert isinstance(failure, DaemonNotRunning)
        if failure is None:
            assert answer == tag
            assert not name.suspended

    @rule(index=st.integers(0, 1))
    def connect(self, index: int) -> None:
        name = self.names[index]

        def ask(tag: str) -> Any:
            client = connect_daemon(name.name, timeout=name.patience())
            name.clients.append(client)
            return client.request(tagged(tag), timeout=name.patience())["result"]

        self.check(name, ask)

    def ask(self, name: Name, client: Client | None) -> None:
        patience = name.patience()

        def ask(tag: str) -> Any:
            message = tagged(tag)
            reply = (
                request(name.name, message, timeout=patience) if client is None else client.request(message, timeout=patience)
            )
            return reply["result"]

        self.check(name, ask)

    @precondition(lambda self: any(name.clients for name in self.names))
    @rule()
    def give_up(self) -> None:
        """Send a request that times out. Its reply must not go to the next request."""
        for name in self.names:
            for client in name.clients:
                with contextlib.suppress(HarnessIPCError):
                    client.request(tagged("late", 0.05), timeout=0.01)

    @rule(index=st.integers(0, 1))
    def look(self, index: int) -> None:
        name = self.names[index]
        status = daemon_status(name.name, timeout=name.patience())
        note(f"{status.state}, pid {status.pid}")
        pid = identify(name.name, name.patience())
        if name.state == "absent":
            assert status.state in ("absent", "stale")
            assert pid is None
        elif name.state == "running":
            # On a loaded machine, the daemon may look unresponsive.
            assert status.alive
            assert status.pid == records.load(name.name).pid
            assert pid == (None if name.suspended else status.pid)

    # Invariants, and the end.

    @invariant()
    def each_gets_its_own_answer(self) -> None:
        for name in self.names:
            for client in (None, *name.clients):
                self.ask(name, client)

    @invariant()
    def nobody_else_was_hit(self) -> None:
        assert bystander is not None
        assert bystander.process.poll() is None
        assert psutil.Process(bystander.pid).status() in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)

    @invariant()
    def there_is_one_of_a_name_at_most(self) -> None:
        assert not (self.base / "two at once").exists()
        for name in self.names:
            # A daemon that was refused the name may not have ended yet.
            wait_until(lambda: len(name.processes()) <= 1)  # noqa: B023

    def teardown(self) -> None:
        try:
            for name in self.names:
                name.resume()
                for client in name.clients:
                    client.close()
                # Normal use recovers from any damage.
                assert ensure_daemon(name.name, name.argv).alive
                wait_until(lambda: name.serves())  # noqa: B023
                stop_daemon(name.name)
            wait_until(lambda: not live_processes())
            assert {file for file in runtime_files() if not file.endswith(".start")} <= self.lost
            for name in self.names:
                for ending in ("lock", "start"):
                    with filelock.FileLock(runtime_path(name.name, ending), timeout=0):
                        pass
            self.there_is_one_of_a_name_at_most()
        finally:
            kill_all()
            for name in self.names:
                for process in name.by_hand:
                    process.communicate(timeout=PATIENCE)
            self.patch.undo()
            self.directory.cleanup()
            self.stack.close()


def test_random_operations_on_two_names() -> None:
    given = os.environ.get("HARNESS_TEST_EXAMPLES")
    options = settings(
        max_examples=int(given) if given else EXAMPLES,
        stateful_step_count=STEPS,
        derandomize=not given,
        database=None,
        deadline=None,
        # Starting processes is slow.
        suppress_health_check=list(HealthCheck),
        # Shrink only in long runs.
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if given else [])],
        print_blob=True,
    )
    run_state_machine_as_test(Machine, settings=options)


@pytest.mark.usefixtures("base")
def test_a_copied_record_does_not_affect_its_daemon() -> None:
    """Regression: the socket named in a stale record was removed even if a living daemon used it."""
    ensure("a")
    runtime_path("b", "json").touch(mode=0o600)
    runtime_path("b", "json").write_bytes(runtime_path("a", "json").read_bytes())
    ensure("b")
    assert serves("a")
    assert serves("b")
