"""Daemons and clients of different CPython versions, and a client that uses only the standard library."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import harness_ipc
from harness_ipc import request as request_daemon
from harness_ipc import runtime_path
from harness_ipc._registry import records
from tests.conftest import set_directories, temporary_directory
from tests.support.marks import REQUIRED
from tests.support.processes import PATIENCE

CHECKOUT = Path(harness_ipc.__file__).parents[1]
THIS = "{}.{}".format(*sys.version_info[:2])
VERSIONS = sorted({"3.11", "3.12", "3.13", "3.14", THIS})

DAEMON = """
import sys
from harness_ipc import current_request, run_daemon
async def handle(message):
    return {"result": message["params"], "python": "%d.%d" % sys.version_info[:2], "peer": current_request().peer.pid}
run_daemon(handle, "interop", on_ready=lambda _: print("ready", flush=True))
"""

CLIENT = """
import json, os, sys
from harness_ipc import connect_daemon, identify, ping
assert ping("interop") and identify("interop")
with connect_daemon("interop") as client:
    for params in json.load(sys.stdin):
        print(json.dumps(client.request({"method": "echo", "params": params})["result"]))
    print(json.dumps({"daemon": client.request({"params": 0})["python"], "client": "%d.%d" % sys.version_info[:2]}))
    assert client.request({"params": 0})["peer"] in (os.getpid(), None)
assert not {"asyncio", "filelock", "platformdirs", "psutil"} & set(sys.modules)
"""

# The complete protocol: the record, two keys, the challenge of the standard library, and a JSON object in a frame.
STANDARD_LIBRARY_CLIENT = """
import hmac, json, sys
from multiprocessing.connection import Client, answer_challenge, deliver_challenge
with open(sys.argv[1], encoding="utf-8") as file:
    record = json.load(file)
def key(role):
    text = "harness-ipc/1 " + role + " " + record["address"]
    return hmac.digest(bytes.fromhex(record["authkey"]), text.encode(), "sha256")
with Client(record["address"], record["family"]) as connection:
    deliver_challenge(connection, key("daemon"))
    answer_challenge(connection, key("client"))
    def ask(message):
        connection.send_bytes(json.dumps(message).encode())
        return json.loads(connection.recv_bytes(1 << 26))
    assert ask({"meta": "ping"})["pid"] == record["pid"]
    for params in json.load(sys.stdin):
        print(json.dumps(ask({"method": "echo", "params": params})["result"]))
    print(json.dumps({"daemon": ask({"params": 0})["python"], "client": "%d.%d" % sys.version_info[:2]}))
assert not any(name.startswith("harness_ipc") for name in sys.modules)
"""

# A short text, one above a single write, one above a socket's buffer, and one that UTF-8 can't encode.
PARAMS = [{"n": 1}, "x" * 20_000, "\ud800 ☃ \0", list(range(100_000))]


def _missing(version: str, reason: str) -> NoReturn:
    if version in REQUIRED:
        pytest.fail(f"HARNESS_TEST_REQUIRE names {version}: {reason}")
    pytest.skip(f"{version}: {reason}")


@functools.cache
def _found(version: str) -> str | None:
    """Return the path of the interpreter of that version, or None. Shims of another version are ignored."""
    if version == THIS:
        return sys.executable
    commands = [[path] for folder in os.get_exec_path() if (path := shutil.which(f"python{version}", path=folder))]
    if launcher := shutil.which("py"):
        commands.append([launcher, f"-{version}"])
    for command in commands:
        script = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        output = subprocess.run([*command, "-c", script], capture_output=True, text=True, timeout=PATIENCE).stdout
        if output.startswith(f"{version} "):
            return output.removeprefix(version).strip()
    return None


@functools.cache
def _dependencies() -> str:
    """Return the folder of the daemon's dependencies: pure Python, and psutil for the stable ABI of all versions."""
    spec = importlib.util.find_spec("psutil")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[1])


@functools.cache
def _can_be_daemon(version: str, python: str) -> bool:
    script = "import filelock, platformdirs, psutil; psutil.Process().create_time()"
    return subprocess.run([python, "-c", script], env=_environment(daemon=True), timeout=PATIENCE).returncode == 0


def _environment(*, daemon: bool) -> dict[str, str]:
    path = [str(CHECKOUT), _dependencies()] if daemon else [str(CHECKOUT)]
    # Do not fill the checkout with bytecode of other versions.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}


def interpreter(version: str, *, daemon: bool = False) -> str:
    python = _found(version)
    if python is None:
        _missing(version, f"no python{version} on PATH")
    if daemon and not _can_be_daemon(version, python):
        _missing(version, f"the dependencies in {_dependencies()} can't be imported by {python}")
    return python


@pytest.fixture(scope="module", params=VERSIONS)
def directory(request: pytest.FixtureRequest) -> Iterator[str]:
    """The directory of a daemon of each version, which ends at a request."""
    python = interpreter(request.param, daemon=True)
    with temporary_directory() as directory, pytest.MonkeyPatch.context() as patch:
        set_directories(patch, directory)
        with subprocess.Popen(
            [python, "-W", "error", "-c", DAEMON],
            env=_environment(daemon=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as daemon:
            assert daemon.stdout is not None
            try:
                assert daemon.stdout.readline() == "ready\n"
                assert str(records.load("interop").public()["python"]).startswith(f"{request.param}.")
                yield directory
                set_directories(patch, directory)
                assert request_daemon("interop", {"meta": "shutdown"}) == {"shutdown": True}
                assert daemon.wait(PATIENCE) == 0
            finally:
                daemon.kill()


@pytest.fixture
def daemon_version(directory: str, monkeypatch: pytest.MonkeyPatch) -> str:
    set_directories(monkeypatch, directory)
    return ".".join(str(records.load("interop").public()["python"]).split(".")[:2])


@pytest.mark.parametrize("client_version", VERSIONS)
def test_every_python_understands_every_other(daemon_version: str, client_version: str) -> None:
    python = interpreter(client_version)
    for script in (CLIENT, STANDARD_LIBRARY_CLIENT):
        client = subprocess.run(
            [python, "-W", "error", "-c", script, str(runtime_path("interop", "json"))],
            input=json.dumps(PARAMS),
            env=_environment(daemon=False),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (client.returncode, client.stderr) == (0, "")
        *echoed, versions = map(json.loads, client.stdout.splitlines())
        assert echoed == PARAMS
        assert versions == {"daemon": daemon_version, "client": client_version}
