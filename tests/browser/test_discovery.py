"""Finding and starting browsers: real ones, servers that are not browsers, and errors without a browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import socket
import stat
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from harness_ipc import StartFailed, connect_daemon, daemon_status, ensure_daemon, runtime_dir, stop_daemon
from harness_ipc.browser import discovery, helpers
from harness_ipc.browser.display import find_broken
from harness_ipc.browser.errors import BrowserNotFound
from harness_ipc.browser.launcher import ManagedBrowser
from harness_ipc.browser.program import command_line, find_binary, has_display, is_root
from tests.browser.conftest import harness_browser, kill, processes_of, suspended
from tests.browser.others import (
    OtherBrowser,
    answering,
    free_port,
    has_ipv6,
    http,
    other_browser,
    refusing,
    relaying,
    without_http,
)
from tests.browser.site import Site
from tests.support.managed import in_thread, the_log
from tests.support.marks import needs_chromium, needs_linux, needs_posix, needs_root
from tests.support.processes import PATIENCE, lives, wait_until

pytestmark = [needs_chromium, pytest.mark.usefixtures("fresh")]

# A part of addresses that must not appear in messages, logs and status.
SECRET = "hush"
# The banner of another protocol's server.
NO_HTTP = b"SSH-2.0-Server\r\n"
PAGE = http("200 OK", "<!doctype html><title>Some page</title>")
FORBIDDEN = http("403 Forbidden")
# In the daemon: accept servers of the tests' process as browsers.
IN_THE_TESTS = "discovery.local.is_browser = lambda port: None"
# Files in the profile of a running browser that are to be removed at its end.
TRACES = {
    "DevToolsActivePort",
    "SingletonCookie",
    "SingletonLock",
    "SingletonSocket",
    "harness-browser.in",
    "harness-browser.json",
    "harness-browser.out",
}


needs_path = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there, browsers are found by their places")


@pytest.fixture
def profile(fresh: Path) -> Path:
    """The profile of the managed browser."""
    return fresh / "profile"


def start(first: str = "", name: str = "browser") -> None:
    """Start the daemon `name` as the helpers do, but run `first` in it before, and check no usual port."""
    module = "runpy.run_module('harness_ipc.browser.daemon', run_name='__main__', alter_sys=True)"
    imports = "import runpy\nfrom harness_ipc.browser import connection, discovery, launcher"
    program = f"{imports}\ndiscovery.PORTS = ()\n{first}\n{module}"
    ensure_daemon(name, [sys.executable, "-W", "error", "-c", program, name])


def why_not(first: str | None = None) -> str:
    """Return the error of a start that fails: one line, without a traceback in the log."""
    with pytest.raises(StartFailed) as caught:
        helpers.connect() if first is None else start(first)
    text = str(caught.value)
    assert text.splitlines() == [text]
    assert text.startswith("the daemon 'browser' did not start: ")
    assert "Traceback" not in caught.value.log_tail
    assert daemon_status("browser").state == "absent"
    return text.removeprefix("the daemon 'browser' did not start: ")


def status() -> dict[str, Any]:
    return helpers.connect().request({"meta": "connection_status"})


def assert_own_browser_serves(patch: pytest.MonkeyPatch, *without: str) -> None:
    """Assert that the next helper uses a managed browser once the variables `without` are unset."""
    for variable in without:
        patch.delenv(variable)
    patch.setenv("HARNESS_CHROME_OWN", "1")
    assert helpers.js("6 * 7") == 42
    assert status()["own"]


def kill_daemon(name: str = "browser") -> None:
    """Kill the daemon that this process is connected to, and wait until connections are refused."""
    kill(helpers.connect().pid)
    helpers.disconnect()
    wait_until(lambda: daemon_status(name).state == "stale")


def find() -> str:
    """Find a browser in this process, use and release it, and return how it was found."""

    async def run() -> str:
        source, connection = await discovery.find("browser", lambda *_: None)
        assert "product" in await connection.call("Browser.getVersion")
        if source.own is not None:
            await source.own.close(connection)
        await connection.close()
        return source.how

    return asyncio.run(run())


def script(path: Path, text: str) -> str:
    """Write an executable shell script, and return its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


# Browsers that are not managed.


