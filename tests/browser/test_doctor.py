"""The findings of `harness-browser --doctor` in each state. Its remedies work, and it changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import harness_ipc
from harness_ipc import daemon_status, ensure_daemon, log_path
from harness_ipc.browser import APP_VERSION, cli, helpers
from harness_ipc.browser.doctor import Finding
from harness_ipc.browser.program import find_binary
from tests.browser.conftest import (
    COMMAND,
    USUAL,
    Pair,
    harness_browser,
    kill,
    main_processes,
    pids,
    processes_of,
    suspended,
    use,
)
from tests.browser.others import OtherBrowser, refusing, relaying
from tests.browser.site import Site
from tests.support.commands import run_command
from tests.support.marks import needs_chromium, needs_posix
from tests.support.processes import PATIENCE, spawn_daemon, wait_until

pytestmark = needs_chromium

RELOAD = "harness-browser --name=browser --reload"
# On Linux, browsers are found by their names on PATH alone.
needs_path = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there, browsers are found by their places")


def state(base: Path) -> set[tuple[object, ...]]:
    """Return what a doctor must not change: all processes, and all files but those that daemon and browser write.

    The intermediate process of a start is left out: it exits on its own shortly after the start.
    """
    roots = [base, *base.glob("home"), *base.glob("run")]
    files = [path for root in roots for path in root.iterdir()]
    files += [base / "profile" / name for name in ("DevToolsActivePort", "harness-browser.json", "SingletonLock")]
    seen = [
        (str(path), info.st_mtime_ns if path.is_file() else 0, info.st_mode)
        for path in sorted(files)
        if os.path.lexists(path) and (info := path.lstat())
    ]
    processes = main_processes(base).items()
    return {*seen, *((pid, *line) for pid, line in processes if not any(word.endswith("_launcher.py") for word in line))}


def examine(*arguments: str) -> list[Finding]:
    """Return the doctor's findings. Assert that its exit status and output fit them, and that it has changed nothing."""
    base = Path(os.environ["HARNESS_IPC_RUNTIME_DIR"]).parent
    # Wait for a stable state: a child that the browser has just forked has the command line of a browser.
    while (before := state(base)) != state(base):
        continue
    # It sets the variables that its options stand for.
    with mock.patch.dict(os.environ):
        examined = run_command(*arguments, "--doctor", "--json", main=cli.main)
    deadline = time.monotonic() + PATIENCE
    while changed := state(base) ^ before:
        assert time.monotonic() < deadline, changed
    assert examined.stderr == ""
    report = json.loads(examined.stdout)
    assert list(report) == ["ok", "findings"]
    assert all(list(finding) == ["level", "topic", "text", "remedy"] for finding in report["findings"])
    findings = [Finding(**finding) for finding in report["findings"]]
    failed = any(finding.level == "failure" for finding in findings)
    assert (report["ok"], examined.returncode) == (not failed, int(failed))
    assert {finding.level for finding in findings} <= {"ok", "warning", "failure"}
    return findings


def troubles(*arguments: str) -> list[Finding]:
    return [finding for finding in examine(*arguments) if finding.level != "ok"]


def found(topic: str, *arguments: str) -> Finding:
    """Return the one finding about `topic`."""
    (finding,) = [finding for finding in examine(*arguments) if finding.topic == topic]
    return finding


def apply(remedy: str | None) -> None:
    """Apply a remedy as a user does."""
    assert remedy is not None
    words = shlex.split(remedy)
    if words[0] == "harness-browser":
        assert harness_browser(*words[1:]).returncode == 0
    else:
        subprocess.run(["/bin/sh", "-c", remedy], check=True)


def serves() -> bool:
    return harness_browser("-c", "print(js('6 * 7'))").stdout == "42\n"


def kill_browser(killable: Pair) -> None:
    """Kill the daemon's browser, and wait until all its processes have ended."""
    kill(killable.browser)
    wait_until(lambda: [process.pid for process in processes_of(killable.base)] == [killable.daemon])


def start(change: str, name: str = "browser") -> None:
    """Start a daemon that runs the statements `change` before it serves."""
    program = f"from harness_ipc.browser import daemon\n{change}\ndaemon.main()"
    ensure_daemon(name, [sys.executable, "-W", "error", "-c", program, name])


# No problems.


