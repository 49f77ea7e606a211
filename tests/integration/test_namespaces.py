"""Two applications with daemons of the same name: all functions and commands find their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import (
    DaemonNotRunning,
    Namespace,
    StartFailed,
    aconnect_daemon,
    cleanup_endpoint,
    connect_daemon,
    daemon_alive,
    daemon_status,
    ensure_daemon,
    identify,
    list_daemons,
    ping,
    request,
    restart_daemon,
    start_daemon_server,
    stop_daemon,
)
from tests.support.processes import PATIENCE

SERVICE = """
import os, sys
from harness_ipc import Namespace, run_daemon

async def handle(message):
    return {"result": [sys.argv[1:], sorted(name for name in os.environ if name.startswith("HARNESS_IPC"))]}

if __name__ == "__main__":
    run_daemon(handle, "server")
"""
ELSEWHERE = SERVICE.replace('"server")', '"server", namespace=Namespace("elsewhere"))')


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ipc_namespace: Namespace) -> Path:
    path = tmp_path / "service.py"
    path.write_text(SERVICE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return path


def start(service: Path, app: str) -> Namespace:
    namespace = Namespace(app)
    status = ensure_daemon("server", [sys.executable, str(service), app], namespace=namespace)
    assert (status.state, status.app) == ("running", app)
    return namespace


def owner(namespace: Namespace | None) -> str:
    result: list[list[str]] = request("server", {}, timeout=PATIENCE, namespace=namespace)["result"]
    return result[0][0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness_ipc", *arguments], capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE
    )


def test_each_application_has_its_own_daemon_of_a_name(service: Path) -> None:
    mine = start(service, "my-tool")
    assert daemon_status("server").state == "absent"
    assert not daemon_alive("server")
    assert not ping("server")
    with pytest.raises(DaemonNotRunning):
        request("server", {})
    default = start(service, "harness-ipc")
    assert [owner(mine), owner(default), owner(None)] == ["my-tool", "harness-ipc", "harness-ipc"]
    with connect_daemon("server", namespace=mine) as client:
        assert client.pid == identify("server", namespace=mine) != identify("server")
    assert os.path.exists(os.path.join(Namespace().log_dir, "server.log"))
    assert os.path.exists(os.path.join(Namespace().log_dir, "my-tool", "server.log"))
    restarted = restart_daemon("server", namespace=mine)
    assert restarted.pid != client.pid
    assert [status.app for status in list_daemons(namespace=mine)] == ["my-tool"]
    assert cleanup_endpoint("server", namespace=mine) is False
    assert stop_daemon("server", namespace=mine) is True
    assert cleanup_endpoint("server", namespace=mine) is True
    assert [owner(None), daemon_status("server", namespace=mine).state] == ["harness-ipc", "absent"]


def test_a_daemons_own_children_inherit_nothing(service: Path) -> None:
    mine = start(service, "my-tool")
    _, variables = request("server", {}, namespace=mine)["result"]
    assert "HARNESS_IPC_START" not in variables


def test_explicit_directories_reach_the_child(service: Path, private_directories: Path) -> None:
    there = Namespace(runtime_dir=private_directories / "r", log_dir=private_directories / "l")
    try:
        ensure_daemon("server", [sys.executable, str(service), "there"], namespace=there)
        assert owner(there) == "there"
        assert (private_directories / "r" / "server.json").exists()
        assert (private_directories / "l" / "server.log").exists()
        assert not os.path.exists(Namespace().runtime_dir)
    finally:
        stop_daemon("server", namespace=there)


def test_a_child_in_another_namespace_is_a_failed_start(service: Path) -> None:
    service.write_text(ELSEWHERE, encoding="utf-8")
    with pytest.raises(StartFailed, match="elsewhere"):
        start(service, "my-tool")
    assert not ping("server", namespace=Namespace("my-tool"))


def test_the_loops_own_server_and_client_take_a_namespace() -> None:
    mine = Namespace("my-tool")

    async def handle(message: dict[str, Any]) -> dict[str, Any]:
        return {"result": message["params"]}

    async def main() -> object:
        server, _ = await start_daemon_server(handle, "server", namespace=mine)
        async with server, await aconnect_daemon("server", namespace=mine) as client:
            assert not await asyncio.to_thread(ping, "server")
            return await client.call("echo", text="hello")

    assert asyncio.run(main()) == {"text": "hello"}


def test_the_command_line_takes_an_application(service: Path) -> None:
    assert run("--app", "my-tool", "start", "service:handle", "--name", "server").returncode == 0
    assert run("start", "service:handle", "--name", "server").returncode == 0
    pids = {status.app: status.pid for app in ("harness-ipc", "my-tool") for status in list_daemons(namespace=Namespace(app))}
    assert len(set(pids.values())) == 2
    mine = json.loads(run("--app", "my-tool", "status", "--name", "server", "--json").stdout)
    assert (mine["pid"], mine["app"]) == (pids["my-tool"], "my-tool")
    found = json.loads(run("list", "--all", "--json").stdout)
    assert {status["app"]: status["pid"] for status in found} == pids
    table = run("list", "--all").stdout.splitlines()
    assert [line.split()[:2] for line in table] == [["OF", "NAME"], ["harness-ipc", "server"], ["my-tool", "server"]]
    assert len(run("list").stdout.splitlines()) == 2
    for command in (["call", "{}"], ["ping"], ["logs"], ["restart"], ["stop"]):
        assert run("--app", "my-tool", *command, "--name", "server").returncode == 0
    assert [status.state for status in list_daemons()] == ["running"]
    assert run("--app", "my-tool", "ping", "--name", "server").returncode == 3


def test_a_bad_application_is_a_usage_error() -> None:
    result = run("--app", "no/name", "list")
    assert (result.returncode, result.stdout) == (2, "")
    assert "application" in result.stderr
    assert os.listdir(Path(os.environ["HARNESS_IPC_RUNTIME_DIR"]).parent) == []
