"""Managed browsers: no port, adoption in the middle of a message, private files, and refusal as root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import ConnectionLost, daemon_status, process_identity
from harness_ipc.browser import helpers
from harness_ipc.browser.doctor import examine
from harness_ipc.browser.errors import BrowserError, BrowserNotFound
from harness_ipc.browser.launcher import ManagedBrowser
from harness_ipc.browser.program import browser_environment
from tests.browser.conftest import Pair, harness_browser, kill, processes_of, suspended
from tests.browser.site import Site
from tests.support.managed import in_thread, spawn_bystander
from tests.support.marks import needs_chromium, needs_linux, needs_posix, needs_root
from tests.support.processes import PATIENCE, lives, wait_until

if sys.platform != "win32":
    import fcntl
    import termios

pytestmark = [needs_chromium, needs_posix]

STRANGER = 12345
# Bytes: more than a pipe holds.
LARGE = 4 * 1024 * 1024


@pytest.fixture
def profile(fresh: Path) -> Path:
    return fresh / "profile"


def browser_pid() -> int:
    pid = helpers.connect().request({"meta": "connection_status"})["pid"]
    assert isinstance(pid, int)
    return pid


def kill_daemon() -> None:
    """Kill the daemon of this process, and wait until connections are refused."""
    kill(helpers.connect().pid)
    helpers.disconnect()
    wait_until(lambda: daemon_status("browser").state == "stale")


def waiting_bytes(fifo: Path) -> int:
    """Return the number of unread bytes in a FIFO."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def driven(browser: ManagedBrowser) -> AsyncIterator[None]:
    """Start or adopt the browser in this process, check that it works, and end it at the exit of the context."""
    connection = await browser.connect(lambda *_: None)
    try:
        assert "product" in await connection.call("Browser.getVersion")
        yield
    finally:
        await browser.close(connection)
        await connection.close()


# No port.


def test_no_process_of_the_browser_listens(warm: Path) -> None:
    profile = warm / "profile"
    assert helpers.js("6 * 7") == 42
    family = processes_of(warm)
    assert len(family) > 3
    listeners = []
    for process in family:
        # That of a closed tab may end meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            found = process.net_connections("tcp")
            listeners += [(process.pid, connection.laddr) for connection in found if connection.status == psutil.CONN_LISTEN]
    assert listeners == []
    assert not (profile / "DevToolsActivePort").exists()
    modes = {name: (profile / f"harness-browser.{name}").lstat().st_mode for name in ("in", "out", "json", "lock", "stderr")}
    assert {name: stat.S_IMODE(mode) for name, mode in modes.items()} == dict.fromkeys(modes, 0o600)
    assert [name for name, mode in modes.items() if stat.S_ISFIFO(mode)] == ["in", "out"]
    assert stat.S_IMODE(profile.stat().st_mode) == 0o700


def test_files_of_the_browser_are_private_with_any_umask(profile: Path) -> None:
    previous = os.umask(0)
    try:
        helpers.connect()
    finally:
        os.umask(previous)
    helpers.goto_url("data:text/html,<title>x</title>")
    wait_until(lambda: (profile / "Local State").exists())
    found = {path: path.lstat().st_mode for path in profile.rglob("*") if not path.is_symlink()}
    assert len(found) > 5
    assert [(path, oct(mode)) for path, mode in found.items() if mode & 0o077] == []


@pytest.mark.usefixtures("killable")
def test_large_messages_go_both_ways() -> None:
    assert helpers.js(f"'{'x' * LARGE}'.length", timeout=PATIENCE) == LARGE
    assert helpers.js(f"'y'.repeat({LARGE})", timeout=PATIENCE) == "y" * LARGE
    pid = browser_pid()
    # The browser would stop reading after such a message, so it is refused.
    with pytest.raises(BrowserError, match="too large: the browser accepts"):
        helpers.js(f"'{'x' * 100 * 1024 * 1024}'.length", timeout=PATIENCE)
    assert (helpers.js("6 * 7"), browser_pid()) == (42, pid)


# Adoption.