def test_nothing_runs(fresh: Path) -> None:
    seen = harness_browser("--doctor")
    assert (seen.returncode, seen.stderr) == (0, "")
    # The doctor creates no file and no process.
    assert list(fresh.iterdir()) == processes_of(fresh) == []
    lines = seen.stdout.splitlines()
    assert [line[:9] for line in lines] == ["OK       "] * len(lines)
    topics = ["python", "harness_ipc", "websockets", "own browser", "daemon browser", "browser"]
    assert [line[9:].partition(":")[0] for line in lines] == topics
    assert lines[0].endswith(f", {sys.executable}")
    assert f"harness_ipc: {harness_ipc.__version__}, " in lines[1]
    assert f"own browser: {find_binary()}, " in lines[3]
    log = log_path("browser")
    assert lines[4] == f"OK       daemon browser: it is not running: the next command starts it; its log is {log}"
    assert lines[5] == f"OK       browser: the next command uses our own browser, its profile {fresh / 'profile'}"
    assert json.loads(harness_browser("--doctor", "--json").stdout)["ok"]
    assert troubles() == []
    assert list(fresh.iterdir()) == []


def test_everything_is_ok(killable: Pair, site: Site) -> None:
    harness_browser("-c", f"goto_url('{site.url}/form'); wait_for_load()")
    findings = examine()
    assert [(finding.level, finding.remedy) for finding in findings] == [("ok", None)] * len(findings)
    topics = ["python", "harness_ipc", "websockets", "own browser", "daemon browser", "browser", "page", "round trip"]
    assert [finding.topic for finding in findings] == topics
    daemon, browser, page, trip = (finding.text for finding in findings[4:])
    assert daemon.startswith(f"running, pid {killable.daemon}, for ")
    assert (
        f", our own browser, its profile {killable.base / 'profile'}, pid {killable.browser}; it answers the daemon in "
        in browser
    )
    assert page == f"A form, {site.url}/form"
    assert trip.startswith("a request to the daemon, answered by the browser, takes ")
    seen = harness_browser("--doctor")
    assert seen.returncode == 0
    assert [line.partition(":")[0] for line in seen.stdout.splitlines()] == [f"OK       {topic}" for topic in topics]
    assert pids() == killable[1:]
    assert serves()


