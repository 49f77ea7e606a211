"""Screenshots of the viewport or the whole page, and PDFs."""

from __future__ import annotations

import binascii
import contextlib

from . import TIMEOUT, png
from ._files import replace_file
from .arguments import check_kind, check_path
from .errors import BrowserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

    from .tab import Tab

    Path = str | os.PathLike[str]

# Device pixels: the longest side of a surface that all GPUs support. Chrome repeats the picture beyond it.
_LONGEST_SIDE = 16_384

_VIEWPORT = "({x: scrollX, y: scrollY, width: innerWidth, height: innerHeight, ratio: devicePixelRatio})"
# A capture beyond the viewport removes the scrollbars, lays the page out wider, and in Chromium 156 does not restore them. So
# they are hidden before, with the width of the page fixed. The capture causes a resize event; another one at the end restores
# the layout of scripts.
_HIDE_SCROLLBARS = """(() => {
  const root = document.documentElement, key = Symbol.for("harness-browser screenshot");
  const size = {width: root.scrollWidth, height: root.scrollHeight, ratio: devicePixelRatio};
  if (!(root instanceof HTMLHtmlElement) || (innerWidth == root.clientWidth && innerHeight == root.clientHeight)) return size;
  const {width, height, marginLeft} = getComputedStyle(root), sheet = new CSSStyleSheet();
  sheet.replaceSync(`html {scrollbar-width: none !important; width: ${width} !important; height: ${height} !important;
    margin-left: ${marginLeft} !important}`);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  window[key] = () => {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter(other => other !== sheet);
    delete window[key];
    dispatchEvent(new Event("resize"));
  };
  return size;
})()"""
_SHOW_SCROLLBARS = "window[Symbol.for('harness-browser screenshot')]?.()"


class Picture(bytes):
    """The bytes of an image or a document, with a short repr. View it with `path` or `show()`."""

    _suffix = ""
    _path: str | None = None

    @property
    def bytes(self) -> bytes:
        """The content as plain bytes."""
        return bytes(self)

    @property
    def path(self) -> str:
        """The path of a private file with the content, created on first access and not removed."""
        if self._path is None:
            import tempfile

            number, path = tempfile.mkstemp(prefix="harness-browser-", suffix=self._suffix)
            with open(number, "wb") as file:
                file.write(self)
            self._path = path
        return self._path

    def show(self) -> None:
        """Open it in the system's viewer. Raises `OSError` if there is none."""
        import webbrowser
        from urllib.request import pathname2url

        if not webbrowser.open(f"file:{pathname2url(self.path)}"):
            raise OSError(f"this system has no program that shows it: open {self.path} yourself")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {len(self)} bytes>"

    __str__ = __repr__


class Screenshot(Picture):
    """The bytes of a PNG."""

    _suffix = ".png"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return png.size(self)

    def __repr__(self) -> str:
        width, height = self.size
        return f"<Screenshot {width}x{height}, {len(self)} bytes>"

    __str__ = __repr__


class PDF(Picture):
    """The bytes of a PDF."""

    _suffix = ".pdf"


def capture_screenshot(
    tab: Tab, path: Path | None = None, full: bool = False, max_dim: int | None = None, *, timeout: float = TIMEOUT
) -> Any:
    """Take a PNG of the viewport, or of the `full` page. Return it as a `Screenshot`, or the `path` it was written to.

    Clicks use CSS pixels: divide coordinates in the picture by ``devicePixelRatio``. `max_dim` limits the longer side, in
    pixels. A full screenshot leaves the page as it was; Chrome may lay it out for 1x1 pixels meanwhile, which its scripts see.

    The file is private (0600), or keeps the mode of your file that it replaces. It is written under an unguessable name and
    renamed; a symbolic link is replaced, not followed. Raises `OSError` if the file can't be written; an existing file is
    unchanged then.
    """
    check_path("capture_screenshot", path)
    check_kind("capture_screenshot", "full", full, bool, "True or False")
    if max_dim is not None:
        check_kind("capture_screenshot", "max_dim", max_dim, int, "a number of pixels")
        if max_dim < 1:
            raise ValueError(f"capture_screenshot(): max_dim must be a number of pixels from 1 on, not {max_dim}")
    picture = Screenshot(_capture_full(tab, max_dim, timeout) if full else _capture_viewport(tab, max_dim, timeout))
    if path is None:
        return picture
    replace_file(path, picture)
    return path


def print_pdf(
    tab: Tab,
    /,
    path: Path | None = None,
    *,
    landscape: bool = False,
    background: bool = True,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Any:
    """Print the page as a PDF. Return it as a `PDF`, bytes with a short repr, or the `path` it was written to.

    ```python
    print_pdf("page.pdf", paperWidth=8.27, paperHeight=11.69, pageRanges="1-2")
    ```

    `background` includes background colors and images. `options` are further parameters of Page.printToPDF in CDP; lengths are
    in inches. Raises `OSError` like `capture_screenshot`, and `CDPError` for an invalid option.
    """
    check_path("print_pdf", path)
    params = {"landscape": landscape, "printBackground": background, **options}
    printed = PDF(binascii.a2b_base64(tab.cdp("Page.printToPDF", timeout=timeout, **params)["data"]))
    if path is None:
        return printed
    replace_file(path, printed)
    return path


def _capture_viewport(tab: Tab, max_dim: int | None, timeout: float) -> bytes:
    if max_dim is None:
        return _capture(tab, timeout)
    clip = tab.js(_VIEWPORT, timeout=timeout)
    scale = _scale(clip, max_dim)
    return _capture(tab, timeout, **({"clip": {**clip, "scale": scale}} if scale < 1 else {}))


def _capture_full(tab: Tab, max_dim: int | None, timeout: float) -> bytes:
    try:
        size = tab.js(_HIDE_SCROLLBARS, timeout=timeout)
        scale = _scale(size, max_dim)
        # A multiple of 8 gives whole device pixels even for a ratio of 1.25 or 1.5.
        step = max(int(_LONGEST_SIDE / size["ratio"] / scale) // 8, 1) * 8
        pictures = []
        for top in range(0, max(size["height"], 1), step):
            clip = {"x": 0, "y": top, "width": size["width"], "height": min(step, size["height"] - top), "scale": scale}
            pictures.append(_capture(tab, timeout, captureBeyondViewport=True, clip=clip))
    finally:
        # The page may be gone, or blocked by a dialog.
        with contextlib.suppress(BrowserError):
            tab.js(_SHOW_SCROLLBARS, timeout=timeout)
    return pictures[0] if len(pictures) == 1 else png.join(pictures)


def _scale(size: dict[str, Any], max_dim: int | None) -> float:
    return 1.0 if max_dim is None else min(1.0, max_dim / max(size["width"], size["height"]) / size["ratio"])


def _capture(tab: Tab, timeout: float, **params: Any) -> bytes:
    return binascii.a2b_base64(tab.cdp("Page.captureScreenshot", timeout=timeout, format="png", **params)["data"])