def test_a_browser_is_usable_after_a_daemon_killed_while_writing(killable: Pair) -> None:
    helpers.js("window.kept = 42")
    with suspended(killable.browser), in_thread(helpers.js, f"window.half = '{'x' * LARGE}'.length", timeout=PATIENCE) as job:
        # Wait until the pipe is full.
        wait_until(lambda: waiting_bytes(killable.base / "profile" / "harness-browser.in") >= 64 * 1024)
        kill(killable.daemon)
        assert isinstance(job.exception(PATIENCE), ConnectionLost)
    helpers.disconnect()
    assert helpers.js("[window.kept, window.half]") == [42, None]
    assert browser_pid() == killable.browser


# Messages so long that a full pipe ends in the middle of one.
FLOOD = "window.kept = 42; var n = 0, flood = setInterval(() => console.log(n++, 'x'.repeat(99991)), 1)"


def test_a_browser_is_usable_after_a_daemon_killed_while_reading(killable: Pair) -> None:
    profile = killable.base / "profile"
    helpers.js(FLOOD)
    before = len(psutil.Process(killable.daemon).net_connections("inet"))
    with suspended(killable.daemon):
        # Wait until no further write of Chrome fits.
        wait_until(lambda: waiting_bytes(profile / "harness-browser.out") > 2 * 64 * 1024 and is_full(profile))
        kill(killable.daemon)
    helpers.disconnect()
    assert helpers.js("clearInterval(flood), window.kept") == 42
    assert (browser_pid(), before) == (killable.browser, 0)
    # Each event comes once: the sessions of the dead daemon have ended.
    helpers.drain_events()
    helpers.js("console.log('the last')")
    wait_until(lambda: "the last" in json.dumps(events := helpers.drain_events()) and count_logs(events) == 1)


def is_full(profile: Path) -> bool:
    """Return whether the number of unread bytes stays the same."""
    before = waiting_bytes(profile / "harness-browser.out")
    time.sleep(0.2)
    return waiting_bytes(profile / "harness-browser.out") == before


def count_logs(events: list[dict[str, Any]]) -> int:
    return sum(event["method"] == "Runtime.consoleAPICalled" for event in events)


def test_requests_intercepted_by_a_killed_daemon_continue(killable: Pair, site: Site) -> None:
    helpers.goto_url(f"{site.url}/")
    helpers.cdp("Fetch.enable")
    helpers.js("window.fetched = 'not yet'; fetch('/form').then(reply => window.fetched = reply.status); 0")
    wait_until(lambda: any(event["method"] == "Fetch.requestPaused" for event in helpers.drain_events()))
    kill_daemon()
    wait_until(lambda: helpers.js("window.fetched") == 200)
    assert browser_pid() == killable.browser


def test_many_daemons_that_are_killed_leave_one_root_session(killable: Pair) -> None:
    sessions = set()
    for _ in range(3):
        helpers.connect()
        sessions.add(json.loads((killable.base / "profile" / "harness-browser.json").read_text())["session"])
        kill_daemon()
    assert len(sessions) == 3
    helpers.connect()
    targets = helpers.cdp("Target.getTargets", filter=[{"type": "browser"}, {"type": "page"}])["targetInfos"]
    assert [target["type"] for target in targets if target["attached"]].count("browser") <= 1
    assert [target["attached"] for target in targets if target["type"] == "page"] == [True]


