"""Screenshots and PDFs of a page in a real browser: their content, files, and effects on the page."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from harness_ipc.browser.helpers import CDPError, capture_screenshot, cdp, js, print_pdf
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium, needs_posix
from tests.support.processes import PATIENCE

pytestmark = needs_chromium

RED, GREEN = (200, 0, 0), (0, 200, 0)
# Wait until the page is rendered: two frames.
SETTLED = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def left_edge(picture: bytes) -> list[tuple[int, ...]]:
    """Return the color of the first pixel of each row. Filters of PNG make it depend only on the one above it."""
    width, _ = struct.unpack_from(">II", picture, 16)
    pixel = {2: 3, 6: 4}[picture[25]]
    place, data = 8, b""
    while place < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, place)
        data += picture[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    rows, above = zlib.decompress(data), bytes(pixel)
    colors = []
    for start in range(0, len(rows), 1 + width * pixel):
        kind, values = rows[start], rows[start + 1 : start + 1 + pixel]
        share = {0: 0, 1: 0, 2: 2, 3: 1, 4: 2}[kind]
        above = bytes((value + up * share // 2) & 0xFF for value, up in zip(values, above, strict=True))
        colors.append(tuple(above[:3]))
    return colors


@pytest.fixture
def tall(used_page: str, site: Site) -> Site:
    """The tall page, scrolled, with scrollbars. Its recorded events are cleared."""
    visit(f"{site.url}/tall")
    js(f"scrollTo(0, 300); box.scrollTop = 40; {SETTLED}; seen.length = 0")
    return site


def state() -> Any:
    return js(f"{SETTLED}; [layout(), seen, document.adoptedStyleSheets.length, root.outerHTML]")


@pytest.mark.parametrize("options", [{}, {"max_dim": 500}, {"full": True}, {"full": True, "max_dim": 500}])
def test_a_screenshot_leaves_the_page_as_it_was(tall: Site, options: dict[str, Any]) -> None:
    before, picture = state(), capture_screenshot()
    assert js("innerWidth > document.documentElement.clientWidth"), "without a scrollbar, nothing is shown"
    capture_screenshot(**options)
    after = state()
    if "full" in options:
        # On a busy machine, Chrome 156 may render a frame of 1x1 pixels during the capture, which a page's observers see.
        after[1] = [event for event in after[1] if event != "other size"]
    assert after == before
    assert capture_screenshot() == picture


def test_a_full_screenshot_shows_the_page_as_it_is_laid_out(tall: Site) -> None:
    width, height, first = js("[document.documentElement.scrollWidth, document.documentElement.scrollHeight, innerHeight]")
    picture = capture_screenshot(full=True)
    assert picture.size == (width, height)
    assert left_edge(picture)[: first + 1000] == [RED] * first + [GREEN] * 1000


@pytest.mark.parametrize("ratio", [1, 2, 1.5])
def test_max_dim_limits_the_longer_side(page: str, site: Site, ratio: float) -> None:
    cdp("Emulation.setDeviceMetricsOverride", width=800, height=600, deviceScaleFactor=ratio, mobile=False)
    visit(f"{site.url}/tall")
    js("scrollTo(0, 300)")
    natural = (800 * ratio, 600 * ratio)
    for longest in (5000, int(800 * ratio), 777, 100):
        width, height = capture_screenshot(max_dim=longest).size
        assert width == min(longest, natural[0])
        assert abs(height - width * 3 / 4) <= 1
    assert left_edge(capture_screenshot(max_dim=400))[:310] == [RED] * 150 + [GREEN] * 150
    assert max(capture_screenshot(full=True, max_dim=777).size) == 777


@pytest.mark.parametrize("ratio", [1, 2])
def test_a_page_that_is_higher_than_a_surface_of_the_gpu(page: str, site: Site, ratio: int) -> None:
    cdp("Emulation.setDeviceMetricsOverride", width=100, height=600, deviceScaleFactor=ratio, mobile=False)
    visit(f"{site.url}/")
    colors = [[number * 10, 255 - number * 10, 90] for number in range(20)]
    js(f"document.body.style.margin = 0; document.body.innerHTML = {colors}.map(c => `<div style='height: 1000px; "
       "background: rgb(${c})'></div>`).join('')")  # fmt: skip
    picture = capture_screenshot(full=True, timeout=PATIENCE)
    assert picture.size[1] == 20_000 * ratio
    assert left_edge(picture) == [tuple(color) for color in colors for _ in range(1000 * ratio)]


def test_the_picture_in_a_terminal_is_one_line(page: str) -> None:
    cdp("Emulation.setDeviceMetricsOverride", width=80, height=60, deviceScaleFactor=1, mobile=False)
    picture = capture_screenshot()
    assert isinstance(picture, bytes)
    assert repr(picture) == str(picture) == f"<Screenshot 80x60, {len(picture)} bytes>"
    assert type(picture.bytes) is bytes  # type: ignore[attr-defined]
    assert picture.bytes == picture  # type: ignore[attr-defined]


def test_the_picture_has_a_private_file_when_it_is_asked_for(empty_page: str) -> None:
    picture = capture_screenshot()
    path = Path(picture.path)
    assert picture.path == str(path)
    assert (path.suffix, path.read_bytes()) == (".png", picture)
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()


@needs_posix
def test_a_picture_is_shown(empty_page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import webbrowser

    shown: list[str] = []

    def show(url: str) -> bool:
        shown.append(url)
        return len(shown) == 1

    monkeypatch.setattr(webbrowser, "open", show)
    picture = capture_screenshot()
    picture.show()
    with pytest.raises(OSError, match=r"no program that shows it: open .*\.png yourself"):
        picture.show()
    assert {urlsplit(url).path for url in shown} == {picture.path}
    os.unlink(picture.path)


@needs_posix
def test_files_are_private(empty_page: str, tmp_path: Path) -> None:
    for path in (capture_screenshot(tmp_path / "shot.png"), print_pdf(tmp_path / "page.pdf")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_pdf_of_the_page(used_page: str, site: Site, tmp_path: Path) -> None:
    visit(f"{site.url}/tall")
    printed = print_pdf()
    assert printed.startswith(b"%PDF-")
    assert repr(printed) == f"<PDF, {len(printed)} bytes>"
    assert b"/Count 2" in print_pdf(pageRanges="1-2")
    assert print_pdf(tmp_path / "page.pdf", landscape=True, background=False) == tmp_path / "page.pdf"
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    with pytest.raises(CDPError, match=r"Page\.printToPDF"):
        print_pdf(pageRanges="nine")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"path": 5}, "path must be the path of a file, not int: 5"),
        ({"full": "yes"}, "full must be True or False, not str: 'yes'"),
        ({"max_dim": "800"}, "max_dim must be a number of pixels, not str: '800'"),
        ({"max_dim": 0}, "max_dim must be a number of pixels from 1 on, not 0"),
    ],
)
def test_an_argument_that_can_not_be_used(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        capture_screenshot(**arguments)
    assert str(caught.value) == f"capture_screenshot(): {text}"


@pytest.mark.parametrize("helper", [capture_screenshot, print_pdf])
def test_a_folder_that_does_not_exist(tmp_path: Path, helper: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"\(\): there is no folder .*nowhere: create it first") as caught:
        helper(tmp_path / "nowhere" / "file")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