@pytest.mark.parametrize("way", ["websocket", "url", "url with a slash", "profile", "port", "port without HTTP"])
def test_a_browser_that_runs_is_attached_to_and_left_running(
    way: str, other: OtherBrowser, active_port: Path, profile: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        port = other.port
        match way:
            case "websocket":
                monkeypatch.setenv("BU_CDP_WS", other.websocket)
                found = f"BU_CDP_WS, ws://127.0.0.1:{port}"
            case "url":
                monkeypatch.setenv("BU_CDP_URL", other.url)
                found = f"BU_CDP_URL, {other.url}"
            case "url with a slash":
                monkeypatch.setenv("BU_CDP_URL", f"{other.url}/")
                found = f"BU_CDP_URL, {other.url}"
            case "profile":
                active_port.write_text(other.active_port.read_text())
                found = f"DevToolsActivePort of {active_port.parent}, port {port}"
            case "port without HTTP":
                port = stack.enter_context(without_http(other))
                found = f"port {port}"
            case _:
                found = f"port {port}"
        start(f"{IN_THE_TESTS}\ndiscovery.PORTS = ({port},)" if way.startswith("port") else "")
        is_theirs = {"connected": True, "own": False, "pid": None, "found": found, "problem": None}
        assert is_theirs.items() <= status().items()
        helpers.goto_url(f"{site.url}/")
        assert helpers.wait_for_load()
        tabs = {helpers.current_tab()["targetId"]: f"{site.url}/"}
        # The browser reports new URLs with a delay.
        wait_until(lambda: other.tabs() == tabs)
        # The path of the WebSocket is a secret: it gives control of the browser.
        assert other.path.rpartition("/")[2] not in the_log("browser") + json.dumps(daemon_status("browser").to_json())
        helpers.disconnect()
        assert stop_daemon("browser")
        assert other.process.poll() is None
        assert other.tabs() == tabs
        assert not profile.exists()


def test_the_order_of_named_found_and_managed_browsers(
    other: OtherBrowser, active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing() as dead:
        monkeypatch.setattr(discovery, "PORTS", (dead,))
        assert find().startswith("our own browser")
        monkeypatch.setattr(discovery, "PORTS", (dead, other.port))
        assert find() == f"port {other.port}"
        active_port.write_text(other.active_port.read_text())
        assert find().startswith("DevToolsActivePort of ")
        monkeypatch.setenv("HARNESS_CHROME_OWN", "1")
        assert [source.own is None for source in discovery.sources("browser")] == [False]
        monkeypatch.setenv("BU_CDP_URL", other.url)
        assert find().startswith("BU_CDP_URL")
        # There is no fallback to the other sources.
        monkeypatch.setenv("BU_CDP_URL", f"http://127.0.0.1:{dead}")
        with pytest.raises(BrowserNotFound, match="BU_CDP_URL"):
            find()
        monkeypatch.setenv("BU_CDP_WS", other.websocket)
        assert find().startswith("BU_CDP_WS")
        monkeypatch.setenv("BU_CDP_WS", f"ws://127.0.0.1:{dead}")
        monkeypatch.setenv("BU_CDP_URL", other.url)
        with pytest.raises(BrowserNotFound, match="BU_CDP_WS"):
            find()


def test_listing_sources_creates_and_connects_nothing(fresh: Path, active_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(fresh.rglob("*"))
    monkeypatch.setattr(discovery, "PORTS", (1, 2))
    assert [source.how.partition(",")[0] for source in discovery.sources("browser")] == ["port 1", "port 2", "our own browser"]
    assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "9222", "9222\n", "9222\nno path", "port\n/devtools/browser/1", "\xff\n/"])
def test_an_incomplete_port_file_is_ignored(text: str, active_port: Path) -> None:
    active_port.write_bytes(text.encode("latin-1"))
    assert [source.own is None for source in discovery.sources("browser")] == [False]
    active_port.write_text("9222\n/devtools/browser/1")
    assert [source.own is None for source in discovery.sources("browser")] == [True, False]


@pytest.mark.parametrize("now", ["nobody", "another browser", "another server", "no such port"])
def test_a_stale_port_file_is_skipped_and_logged(
    now: str, fresh: Path, other: OtherBrowser, active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The error names it if no other browser is found.
    monkeypatch.setenv("HARNESS_CHROME", str(fresh / "nothing"))
    with contextlib.ExitStack() as stack:
        match now:
            case "nobody":
                port = stack.enter_context(refusing())
            case "another browser":
                port = other.port
            case "another server":
                port = stack.enter_context(answering(NO_HTTP))
            case _:
                port = 99999
        active_port.write_text(f"{port}\n/devtools/browser/{SECRET}")
        text = why_not("")
    assert text.startswith("there is no browser: ")
    assert f"also seen: DevToolsActivePort of {active_port.parent}" in text
    assert f"not usable, DevToolsActivePort of {active_port.parent}, port {port}: a stale" in the_log("browser")
    assert SECRET not in text + the_log("browser")
    assert active_port.exists()


OTHER_SERVERS = {
    "a page": PAGE,
    "nothing there": http("404 Not Found"),
    "other JSON": http("200 OK", "[1]"),
    "no address": http("200 OK", '{"webSocketDebuggerUrl": 1}'),
    "no answer": b"",
    "no HTTP": NO_HTTP,
}


def test_ports_of_other_servers_are_skipped(active_port: Path) -> None:
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(answering(answer)) for name, answer in OTHER_SERVERS.items()}
        active_port.write_text(f"{ports['a page']}\n/devtools/browser/1")
        start(f"discovery.PORTS = {tuple(ports.values())}")
    assert status()["own"]
    assert helpers.js("6 * 7") == 42
    log = the_log("browser")
    assert f"not usable, DevToolsActivePort of {active_port.parent}, " in log
    assert {name for name, port in ports.items() if f"not usable, port {port}: " in log} == OTHER_SERVERS.keys()


# Unusable browsers that are not managed: each error gives a reason and a remedy.

MEND = "start that browser with --remote-debugging-port, fix {}, or unset it to use another browser"
ALLOW = "click Allow in the browser's window if it asks, then try again"


@pytest.mark.parametrize(
    ("variable", "answer", "problem", "advice"),
    [
        pytest.param("BU_CDP_WS", None, "can't be reached", MEND, id="websocket refused"),
        pytest.param("BU_CDP_URL", None, "can't be reached", MEND, id="url refused"),
        pytest.param("BU_CDP_WS", FORBIDDEN, "answered 403 instead of opening a WebSocket", ALLOW, id="websocket forbidden"),
        pytest.param("BU_CDP_URL", FORBIDDEN, "answered 403 to /json/version", ALLOW, id="url forbidden"),
        pytest.param("BU_CDP_WS", PAGE, "answered 200 instead of opening a WebSocket", MEND, id="websocket of a page"),
        pytest.param("BU_CDP_URL", PAGE, "is not a DevTools server", MEND, id="url of a page"),
        pytest.param("BU_CDP_WS", NO_HTTP, "is not a DevTools server", MEND, id="websocket without HTTP"),
        pytest.param("BU_CDP_URL", NO_HTTP, "is not a DevTools server", MEND, id="url without HTTP"),
        pytest.param("BU_CDP_WS", b"", "is not a DevTools server", MEND, id="websocket that is closed"),
        pytest.param("BU_CDP_URL", b"", "is not a DevTools server", MEND, id="url that is closed"),
        pytest.param("BU_CDP_URL", http("200 OK", "[1]"), "is not a DevTools server", MEND, id="url of other JSON"),
    ],
)
def test_an_unusable_named_browser_is_an_error_with_the_reason(
    variable: str, answer: bytes | None, problem: str, advice: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing() if answer is None else answering(answer) as port:
        address = f"{'ws' if variable == 'BU_CDP_WS' else 'http'}://127.0.0.1:{port}"
        monkeypatch.setenv(variable, f"{address}/{SECRET}")
        text = why_not()
    assert text.startswith(f"{variable}: {address} {problem}")
    assert advice.format(variable) in text
    assert SECRET not in text + the_log("browser")
    assert processes_of(fresh) == []


@pytest.mark.parametrize("variable", ["BU_CDP_WS", "BU_CDP_URL"])
def test_a_silent_named_browser_may_be_asking_its_user(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(None) as port:
        address = f"{'ws' if variable == 'BU_CDP_WS' else 'http'}://127.0.0.1:{port}"
        monkeypatch.setenv(variable, address)
        text = why_not("from harness_ipc.browser import version; connection.OPEN_TIMEOUT = version.TIMEOUT = 0.25")
    assert text.startswith(f"{variable}: {address} has not answered for 0.25 s; {ALLOW}")


@pytest.mark.parametrize("way", ["profile", "port"])
@pytest.mark.parametrize(
    ("answer", "problem"),
    [pytest.param(FORBIDDEN, "refuses (403)", id="403"), pytest.param(None, "waits for you", id="no answer")],
)
def test_a_found_browser_that_must_be_allowed_is_not_skipped(
    way: str, answer: bytes | None, problem: str, fresh: Path, active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A Chrome that asks its user answers HTTP requests with 404.
    with answering(answer, version=http("404 Not Found")) as port:
        first = IN_THE_TESTS if answer else f"{IN_THE_TESTS}\nconnection.OPEN_TIMEOUT = 0.25"
        if way == "profile":
            active_port.write_text(f"{port}\n/devtools/browser/{SECRET}")
            found = f"DevToolsActivePort of {active_port.parent}, port {port}"
        else:
            first += f"\ndiscovery.PORTS = ({port},)"
            found = f"port {port}"
        text = why_not(first)
    assert text.startswith(f"the browser of {found} {problem}: click Allow in its window")
    assert "or set HARNESS_CHROME_OWN=1 to use a private browser" in text
    assert SECRET not in text + the_log("browser")
    assert processes_of(fresh) == []


@pytest.mark.parametrize(
    ("variable", "address"),
    [
        pytest.param("BU_CDP_WS", f"ws://{SECRET}:{SECRET}@127.0.0.1:{{port}}/{SECRET}?token={SECRET}", id="websocket"),
        pytest.param("BU_CDP_WS", f"http://{SECRET}:{SECRET}@127.0.0.1:{{port}}/{SECRET}", id="websocket of another scheme"),
        pytest.param("BU_CDP_WS", f"ws://127.0.0.1:{{port}}/?token={SECRET}#1", id="websocket with a fragment"),
        pytest.param("BU_CDP_WS", f"127.0.0.1:{{port}}/{SECRET}", id="websocket without a scheme"),
        pytest.param("BU_CDP_WS", f"ws://127.0.0.1:{SECRET}/", id="websocket with a strange port"),
        pytest.param("BU_CDP_WS", SECRET, id="websocket that is none"),
        pytest.param("BU_CDP_URL", f"http://127.0.0.1:{{port}}/{SECRET}?token={SECRET}", id="url"),
        pytest.param("BU_CDP_URL", f"http://{SECRET}:{SECRET}@127.0.0.1:{{port}}/", id="url with a password"),
        pytest.param("BU_CDP_URL", f"http://127.0.0.1:{{port}}/ {SECRET}", id="url with a space"),
        pytest.param("BU_CDP_URL", f"http://127.0.0.1:{SECRET}/", id="url with a strange port"),
        pytest.param("BU_CDP_URL", f"ws://127.0.0.1:{{port}}/{SECRET}", id="url of another scheme"),
        pytest.param("BU_CDP_URL", SECRET, id="url that is none"),
    ],
)
def test_secrets_of_an_address_are_in_no_message_or_log(variable: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(http("404 Not Found")) as port:
        monkeypatch.setenv(variable, address.format(port=port))
        text = why_not()
    assert text.startswith(f"{variable}: ")
    assert "None" not in text
    assert SECRET not in text + the_log("browser")


@pytest.mark.parametrize("variable", ["BU_CDP_URL", "BU_CDP_WS"])
def test_a_host_name_is_resolved_before_the_browser_sees_it(
    variable: str, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    names = {"browser.example": "127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kind: resolve(names.get(host, host), *more, **kind))
    address = f"{'http' if variable == 'BU_CDP_URL' else 'ws'}://browser.example:{other.port}"
    monkeypatch.setenv(variable, address if variable == "BU_CDP_URL" else f"{address}{other.path}")
    assert find() == f"{variable}, {address}"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_browser_that_listens_on_ipv6_alone_is_found(
    other: OtherBrowser, active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with relaying(other.port, "::1") as relay:
        monkeypatch.setattr(discovery, "PORTS", (relay.port,))
        assert find() == f"port {relay.port}"
        active_port.write_text(f"{relay.port}\n{other.path}")
        assert find() == f"DevToolsActivePort of {active_port.parent}, port {relay.port}"


@pytest.mark.parametrize(
    ("variable", "address", "asked"),
    [
        pytest.param("BU_CDP_WS", "ws://who:word@127.0.0.1:{port}/a/path?token=1", "GET /a/path?token=1 ", id="websocket"),
        pytest.param(
            "BU_CDP_URL",
            "http://who:word@127.0.0.1:{port}/a/path/",
            "GET /a/path/json/version ",
            id="url",
        ),
        pytest.param(
            "BU_CDP_URL",
            "http://who:word@127.0.0.1:{port}/a/path?token=1",
            "GET /a/path/json/version?token=1 ",
            id="url with a token",
        ),
    ],
)
def test_secrets_of_an_address_are_sent_to_its_server(
    variable: str, address: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[bytes] = []
    with answering(FORBIDDEN, requests=requests) as port:
        monkeypatch.setenv(variable, address.format(port=port))
        assert "answered 403" in why_not()
    head = b"".join(requests).decode()
    assert head.startswith(asked)
    assert f"\r\nAuthorization: Basic {b64encode(b'who:word').decode()}\r\n" in head


# Browsers that cannot be started.


@needs_path
def test_without_a_browser_the_error_says_what_to_install(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(fresh))
        text = why_not()
    assert text.startswith("there is no browser: none runs with its DevTools open, and none is installed; install Chrome or ")
    assert "HARNESS_CHROME" in text
    assert "BU_CDP_WS" in text


@pytest.mark.parametrize("kind", ["nothing", "a directory", pytest.param("a text", marks=needs_posix)])
def test_an_invalid_program_is_an_error(kind: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fresh / "program"
    if kind == "a directory":
        program.mkdir()
    elif kind == "a text":
        program.write_text("#!/bin/sh\n")
    monkeypatch.setenv("HARNESS_CHROME", str(program))
    text = why_not()
    assert f"HARNESS_CHROME={program} is not a program; install " in text


@needs_posix
@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        pytest.param("echo a reason >&2; echo its end >&2; exit 1", "(its end)", id="with words"),
        pytest.param(r"printf 'no\033[1m \377\r\n\n' >&2; exit 1", r"(no\x1b[1m \\xff)", id="with strange words"),
        pytest.param("exit 1", "ready; see", id="without a word"),
        pytest.param("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", f"({'x' * 300})", id="with too many words"),
    ],
)
def test_a_program_that_ends_at_once_is_quoted(
    text: str, quoted: str, fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(fresh / "program", text)
    monkeypatch.setenv("HARNESS_CHROME", program)
    text = why_not()
    assert text.startswith(f"{program} ended with status 1 before it was ready")
    assert quoted in text
    assert str(profile / "harness-browser.stderr") in text
    assert not TRACES & set(os.listdir(profile))


@needs_posix
def test_a_program_that_never_opens_its_devtools_is_ended(fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The program and its child ignore SIGTERM.
    program = script(fresh / "program", "trap '' TERM; echo not today >&2; sleep 3600 & while :; do wait; done")
    monkeypatch.setenv("HARNESS_CHROME", program)
    text = why_not("launcher.START_TIMEOUT = 0.5")
    assert text.startswith(f"{program} has not opened its DevTools within 0.5 s (not today)")
    assert processes_of(fresh) == []
    assert not TRACES & set(os.listdir(profile))


@needs_posix
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(": > $0.started; sleep 3600", id="one process"),
        pytest.param(": > $0.started; for i in $(seq 100); do sleep 3600 & done; wait", id="while it forks"),
    ],
)
def test_stopping_during_the_browsers_start_ends_it(
    text: str, fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CHROME", script(fresh / "program", text))
    with in_thread(helpers.connect) as starting:
        wait_until((fresh / "program.started").exists)
        assert stop_daemon("browser", timeout=PATIENCE)
        assert isinstance(starting.exception(), StartFailed)
    assert processes_of(fresh) == []
    assert not TRACES & set(os.listdir(profile))


@needs_posix
def test_errors_of_the_system_are_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fresh / "program"
    program.write_bytes(b"\x7fELF but not really")
    program.chmod(0o700)
    monkeypatch.setenv("HARNESS_CHROME", str(program))
    text = why_not()
    assert "Exec format error" in text
    assert str(program) in text
    assert re.search(r"set .*HARNESS_CHROME\b", text)


@needs_posix
def test_a_profile_that_can_not_be_made_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CHROME_PROFILE", str(fresh / "file" / "profile"))
        text = why_not()
    assert "can't be created: " in text
    assert str(fresh / "file" / "profile") in text
    assert "set HARNESS_CHROME_PROFILE to " in text


@needs_posix
def test_a_port_that_stands_in_the_profile_is_not_believed(fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bytes] = []
    with answering(PAGE, requests=requests) as port:
        profile.mkdir(mode=0o700)
        word = profile / "DevToolsActivePort"
        word.write_text(f"{port}\n/devtools/browser/{SECRET}")
        assert_own_browser_serves(monkeypatch)
        assert not word.exists()
        helpers.disconnect()
        stop_daemon("browser")
        # The same if the browser's own program writes the port.
        find_profile = "for word; do case $word in --user-data-dir=*) profile=${word#*=};; esac; done"
        write = f'printf "{port}\\n/devtools/browser/{SECRET}" > "$profile/DevToolsActivePort"'
        monkeypatch.setenv("HARNESS_CHROME", script(fresh / "program", f"{find_profile}; {write}; sleep 3600"))
        assert "has not opened its DevTools within 1 s" in why_not("launcher.START_TIMEOUT = 1.0")
    assert requests == []
    assert SECRET not in the_log("browser")
    assert processes_of(fresh) == []
    assert not TRACES & set(os.listdir(profile))


def test_an_error_names_the_variable_of_invalid_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CHROME_ARGS", "--user-agent='no end")
    assert "HARNESS_CHROME_ARGS" in why_not()


def test_failed_starts_do_not_hinder_the_next_one(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(FORBIDDEN) as port:
        failures = [
            ("BU_CDP_WS", f"ws://127.0.0.1:{port}"),
            ("BU_CDP_URL", f"http://127.0.0.1:{port}"),
            ("HARNESS_CHROME", str(fresh / "nothing")),
            # A program that ends at once, since it does not know a browser's options.
            ("HARNESS_CHROME", sys.executable),
            ("HARNESS_CHROME_ARGS", "'no end"),
        ]
        for variable, value in failures:
            with monkeypatch.context() as patch:
                patch.setenv(variable, value)
                why_not()
    assert_own_browser_serves(monkeypatch)


# Managed browsers.


def test_a_managed_browser_is_private_and_leaves_nothing(fresh: Path, profile: Path) -> None:
    helpers.connect()
    found = status()
    assert (found["own"], found["found"]) == (True, f"our own browser, its profile {profile}")
    if os.name == "posix":
        assert stat.S_IMODE(profile.stat().st_mode) == 0o700
    words = psutil.Process(found["pid"]).cmdline()
    assert f"--user-data-dir={profile}" in words
    assert ("--headless=new" in words) is not has_display()
    assert ("--no-sandbox" in words) is is_root()
    helpers.disconnect()
    assert stop_daemon("browser")
    wait_until(lambda: not processes_of(fresh))
    assert not TRACES & set(os.listdir(profile))


@needs_root
def test_without_its_sandbox_the_log_warns(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers.connect()
    (warning,) = [line for line in the_log("browser").splitlines() if " WARNING " in line]
    assert "running as root: the browser's sandbox is off (--no-sandbox)" in warning
    helpers.disconnect()
    stop_daemon("browser")
    # Without that option, Chromium refuses to run as root.
    binary = shlex.quote(find_binary() or "")
    words = 'for word; do shift; test "$word" = --no-sandbox || set -- "$@" "$word"; done'
    monkeypatch.setenv("HARNESS_CHROME", script(fresh / "program", f'{words}; exec {binary} "$@"'))
    assert "Running as root without --no-sandbox is not supported" in why_not()


@pytest.mark.parametrize("root", [True, False])
def test_the_sandbox_is_off_for_root_only(root: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness_ipc.browser.program.is_root", lambda: root)
    assert ("--no-sandbox" in command_line("chromium", "profile", window=has_display())) is root


@contextlib.contextmanager
def display(variable: str, base: Path) -> Iterator[str]:
    """Yield the name of a display that takes connections."""
    with socket.socket(socket.AF_UNIX) as server:
        if variable == "DISPLAY":
            name = f":{next(number for number in range(700, 799) if binds(server, number))}.0"
        else:
            name = "wayland-7"
            server.bind(str(base / name))
        server.listen(100)
        yield name


def binds(server: socket.socket, number: int) -> bool:
    """Return whether the socket is bound to this X display's address now."""
    with contextlib.suppress(OSError):
        server.bind(f"\0/tmp/.X11-unix/X{number}")
        return True
    return False


@pytest.mark.parametrize("variable", ["DISPLAY", "WAYLAND_DISPLAY"])
@needs_linux
def test_a_window_is_on_a_display_that_takes_connections(variable: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(fresh))
    assert not has_display()
    with display(variable, fresh) as name:
        monkeypatch.setenv(variable, name)
        assert has_display()
        assert find_broken(os.environ) == {}
    assert not has_display()
    assert list(find_broken(os.environ)) == [variable]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (":799", "No such file"),
        ("nonsense", "not a display name"),
        ("localhost:59.0", "refused"),
        ("/nonexistent/socket:0", "No such file"),
    ],
)
@needs_linux
def test_an_unreachable_display_is_reported_with_the_reason(name: str, why: str) -> None:
    assert why in find_broken({"DISPLAY": name})["DISPLAY"]


@needs_linux
def test_without_a_usable_display_a_browser_is_headless(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":799")
    run = harness_browser("-c", "print(page_info()['url'])")
    assert run.stdout == "about:blank\n"
    gone = "DISPLAY=:799 can't be reached (No such file or directory)"
    assert run.stderr == f"harness-browser: {gone}: the browser does not use it, and is headless\n"
    assert f"headless, since {gone}" in harness_browser("--doctor").stdout
    stop_daemon("browser")
    # A display that accepts connections, and does not answer.
    with display("DISPLAY", fresh) as name:
        monkeypatch.setenv("DISPLAY", name)
        quits = "for word; do case $word in --headless*) ok=1;; esac; done; test $ok || { echo Missing X server >&2; exit 1; }"
        binary = shlex.quote(find_binary() or "")
        monkeypatch.setenv("HARNESS_CHROME", script(fresh / "program", f'{quits}; exec {binary} "$@"'))
        run = harness_browser("-c", "print(page_info()['url'])")
    assert run.stdout == "about:blank\n"
    assert run.stderr == "harness-browser: the browser can't use its display (Missing X server): it is headless\n"


def test_further_arguments_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CHROME_ARGS", "--user-agent='Robot 7' --window-size=801,602")
    assert helpers.js("navigator.userAgent") == "Robot 7"
    assert helpers.js("[outerWidth, outerHeight]") == [801, 602]


@needs_path
def test_each_name_has_its_own_private_profile(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_CHROME_PROFILE")
    monkeypatch.setenv("XDG_DATA_HOME", str(fresh / "data"))
    previous = os.umask(0)
    try:
        assert helpers.js("6 * 7") == 42
        first = status()
        helpers.disconnect()
        monkeypatch.setenv("BU_NAME", "second")
        assert helpers.js("6 * 7") == 42
        second = status()
    finally:
        os.umask(previous)
        helpers.disconnect()
        stop_daemon("second")
    folder = fresh / "data" / "harness-ipc" / "browser"
    assert (first["found"], second["found"]) == tuple(
        f"our own browser, its profile {folder / name}" for name in ("browser", "second")
    )
    assert first["pid"] != second["pid"]
    assert {stat.S_IMODE(place.stat().st_mode) for place in folder.iterdir()} == {0o700}
    monkeypatch.delenv("BU_NAME")
    assert status()["pid"] == first["pid"]


def test_a_profile_belongs_to_the_running_daemon(fresh: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = warm / "profile"
    helpers.js("window.mine = 1")
    daemon, browser = helpers.connect().pid, status()["pid"]
    helpers.disconnect()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("HARNESS_IPC_RUNTIME_DIR", str(fresh / "other run"))
        text = why_not()
        assert text.startswith(f"the profile {profile} is in use by the daemon of pid {daemon}: stop that one, or set HARNESS_")
        assert list(runtime_dir().glob("*.json")) == []
    assert helpers.js("window.mine") == 1
    assert (helpers.connect().pid, status()["pid"]) == (daemon, browser)
    assert (profile / "harness-browser.json").exists()


# Between the check of the profile and the start of the browser, wait for the other daemon to get there as well.
MEET = """
import os, time
from pathlib import Path
find_binary = launcher.find_binary
def find_binary_together():
    place = Path(os.environ["HARNESS_IPC_RUNTIME_DIR"])
    (place / f"{os.getpid()}.here").touch()
    deadline = time.monotonic() + 3.0
    while len(list(place.glob("*.here"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return find_binary()
launcher.find_binary = find_binary_together
"""


def test_of_two_daemons_that_start_at_once_one_gets_the_profile(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_thread(start, MEET, "one") as first, in_thread(start, MEET, "two") as second:
        failed = {name: job.exception(PATIENCE) for name, job in (("one", first), ("two", second))}
    assert [type(error) for error in failed.values()].count(StartFailed) == 1
    (loser,) = (name for name, error in failed.items() if error is not None)
    winner = "two" if loser == "one" else "one"
    assert f"the profile {profile} is in use by " in str(failed[loser])
    monkeypatch.setenv("BU_NAME", winner)
    assert helpers.js("6 * 7") == 42
    # The browser is recorded as the winner's: the next daemon adopts it.
    browser = status()["pid"]
    kill_daemon(winner)
    assert status()["pid"] == browser


def test_a_profile_of_another_running_browser_is_not_used(fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with other_browser(fresh, profile="profile") as browser:
        text = why_not()
        assert text.startswith(f"the profile {profile} is in use by a browser that is not ours: end it, or set HARNESS_CHROME_")
        assert browser.process.poll() is None
        assert list(browser.tabs().values()) == ["about:blank"]
        assert browser.active_port.exists()
    # Chrome does not write DevToolsActivePort if the port was given.
    with other_browser(fresh, profile="profile", port=free_port()) as browser:
        assert "is in use by a browser that is not ours" in why_not()
        assert browser.process.poll() is None
        assert list(browser.tabs().values()) == ["about:blank"]
    assert_own_browser_serves(monkeypatch)


@needs_path
def test_a_profile_locked_by_another_host_is_used(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.mkdir(mode=0o700)
    # Chromium does not start with a lock of another host, which it takes for valid.
    (profile / "SingletonLock").symlink_to("another-host-1")
    assert_own_browser_serves(monkeypatch)


@needs_posix
def test_a_browser_that_hangs_is_ended_with_its_daemon(fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers.connect()
    with suspended(status()["pid"]):
        helpers.disconnect()
        assert stop_daemon("browser", timeout=PATIENCE)
        wait_until(lambda: not processes_of(fresh))
    assert not TRACES & set(os.listdir(profile))


def test_the_lock_of_a_killed_daemon_may_outlive_it_for_a_moment(fresh: Path, profile: Path) -> None:
    helpers.connect()
    pid = status()["pid"]
    kill_daemon()
    # The system may release the locks of a process after its exit was reported.
    held = FileLock(profile / "harness-browser.lock", thread_local=False)
    held.acquire(PATIENCE)
    release = threading.Timer(0.1, held.release)
    release.start()
    assert ManagedBrowser("browser").end()
    assert not lives(pid)
    release.join()
    # It holds the lock no longer.
    held.acquire(0)
    held.release()


@needs_posix
def test_a_wrapper_of_the_browser_ends_with_it(fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = script(fresh / "program", f'{shlex.quote(find_binary() or "")} "$@"\nexit 0')
    monkeypatch.setenv("HARNESS_CHROME", program)
    assert helpers.js("6 * 7") == 42
    assert psutil.Process(status()["pid"]).cmdline()[1] == program
    helpers.disconnect()
    assert stop_daemon("browser")
    wait_until(lambda: not processes_of(fresh))
    assert not TRACES & set(os.listdir(profile))
    # The same after a kill, where no daemon asks the browser to exit.
    helpers.connect()
    kill_daemon()
    assert ManagedBrowser("browser").end()
    wait_until(lambda: not processes_of(fresh))


@needs_posix
def test_a_browser_of_a_dead_daemon_that_hangs_is_ended(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers.connect()
    pid = status()["pid"]
    with suspended(pid):
        kill_daemon()
        # Long enough for a browser that responds.
        start("connection.OPEN_TIMEOUT = 5.0")
        wait_until(lambda: pid not in [process.pid for process in processes_of(fresh)])
    assert status()["pid"] != pid
    assert_own_browser_serves(monkeypatch)


# Between the list of pages and the choice of one, wait for the other daemon to list them as well.
LOOK_TOGETHER = """
import asyncio, os, time
from pathlib import Path
from harness_ipc.browser.sessions import Sessions
targets = Sessions.targets
async def targets_together(self):
    found = await targets(self)
    place = Path(os.environ["HARNESS_IPC_RUNTIME_DIR"])
    (place / f"{os.getpid()}.looks").touch()
    deadline = time.monotonic() + 1.0
    while len(list(place.glob("*.looks"))) < 2 and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return found
Sessions.targets = targets_together
"""


def test_two_daemons_on_one_browser_have_their_own_pages(other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BU_CDP_URL", other.url)
    (there,) = other.tabs()
    with in_thread(start, LOOK_TOGETHER, "one") as first, in_thread(start, LOOK_TOGETHER, "two") as second:
        first.result(PATIENCE)
        second.result(PATIENCE)
    taken = set()
    for name in ("one", "two"):
        with connect_daemon(name, request_timeout=PATIENCE) as daemon:
            taken.add(daemon.request({"meta": "session"})["target_id"])
    assert taken == other.tabs().keys()
    assert there in taken
    assert len(taken) == 2