def test_a_browser_with_a_port_is_driven_and_adopted_as_well(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as on Windows, where there are no FIFOs."""
    monkeypatch.setattr("harness_ipc.browser.program.USES_PIPE", False)

    async def main() -> None:
        browser = ManagedBrowser("browser")
        connection = await browser.connect(lambda *_: None)
        pid = browser.pid()
        await connection.close()
        async with driven(browser):
            assert browser.pid() == pid
        assert browser.pid() is None

    asyncio.run(main())
    assert not (profile / "DevToolsActivePort").exists()


# Root.


@needs_root
def test_roots_browser_is_refused_unless_it_is_accepted(fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "no browser is started as root, since its sandbox does not work for root"
    for value in ("", "0", "yes"):
        monkeypatch.setenv("HARNESS_CHROME_ROOT", value)
        with pytest.raises(BrowserNotFound, match=refusal):
            asyncio.run(ManagedBrowser("browser").connect(lambda *_: None))
        assert not profile.exists()
    monkeypatch.delenv("HARNESS_CHROME_ROOT")
    run = harness_browser("-c", "print(page_info())")
    assert (run.returncode, run.stdout) == (6, "")
    assert refusal in run.stderr
    assert "set HARNESS_CHROME_ROOT=1 to accept that" in run.stderr
    assert not profile.exists()
    doctor = harness_browser("--doctor")
    assert doctor.returncode == 1
    assert [line[:23] for line in doctor.stdout.splitlines() if "HARNESS_CHROME_ROOT=1" in line] == [
        "WARNING  own browser: /",
        "FAILURE  browser: no br",
    ]
    monkeypatch.setenv("HARNESS_CHROME_ROOT", "1")
    # A running browser can be stopped without the variable.
    pid = browser_pid()
    kill_daemon()
    monkeypatch.delenv("HARNESS_CHROME_ROOT")
    assert harness_browser("-c", "1").returncode == 6
    assert lives(pid)
    assert harness_browser("--reload").returncode == 0
    wait_until(lambda: not processes_of(fresh))


# The environment.


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"PATH": "1", "HOME": "2", "LC_ALL": "3", "XDG_RUNTIME_DIR": "4", "FONTCONFIG_FILE": "5"}, None),
        ({"DISPLAY": ":1", "WAYLAND_DISPLAY": "w", "XAUTHORITY": "x", "DBUS_SESSION_BUS_ADDRESS": "d", "TZ": "UTC"}, None),
        ({"https_proxy": "p", "NO_PROXY": "n"}, None),
        ({"ANTHROPIC_API_KEY": "k", "AWS_SECRET_ACCESS_KEY": "k", "GITHUB_TOKEN": "t", "LD_PRELOAD": "l"}, []),
        ({"BU_CDP_WS": "secret", "HARNESS_IPC_START": "5", "HARNESS_CHROME_ROOT": "1", "PATHS": "1", "MY_PATH": "1"}, []),
        ({"HARNESS_CHROME_ENV": "A", "A": "1", "AB": "2"}, ["A"]),
        ({"HARNESS_CHROME_ENV": " A , B_*,", "A": "1", "B_1": "2", "B_2": "3", "B": "4"}, ["A", "B_1", "B_2"]),
        ({"HARNESS_CHROME_ENV": "*", "A": "1"}, ["HARNESS_CHROME_ENV", "A"]),
    ],
)
def test_a_browser_gets_the_necessary_environment(environment: dict[str, str], names: list[str] | None) -> None:
    expected = environment if names is None else {name: environment[name] for name in names}
    assert browser_environment(environment) == expected


@needs_linux
def test_no_process_of_the_browser_has_the_agents_keys(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-hush")
    monkeypatch.setenv("WANTED", "one=two=\u00e4")
    monkeypatch.setenv("HARNESS_CHROME_ENV", "WANTED,MISSING")
    pid = browser_pid()
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(family) > 3
    for process in family:
        assert "sk-hush" not in "".join(process.environ().values())
        assert "sk-hush" not in "".join(process.cmdline())
    assert family[0].environ()["WANTED"] == "one=two=\u00e4"
    assert "TMPDIR" in family[0].environ()
    # The daemon itself inherits the full environment.
    assert psutil.Process(helpers.connect().pid).environ()["SOME_API_KEY"] == "sk-hush"


# Downloads.

DOWNLOAD = """
const link = document.createElement("a");
link.href = "data:application/octet-stream,hello";
link.download = "NAME";
document.body.append(link);
link.click();
"""


def download(name: str) -> None:
    helpers.cdp("Runtime.evaluate", expression=DOWNLOAD.replace("NAME", name), userGesture=True)


def end_of_download(name: str) -> str:
    """Download a file of this name, and return the final state of the download."""
    # Chrome asks before a second download of the same page.
    helpers.new_tab()
    download(name)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for event in helpers.drain_events():
            if event["method"] == "Page.downloadProgress" and event["params"]["state"] != "inProgress":
                return str(event["params"]["state"])
    raise AssertionError("the download has not ended")


def files(folder: Path) -> dict[str, str]:
    """Return the text of each complete file in a folder, by name. The folder may be missing."""
    found = {}
    if folder.exists():
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = path.read_text()
    return {name: text for name, text in found.items() if text == "hello"}


def test_downloads_are_denied_unless_a_folder_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fresh / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert end_of_download("denied") == "canceled"
    kill_daemon()
    # The same for an adopted browser.
    assert end_of_download("denied") == "canceled"
    assert [path for path in home.rglob("*") if "denied" in path.name] == []


def test_downloads_go_to_the_folder_that_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fresh / "files" / "from the browser"
    monkeypatch.setenv("HARNESS_CHROME_DOWNLOADS", str(folder))
    helpers.connect()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    download("one")
    wait_until(lambda: files(folder) == {"one": "hello"})
    assert stat.S_IMODE((folder / "one").stat().st_mode) == 0o600
    context = helpers.cdp("Target.createBrowserContext")["browserContextId"]
    helpers.switch_tab(helpers.cdp("Target.createTarget", url="about:blank", browserContextId=context)["targetId"])
    download("two")
    wait_until(lambda: files(folder) == {"one": "hello", "two": "hello"})
    # The same while no daemon runs.
    helpers.cdp("Runtime.evaluate", expression=f"setInterval(() => {{ {DOWNLOAD.replace('NAME', 'three')} }}, 2000)")
    kill_daemon()
    wait_until(lambda: "three" in files(folder))


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_an_unusable_download_folder_is_named(kind: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    folder = fresh / "file" if kind == "file" else fresh / "file" / "folder"
    monkeypatch.setenv("HARNESS_CHROME_DOWNLOADS", str(folder))
    run = harness_browser("-c", "1")
    assert run.returncode == 6
    assert f"HARNESS_CHROME_DOWNLOADS='{folder}' can't be used: " in run.stderr
    assert processes_of(fresh) == []


# The profile.


@pytest.mark.parametrize("kind", ["open", "link", pytest.param("foreign", marks=needs_root)])
@pytest.mark.parametrize("way", ["named", "default"])
def test_a_profile_that_is_not_private_is_refused(
    kind: str, way: str, fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "default":
        monkeypatch.delenv("HARNESS_CHROME_PROFILE")
        monkeypatch.setenv("XDG_DATA_HOME", str(fresh / "data"))
        profile = Path(ManagedBrowser("browser").profile)
    profile.parent.mkdir(parents=True, exist_ok=True)
    remedy: str | None
    match kind:
        case "open":
            profile.mkdir()
            profile.chmod(0o755)
            remedy = f"chmod 700 {profile}"
        case "link":
            (fresh / "elsewhere").mkdir(mode=0o700)
            profile.symlink_to(fresh / "elsewhere")
            remedy = f"rm {profile}"
        case _:
            profile.mkdir(mode=0o700)
            os.chown(profile, STRANGER, -1)
            remedy = None
    run = harness_browser("-c", "1")
    assert run.returncode == 6
    fix = ": " if remedy is None else f": run `{remedy}`, or "
    assert f"so it is not private to you{fix}set HARNESS_CHROME_PROFILE to another directory" in run.stderr
    assert os.listdir(profile) == []
    (failure,) = (finding for finding in examine("browser") if finding.level == "failure")
    assert (failure.topic, failure.remedy) == ("browser", remedy)
    assert harness_browser("--reload").returncode == 5
    subprocess.run(remedy or f"rmdir {profile}", shell=True, check=True)
    assert [finding for finding in examine("browser") if finding.level == "failure"] == []


OURS = [f"harness-browser.{name}" for name in ("json", "tmp", "lock", "stderr", "in", "out")]


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "FIFO", pytest.param("foreign file", marks=needs_root)])
def test_planted_files_in_the_profile_do_no_harm(kind: str, fresh: Path, profile: Path) -> None:
    victims = {name: fresh / f"victim of {name}" for name in [*OURS, "DevToolsActivePort"]}
    profile.mkdir(mode=0o700)
    for name, victim in victims.items():
        place = profile / name
        victim.write_text("precious")
        victim.chmod(0o600)
        match kind:
            case "symbolic link":
                place.symlink_to(victim)
            case "hard link":
                os.link(victim, place)
            case "FIFO":
                os.mkfifo(place, 0o666)
            case _:
                place.write_text("planted")
                os.chown(place, STRANGER, STRANGER)

    async def main() -> None:
        async with driven(ManagedBrowser("browser")):
            for name in ("json", "lock", "stderr", "in", "out"):
                info = (profile / f"harness-browser.{name}").lstat()
                assert (info.st_uid, info.st_nlink, stat.S_IMODE(info.st_mode)) == (os.geteuid(), 1, 0o600)
                assert stat.S_ISFIFO(info.st_mode) == (name in ("in", "out"))

    asyncio.run(main())
    assert {name: victim.read_text() for name, victim in victims.items()} == dict.fromkeys(victims, "precious")
    assert {stat.S_IMODE(victim.stat().st_mode) for victim in victims.values()} == {0o600}


@pytest.mark.parametrize(
    "kind", ["a link", "a hard link", "readable", "large", pytest.param("another user's", marks=needs_root), "of another shape"]
)
def test_a_planted_note_signals_nobody(kind: str, fresh: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program that ends at once, since it does not know a browser's options.
    monkeypatch.setenv("HARNESS_CHROME", sys.executable)
    profile.mkdir(mode=0o700)
    note = profile / "harness-browser.json"
    with spawn_bystander() as stranger:
        identity: Any = process_identity(stranger.pid)
        dead = {**identity, "pid": 2**22 + 1}
        text = json.dumps({"browser": identity, "daemon": dead, "session": None})
        place = fresh / "planted" if "link" in kind else note
        place.write_text(text)
        place.chmod(0o600)
        match kind:
            case "a link":
                note.symlink_to(place)
            case "a hard link":
                os.link(place, note)
            case "readable":
                note.chmod(0o644)
            case "large":
                note.write_text(text + " " * 2**20)
            case "another user's":
                os.chown(note, STRANGER, STRANGER)
            case _:
                note.write_text(json.dumps({"browser": stranger.pid, "daemon": [stranger.pid]}))
        browser = ManagedBrowser("browser")
        assert (browser.pid(), browser.taken(), browser.end()) == (None, None, False)
        if not note.exists() and "link" not in kind:
            place.write_text(text)
        with pytest.raises(BrowserNotFound, match="ended with status 2 before it was ready"):
            asyncio.run(browser.connect(lambda *_: None))
        assert stranger.process.poll() is None


def test_our_note_is_read(profile: Path) -> None:
    """Otherwise, the planted notes might be ignored for another reason."""
    profile.mkdir(mode=0o700)
    note = profile / "harness-browser.json"
    with spawn_bystander() as stranger:
        identity: Any = process_identity(stranger.pid)
        note.write_text(json.dumps({"browser": identity, "daemon": {**identity, "pid": 2**22 + 1}, "session": None}))
        note.chmod(0o600)
        browser = ManagedBrowser("browser")
        assert browser.pid() == stranger.pid
        assert browser.end()
        wait_until(lambda: not lives(stranger.pid))


def test_a_foreign_browser_in_the_profile_is_detected(fresh: Path, profile: Path) -> None:
    """SingletonSocket tells: the process may have any name, and the socket of a dead one refuses connections."""
    profile.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(fresh / "socket"))
        (profile / "SingletonSocket").symlink_to(fresh / "socket")
        server.listen()
        run = harness_browser("-c", "1")
        assert run.returncode == 6
        assert f"the profile {profile} is in use by a browser that is not ours" in run.stderr

    async def main() -> None:
        async with driven(ManagedBrowser("browser")):
            pass

    asyncio.run(main())