@needs_posix
def test_a_daemon_that_starts(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, go = fresh / "chrome", fresh / "go"
    os.mkfifo(go)
    program.write_text(f"#!/bin/sh\nread -r _ < {go}\nexit 1\n", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setenv("HARNESS_CHROME", str(program))
    null = subprocess.DEVNULL
    with subprocess.Popen([*COMMAND, "-c", "1"], stdin=null, stdout=null, stderr=null) as command:
        try:
            wait_until(lambda: daemon_status("browser").state == "starting")
            pid = daemon_status("browser").pid
            # Once the program has opened the FIFO, the daemon is starting.
            with open(go, "w", encoding="utf-8"):
                findings = examine()
            assert command.wait(PATIENCE) == 6
        finally:
            command.kill()
    assert findings[-1].topic == "daemon browser"
    assert findings[-1].text == f"starting, pid {pid}: wait, or see its log {log_path('browser')}"
    monkeypatch.delenv("HARNESS_CHROME")
    assert serves()


# The browser.


def test_a_browser_that_was_killed(killable: Pair) -> None:
    kill_browser(killable)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("failure", "browser", RELOAD)
    assert trouble.text.startswith(f"our own browser, its profile {killable.base / 'profile'}: ")
    assert "lost" in trouble.text
    line = f"FAILURE  browser: {trouble.text} -> {RELOAD}"
    seen = harness_browser("--doctor")
    assert (seen.returncode, seen.stdout.splitlines()[-1]) == (1, line)
    apply(trouble.remedy)
    assert troubles() == []
    assert serves()


def test_the_next_command_replaces_a_killed_browser(killable: Pair) -> None:
    kill_browser(killable)
    assert [trouble.topic for trouble in troubles()] == ["browser"]
    assert serves()
    assert troubles() == []
    daemon, browser = pids()
    assert daemon == killable.daemon
    assert browser != killable.browser


@needs_posix
def test_a_browser_that_is_stopped(killable: Pair) -> None:
    with suspended(killable.browser):
        (trouble,) = troubles()
        assert (trouble.level, trouble.topic, trouble.remedy) == ("failure", "browser", RELOAD)
        assert f"pid {killable.browser}: the browser has not answered " in trouble.text
    assert troubles() == []
    assert serves()
    with suspended(killable.browser):
        apply(trouble.remedy)
        assert troubles() == []
    assert serves()


@needs_posix
def test_a_browser_that_a_killed_daemon_has_left(killable: Pair) -> None:
    kill(killable.daemon)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("warning", "browser", RELOAD)
    assert trouble.text == f"pid {killable.browser} was left by a daemon that was killed; the next one takes it"
    assert found("daemon browser").text.startswith("it was killed: the next command starts it; its log is ")
    assert serves()
    daemon, browser = pids()
    assert (daemon != killable.daemon, browser) == (True, killable.browser)
    assert troubles() == []
    kill(daemon)
    (trouble,) = troubles()
    apply(trouble.remedy)
    assert troubles() == []
    assert found("daemon browser").text.startswith("it is not running: ")
    assert serves()


@needs_posix
def test_a_browser_that_was_left_needs_no_program(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serves()
    kill(pids()[0])
    monkeypatch.setenv("HARNESS_CHROME", "/nonexistent")
    assert serves()
    kill(pids()[0])
    assert not [trouble for trouble in troubles() if trouble.level == "failure"]
    assert serves()


@needs_path
def test_no_browser_is_installed(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    own, browser = troubles()
    text = "no Chrome, Chromium, Edge or Brave is installed: only a browser that runs already can be used"
    assert own == Finding("warning", "own browser", text)
    assert (browser.level, browser.topic, browser.remedy) == ("failure", "browser", None)
    assert "install Chrome or Chromium" in browser.text
    monkeypatch.undo()
    use(monkeypatch, fresh)
    assert troubles() == []
    assert serves()


def test_the_wrong_program(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CHROME", "/nonexistent/a\nb")
    own, browser = troubles()
    text = "HARNESS_CHROME=/nonexistent/a\nb is not a program: only a browser that runs already can be used"
    assert own == Finding("warning", "own browser", text)
    assert (browser.level, browser.topic) == ("failure", "browser")
    lines = harness_browser("--doctor").stdout.splitlines()
    assert "WARNING  own browser: HARNESS_CHROME=/nonexistent/a\\nb is not a program: only a browser that runs " in lines[3]
    monkeypatch.delenv("HARNESS_CHROME")
    assert troubles() == []
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    assert serves()


# Browsers that are not managed.


@needs_posix
def test_a_stale_port_file_of_the_user(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fresh / "it's home"
    profile = home / USUAL
    profile.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for variable in ("HARNESS_CHROME_OWN", "HARNESS_CHROME_PROFILE"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_DATA_HOME", str(fresh / "data"))
    word = profile / "DevToolsActivePort"
    with refusing() as port:
        word.write_text(f"{port}\n/devtools/browser/secret")
        (trouble,) = troubles()
        assert (trouble.level, trouble.topic) == ("warning", "browser")
        assert trouble.text == f"{word} is stale: 127.0.0.1:{port} can't be reached (Connection refused)"
        assert trouble.remedy == f"rm {shlex.quote(str(word))}"
        assert word.exists()
        apply(trouble.remedy)
        assert troubles() == []
    assert not word.exists()
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    assert serves()


@needs_posix
def test_a_browser_of_the_user_that_runs(active_port: Path, other: OtherBrowser) -> None:
    active_port.write_text(f"{other.port}\n{other.path}")
    assert troubles() == []
    where = f"DevToolsActivePort of {active_port.parent}, port {other.port}"
    assert found("browser").text == f"the next command uses {where}"
    assert serves()
    assert troubles() == []
    assert f", {where}; it answers the daemon in " in found("browser").text
    apply(RELOAD)
    assert other.process.poll() is None


@pytest.mark.parametrize("variable", ["BU_CDP_WS", "BU_CDP_URL"])
def test_a_browser_that_the_environment_names(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    def name(port: int) -> str:
        """Name the browser at a port in the environment. Return its address without the path."""
        place = f"{'ws' if variable == 'BU_CDP_WS' else 'http'}://127.0.0.1:{port}"
        monkeypatch.setenv(variable, place + (other.path if variable == "BU_CDP_WS" else ""))
        return place

    # No program to start is needed.
    monkeypatch.setenv("HARNESS_CHROME", "/nonexistent")
    with relaying(other.port) as relay:
        place = name(relay.port)
        (own,) = troubles()
        assert (own.level, own.topic) == ("warning", "own browser")
        assert found("browser").text == f"the next command uses {variable}, {place}"
        assert serves()
        (own,) = troubles()
        assert own.topic == "own browser"
        assert f", {variable}, {place}; it answers the daemon in " in found("browser").text
        # The path of the WebSocket is a secret: it gives control of the browser.
        secret = other.path.rpartition("/")[2]
        assert secret not in harness_browser("--doctor").stdout
    # The daemon ends with a browser that is not managed.
    wait_until(lambda: not processes_of(fresh))
    (_, trouble) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("failure", "browser", None)
    assert trouble.text.startswith(f"{variable}: {place} can't be reached (")
    assert trouble.text.endswith(f"fix {variable}, or unset it to use another browser")
    monkeypatch.delenv("HARNESS_CHROME")
    name(other.port)
    assert troubles() == []
    assert serves()
    harness_browser("--reload")
    monkeypatch.delenv(variable)
    assert troubles() == []


@pytest.mark.parametrize(
    ("variable", "address"),
    [
        ("BU_CDP_WS", "nonsense"),
        ("BU_CDP_URL", "nonsense"),
        ("BU_CDP_WS", "ws://127.0.0.1:99999/x"),
        ("BU_CDP_URL", "http://[::1"),
        ("BU_CDP_WS", "ws://a.invalid:1/x"),
        ("BU_CDP_WS", "ws://.invalid:1/x"),
        ("BU_CDP_URL", f"http://{'x' * 64}:1"),
    ],
)
def test_an_invalid_address(fresh: Path, monkeypatch: pytest.MonkeyPatch, variable: str, address: str) -> None:
    monkeypatch.setenv(variable, address)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("failure", "browser")
    assert trouble.text.startswith(f"{variable}: ")
    assert trouble.text.endswith(f"fix {variable}, or unset it to use another browser")
    # A command reports it without a traceback.
    refused = harness_browser("-c", "1")
    assert (refused.returncode, "Traceback" in refused.stderr) == (6, False)


def test_a_profile_that_another_daemon_uses(killable: Pair) -> None:
    (trouble,) = troubles("--name", "two")
    assert (trouble.level, trouble.topic) == ("failure", "browser")
    assert f"pid {killable.daemon}" in trouble.text
    apply(RELOAD)
    assert troubles("--name", "two") == []
    assert serves()


# The daemon.


@needs_posix
def test_a_daemon_that_is_stopped(killable: Pair) -> None:
    with suspended(killable.daemon):
        (trouble,) = troubles()
        assert (trouble.level, trouble.topic, trouble.remedy) == ("failure", "daemon browser", None)
        assert trouble.text.startswith(f"unresponsive, pid {killable.daemon}: ")
        assert trouble.text.endswith(f"; its log is {log_path('browser')}")
    assert troubles() == []
    assert pids() == killable[1:]
    assert serves()


@pytest.mark.usefixtures("attached")
def test_a_daemon_of_another_program() -> None:
    with spawn_daemon("browser", app_version="other 1") as daemon:
        (trouble,) = troubles()
        assert (trouble.level, trouble.topic, trouble.remedy) == ("failure", "daemon browser", None)
        assert trouble.text.endswith(" belongs to another program: choose another --name, or BU_NAME")
        assert troubles("--name", "mine") == []
        assert daemon.process.poll() is None
    assert troubles() == []
    assert serves()


@pytest.mark.usefixtures("attached")
def test_a_daemon_of_another_version() -> None:
    start("daemon.APP_VERSION = 'harness-browser 0.0'")
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("warning", "daemon browser", RELOAD)
    assert trouble.text.startswith(f"running, pid {pids()[0]}, for ")
    assert trouble.text.endswith(f" s, but it is harness-browser 0.0 and this is {APP_VERSION}")
    assert serves()
    apply(trouble.remedy)
    assert serves()
    assert troubles() == []


# A daemon that runs the statement `reply` for requests that meet `condition`.
OVERRIDE = """
import asyncio

class App(daemon.BrowserApp):
    async def handle(self, message):
        if {condition}:
            {reply}
        return await super().handle(message)

daemon.BrowserApp = App
"""
STATES = {
    "hangs": "await asyncio.Event().wait()",
    "raises": "raise LookupError('as told')",
    "says less": "return {'connected': True}",
}


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("reply", STATES.values(), ids=STATES)
def test_a_daemon_without_a_valid_status(reply: str) -> None:
    start(OVERRIDE.format(condition="message.get('meta') == 'connection_status'", reply=reply))
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("failure", "browser", RELOAD)
    assert trouble.text.startswith("the daemon does not report its state: ")
    apply(trouble.remedy)
    assert troubles() == []
    assert serves()


@pytest.mark.usefixtures("attached")
def test_a_browser_that_answers_only_the_daemon() -> None:
    error = {"type": "CDPError", "message": "as\\ntold"}
    start(OVERRIDE.format(condition="'method' in message", reply=f"return {{'error': {error}}}"))
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("failure", "round trip")
    assert trouble.text == "the browser does not answer: as\\ntold"
    apply(trouble.remedy or RELOAD)
    assert troubles() == []
    assert serves()


@pytest.mark.usefixtures("attached")
def test_a_remedy_is_for_the_daemon_that_was_asked_about() -> None:
    start("daemon.APP_VERSION = 'harness-browser 0.0'", "work")
    (trouble,) = troubles("--name", "work")
    apply(trouble.remedy)
    assert troubles("--name", "work") == []
    assert harness_browser("--name", "work", "-c", "print(js('6 * 7'))").stdout == "42\n"


def test_a_name_of_the_environment(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BU_NAME", "work")
    assert serves()
    pid = daemon_status("work").pid
    assert pid is not None
    assert found("daemon work").text.startswith(f"running, pid {pid}, for ")
    kill(pid)
    (trouble,) = troubles()
    apply(trouble.remedy)
    assert troubles() == []
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    assert serves()


# The page.


def test_a_dialog_that_holds_the_page(page: str, site: Site) -> None:
    helpers.goto_url(f"{site.url}/dialog")
    assert helpers.wait_for_load()
    with contextlib.suppress(helpers.DialogOpen):
        helpers.js("confirm('Sure\\n\\u001b[31m?')")
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("warning", "page", None)
    text = f"{site.url}/dialog: a dialog blocks it (confirm: 'Sure\\n\\x1b[31m?'); answer it with handle_dialog()"
    assert trouble.text == text
    seen = harness_browser("--doctor")
    assert (seen.returncode, f"WARNING  page: {text}\n" in seen.stdout) == (0, True)
    assert harness_browser("--tab", "current", "-c", "handle_dialog()").returncode == 0
    assert troubles() == []
    assert helpers.page_info()["url"] == f"{site.url}/dialog"


def test_a_tab_that_was_closed(page: str) -> None:
    helpers.close_tab()
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic, trouble.remedy) == ("warning", "page", None)
    assert trouble.text == "none is attached; the next request attaches one"
    assert serves()
    assert troubles() == []


def test_control_characters_of_a_page_are_escaped(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Characters that the browser does not replace by spaces in a title.
    title = "a\x9b31m\u2028\u202e é 😀"
    helpers.js(f"document.title = {json.dumps(title)}")
    assert found("page").text == f"{title}, about:blank"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    seen = harness_browser("--doctor")
    assert (seen.returncode, seen.stderr) == (0, "")
    assert "OK       page: a\\x9b31m\\u2028\\u202e é 😀, about:blank\n" in seen.stdout
    assert seen.stdout.replace("\n", "").isprintable()


def test_long_texts_are_truncated(page: str) -> None:
    helpers.js("document.title = 't'.repeat(2000); location.hash = 'h'.repeat(1000)")
    assert found("page").text == f"{'t' * 200}…, about:blank#{'h' * 188}…"
    with contextlib.suppress(helpers.DialogOpen):
        helpers.js("confirm('c'.repeat(1000))")
    (trouble,) = troubles()
    assert f"(confirm: '{'c' * 200}…')" in trouble.text
    helpers.handle_dialog()


# The installation.


def test_without_the_extra(page: str) -> None:
    source = "import sys; sys.modules['websockets'] = None; from harness_ipc.browser.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", source, "--doctor", "--json"]
    seen = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (seen.returncode, seen.stderr) == (1, "")
    report = json.loads(seen.stdout)
    *others, trouble = (Finding(**finding) for finding in report["findings"])
    assert [other.level for other in others] == ["ok", "ok"]
    assert (report["ok"], trouble.level, trouble.topic) == (False, "failure", "websockets")
    assert trouble.text.startswith("it can't be imported: ")
    assert trouble.remedy == f"{shlex.quote(sys.executable)} -m pip install 'harness-ipc[browser]'"
    assert serves()
    assert troubles() == []


@needs_posix
def test_a_runtime_directory_that_is_open_to_others(attached: Path) -> None:
    run = attached / "run"
    run.mkdir()
    run.chmod(0o777)
    (trouble,) = troubles()
    assert (trouble.level, trouble.topic) == ("failure", "daemon browser")
    assert trouble.text.startswith(f"forbidden: {run} has mode 0777, so it is not private to you: run `chmod 700 {run}`")
    apply(trouble.text.split("`")[1])
    assert troubles() == []
    assert serves()


def test_an_invalid_name(fresh: Path) -> None:
    seen = harness_browser("--name", "a/b", "--doctor", "--json")
    assert (seen.returncode, seen.stdout) == (2, "")
    assert seen.stderr == "harness-browser: 'a/b' is not a daemon name: use 1 to 64 of A-Z a-z 0-9 _ -\n"
