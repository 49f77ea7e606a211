"""Real browsers, from the cheapest for a test to the dearest: a new browser takes a second of a core.

`warm` is the directory of a daemon and a browser that all tests of a worker share, and `page` a new tab there. A tab takes more
than most tests, so those that leave it as it was share `empty_page` or `used_page`. A test that kills daemon or browser has
`killable`. With `attached`, daemons are new, but attach to a browser that is shared. `fresh` is a directory without processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest

from harness_ipc import HarnessIPCError, connect_daemon, stop_daemon
from harness_ipc.browser import helpers
from tests.browser.shared_tab import SharedTab, empty_state, open_tabs, view_state
from tests.browser.site import Site
from tests.conftest import set_directories
from tests.support.managed import all_processes
from tests.support.processes import PATIENCE, lives, wait_until

if TYPE_CHECKING:
    from tests.browser.others import OtherBrowser

# These modules import websockets, which the extra installs.
NEED_EXTRA = [
    "test_discovery.py",
    "test_cli.py",
    "test_daemon.py",
    "test_doctor.py",
    "test_downloads.py",
    "test_launcher.py",
    "test_local.py",
    "test_pipe.py",
    "test_requested.py",
    "test_restarts.py",
    "test_tabs.py",
]
collect_ignore = [] if importlib.util.find_spec("websockets") else NEED_EXTRA

VARIABLES = (
    "BU_NAME",
    "BU_CDP_WS",
    "BU_CDP_URL",
    "HARNESS_BROWSER_IDLE_TIMEOUT",
    "HARNESS_CHROME",
    "HARNESS_CHROME_ARGS",
    "HARNESS_CHROME_DOWNLOADS",
    "HARNESS_CHROME_ENV",
)


def use(patch: pytest.MonkeyPatch, base: Path) -> None:
    """Place all files of daemon and browser below `base`, and hide other browsers, for this process and its children."""
    for variable in VARIABLES:
        patch.delenv(variable, raising=False)
    set_directories(patch, str(base))
    patch.setenv("HARNESS_CHROME_PROFILE", str(base / "profile"))
    patch.setenv("HARNESS_CHROME_OWN", "1")
    patch.setenv("HARNESS_CHROME_ROOT", "1")
    # A killed browser leaves a temporary directory behind.
    patch.setenv("TMPDIR", str(base))
    # Without a display, the browser is headless on every machine.
    patch.delenv("DISPLAY", raising=False)
    patch.delenv("WAYLAND_DISPLAY", raising=False)


def processes_of(base: Path) -> list[psutil.Process]:
    """Return the processes, other than this one, that have `base` in their command line or environment."""
    found = []
    for process in all_processes():
        # A zombie has neither environment nor command line.
        with contextlib.suppress(psutil.Error, OSError):
            words = [*process.environ().values(), *process.cmdline()]
            if process.pid != os.getpid() and any(str(base) in word for word in words):
                found.append(process)
    return found


def main_processes(base: Path) -> dict[int, list[str]]:
    """Return the command lines of `processes_of(base)` by pid, without the children of a browser."""
    found = {}
    for process in processes_of(base):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = process.cmdline()
            ancestors = [word for parent in process.parents() for word in parent.cmdline()]
            # The crash handler is no child of the browser.
            if not any(word.startswith("--user-data-dir=") for word in ancestors) and "crashpad" not in " ".join(line):
                found[process.pid] = line
    return found


# The command `harness-browser`, with warnings as errors.
COMMAND = [sys.executable, "-W", "error", "-m", "harness_ipc.browser.cli"]


def harness_browser(*arguments: str, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in UTF-8."""
    command = [*COMMAND, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", timeout=PATIENCE, **options)


def kill(pid: int) -> None:
    """Kill the process, and wait until it has ended."""
    psutil.Process(pid).kill()
    wait_until(lambda: not lives(pid))


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Suspend the process while the context is entered. It may end meanwhile."""
    process = psutil.Process(pid)
    process.suspend()
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def end_all(base: Path) -> None:
    """Stop the daemon, and fail if anything of it or of its browser is left."""
    from harness_ipc.browser.launcher import ManagedBrowser

    helpers.disconnect()
    if (base / "run").is_dir():
        for record in (base / "run").glob("*.lock"):
            stop_daemon(record.stem)
    ManagedBrowser("browser").end()
    wait_until(lambda: not processes_of(base))


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    served = Site()
    yield served
    served.close()


@pytest.fixture
def slow(site: Site) -> Iterator[Site]:
    """The site. Its slow paths are answered when the test sets `release`, or at the end of the test."""
    site.paths.clear()
    yield site
    released, site.release = site.release, threading.Event()
    released.set()


# Chromium's default profile, relative to the home directory.
USUAL = {"win32": "AppData/Local/Chromium/User Data", "darwin": "Library/Application Support/Chromium"}.get(
    sys.platform, ".config/chromium"
)


@pytest.fixture
def active_port(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of DevToolsActivePort in the user's default profile; the file does not exist yet.

    The usual ports are not checked, and a managed browser is not required.
    """
    from harness_ipc.browser import discovery

    usual = fresh / "home" / USUAL
    usual.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(fresh / "home"))
    monkeypatch.setenv("USERPROFILE", str(fresh / "home"))
    for variable in ("HARNESS_CHROME_OWN", "HARNESS_CHROME_PROFILE"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_DATA_HOME", str(fresh / "data"))
    # A browser of this machine may use them.
    monkeypatch.setattr(discovery, "PORTS", ())
    return usual / "DevToolsActivePort"


class Pair(NamedTuple):
    """A daemon and its browser: their directory and their pids."""

    base: Path
    daemon: int
    browser: int


def pids(name: str = "browser") -> tuple[int, int]:
    """Return the pids of the daemon and of its browser."""
    with connect_daemon(name) as client:
        return client.pid, client.request({"meta": "connection_status"})["pid"]


def is_whole(base: Path) -> bool:
    """Return whether a daemon and its browser run below `base`, with the settings of `use`, and nothing else."""
    with contextlib.suppress(HarnessIPCError, psutil.Error):
        daemon, browser = pids()
        settings = psutil.Process(daemon).environ()
        is_as_used = all(settings.get(variable) == os.environ.get(variable) for variable in VARIABLES)
        return is_as_used and main_processes(base).keys() == {daemon, browser}
    return False


def close_tabs() -> None:
    """Close all tabs. The daemon opens another when it needs one."""
    for tab in open_tabs():
        helpers.close_tab(tab)
    helpers.disconnect()


@pytest.fixture(scope="session")
def worker_browser() -> Iterator[Path]:
    """The directory of a daemon and its browser for the tests of a worker."""
    with tempfile.TemporaryDirectory(prefix="hb-") as directory, pytest.MonkeyPatch.context() as patch:
        yield Path(directory)
        # Not before: other processes of the worker would have the directory in their environment.
        use(patch, Path(directory))
        end_all(Path(directory))


@pytest.fixture(scope="module")
def shared_browser(worker_browser: Path, site: Site) -> Path:
    """The directory of the shared daemon. What other modules have stored in its browser is removed."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, worker_browser)
        if not is_whole(worker_browser):
            end_all(worker_browser)
        helpers.disconnect()
        for origin in (site.url, site.other_url):
            helpers.cdp("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        helpers.cdp("Network.clearBrowserCache")
        close_tabs()
    return worker_browser


@pytest.fixture(scope="session")
def shared_tab() -> SharedTab:
    return SharedTab()


@pytest.fixture
def warm(shared_browser: Path, shared_tab: SharedTab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the shared daemon. This process and its children use that daemon, in whatever tabs there are."""
    use(monkeypatch, shared_browser)
    shared_tab.target = ""
    helpers.disconnect()
    yield shared_browser
    helpers.disconnect()


@pytest.fixture
def page(shared_browser: Path, shared_tab: SharedTab, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The targetId of a new tab, the only one of the shared browser. It is the current tab of this process."""
    use(monkeypatch, shared_browser)
    with shared_tab.entered() as target:
        yield target


@pytest.fixture
def empty_page(shared_browser: Path, shared_tab: SharedTab, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `page`, for tests that change nothing in the empty document: another may have run in the tab."""
    use(monkeypatch, shared_browser)
    with shared_tab.entered(empty_state) as target:
        yield target


@pytest.fixture
def used_page(shared_browser: Path, shared_tab: SharedTab, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `page`, for tests that begin with a `visit`: another may have visited a page in the tab, and used the mouse.

    A test must not end before its navigations and requests.
    """
    use(monkeypatch, shared_browser)
    with shared_tab.entered(view_state) as target:
        yield target


@pytest.fixture
def killable(warm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """The shared daemon and its browser, in an empty tab. A test may end them, and start others with the same environment."""
    close_tabs()
    helpers.page_info()
    helpers.disconnect()
    yield Pair(warm, *pids())
    use(monkeypatch, warm)
    helpers.disconnect()
    if is_whole(warm):
        close_tabs()
    else:
        end_all(warm)


@pytest.fixture(scope="session")
def browsers_of_others() -> Iterator[Callable[[], OtherBrowser]]:
    """A function that returns the shared browser of `other`. It starts one if there is none."""
    from tests.browser.others import other_browser

    browser: OtherBrowser | None = None
    # Without directories of the test that starts it, which are removed, and of the shared daemon, whose process it is not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HARNESS_")}
    with tempfile.TemporaryDirectory(prefix="ho-") as directory, contextlib.ExitStack() as stack:

        def get() -> OtherBrowser:
            nonlocal browser
            if browser is None or browser.process.poll() is not None:
                with pytest.MonkeyPatch.context() as patch:
                    use(patch, Path(directory))
                    browser = stack.enter_context(other_browser(Path(directory), env=environment | {"TMPDIR": directory}))
            return browser

        yield get


@pytest.fixture
def other(browsers_of_others: Callable[[], OtherBrowser]) -> Iterator[OtherBrowser]:
    """A browser that no daemon has started, with one empty tab; shared by the tests of a worker. It may not be killed."""
    browser = browsers_of_others()
    browser.close_tabs()
    yield browser
    assert browser.process.poll() is None


@pytest.fixture
def attached(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory without processes, like `fresh`. Daemons there attach to the browser `other`."""
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    return fresh


@pytest.fixture
def fresh(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new directory for daemon and browser. They are stopped at the end; a process that is left fails the test."""
    use(monkeypatch, private_directories)
    helpers.disconnect()
    try:
        yield private_directories
    finally:
        end_all(private_directories)
