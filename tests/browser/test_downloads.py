"""Downloads of a page in a real browser: names, folders, and downloads that no helper waits for."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from harness_ipc.browser.helpers import BrowserTimeout, drain_events, js, list_tabs, new_tab, switch_tab, wait_for_download
from tests.browser.others import OtherBrowser
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE, wait_until

pytestmark = needs_chromium


def save(name: str, url: str = "data:application/octet-stream,bytes") -> None:
    """Have the page click a link that is a download."""
    js(f"{{const link = document.createElement('a'); link.href = {url!r}; link.download = {name!r}; link.click()}}")


def test_a_download_is_saved_under_its_name(page: str, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/")
    with wait_for_download(tmp_path, timeout=PATIENCE) as download:
        save("report.csv")
    assert (download.path, download.name) == (str(tmp_path / "report.csv"), "report.csv")
    assert download.url.startswith("data:")
    assert (tmp_path / "report.csv").read_text() == "bytes"
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "report.csv").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["report.csv"]


def test_a_file_that_is_there_is_kept(page: str, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/")
    (tmp_path / "a.txt").write_text("mine")
    names = []
    for _ in range(2):
        with wait_for_download(str(tmp_path), timeout=PATIENCE) as download:
            save("a.txt")
        names.append(os.path.basename(download.path))
    assert names == ["a (1).txt", "a (2).txt"]
    assert (tmp_path / "a.txt").read_text() == "mine"


def test_a_name_does_not_lead_out_of_the_folder(page: str, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/")
    folder = tmp_path / "folder"
    folder.mkdir()
    with wait_for_download(folder, timeout=PATIENCE) as download:
        save("../../evil.txt")
    assert os.path.dirname(download.path) == str(folder)
    assert os.listdir(tmp_path) == ["folder"]


def test_tabs_have_downloads_of_their_own(page: str, site: Site, tmp_path: Path) -> None:
    """A download in another tab, which no helper waits for, is denied as before."""
    visit(f"{site.url}/")
    new_tab(f"{site.url}/")
    other = next(tab for tab in list_tabs() if tab["targetId"] != page)
    switch_tab(page)
    with wait_for_download(tmp_path, timeout=PATIENCE) as download:
        switch_tab(other)
        save("theirs.txt")
        switch_tab(page)
        save("mine.txt")
    assert os.path.basename(download.path) == "mine.txt"
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_download_of_an_isolated_tab(page: str, site: Site, tmp_path: Path) -> None:
    new_tab(f"{site.url}/", isolated=True)
    with wait_for_download(tmp_path, timeout=PATIENCE):
        save("report.csv")
    assert os.listdir(tmp_path) == ["report.csv"]


def test_nothing_is_left_and_nothing_stays_allowed(page: str, shared_browser: Path, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/")
    with (
        pytest.raises(BrowserTimeout, match=r"^no download has begun within 0\.3 s$"),
        wait_for_download(tmp_path, timeout=0.3),
    ):
        pass
    with pytest.raises(ZeroDivisionError), wait_for_download(tmp_path, timeout=PATIENCE):
        raise ZeroDivisionError
    with wait_for_download(tmp_path, timeout=PATIENCE):
        save("seen.txt")
    assert os.listdir(tmp_path) == ["seen.txt"]
    wait_until(lambda: not (shared_browser / "profile" / "Harness downloads").exists())
    drain_events()
    save("denied.txt")
    states: list[str] = []

    def is_denied() -> bool:
        events = [event for event in drain_events() if event["method"] == "Page.downloadProgress"]
        states.extend(event["params"]["state"] for event in events)
        return "canceled" in states

    wait_until(is_denied)
    assert "completed" not in states


def test_a_download_that_does_not_end(page: str, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/")
    with (
        pytest.raises(BrowserTimeout, match=r"^the download of 'late\.txt' has not ended within 1 s$"),
        wait_for_download(tmp_path, timeout=1),
    ):
        save("late.txt", f"{site.url}/endless")
    assert os.listdir(tmp_path) == []


def test_the_folder_of_the_variable(page: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visit(f"{site.url}/")
    with pytest.raises(ValueError, match=r"^wait_for_download\(\): name the folder, or set HARNESS_CHROME_DOWNLOADS$"):
        wait_for_download()
    with monkeypatch.context() as patch:
        patch.setenv("HARNESS_CHROME_DOWNLOADS", str(tmp_path))
        with wait_for_download(timeout=PATIENCE) as download:
            save("here.txt")
    assert download.path == str(tmp_path / "here.txt")


def test_arguments_that_can_not_be_used(tmp_path: Path) -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match=r"^wait_for_download\(\): folder must be the path of a folder, not int: 5$"):
        wait_for_download(wrong)
    with pytest.raises(FileNotFoundError, match="there is no such folder: create it first"):
        wait_for_download(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="in a with statement"):
        _ = wait_for_download(tmp_path).path


@pytest.mark.usefixtures("attached")
def test_a_download_of_an_external_browser(other: OtherBrowser, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/")
    with wait_for_download(tmp_path, timeout=PATIENCE) as download:
        save("report.csv")
    assert (tmp_path / "report.csv").read_text() == "bytes"
    assert download.path == str(tmp_path / "report.csv")
    assert os.listdir(tmp_path) == ["report.csv"]
    assert other.process.poll() is None
