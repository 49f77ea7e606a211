"""What the page looks like: a picture as bytes, or in a file."""

from __future__ import annotations

import binascii

from . import TIMEOUT
from ._files import replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

    from .tab import Tab


def capture_screenshot(
    tab: Tab, path: str | os.PathLike[str] | None = None, full: bool = False, *, timeout: float = TIMEOUT
) -> Any:
    """Take a PNG of the viewport, or of the `full` page. Return its bytes, or the `path` it was written to.

    The file is written beside it under a name that nobody can guess, private until it is complete, and renamed. It keeps the
    mode of the file of yours that it replaces; a new one gets what the umask leaves of 0666. A symbolic link is replaced, not
    followed. Raises `OSError` if the file can't be written; what was there before is then still there.
    """
    params: dict[str, Any] = {"format": "png"}
    if full:
        size = tab.cdp("Page.getLayoutMetrics", timeout=timeout)["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        params |= {"captureBeyondViewport": True, "clip": clip}
    data = binascii.a2b_base64(tab.cdp("Page.captureScreenshot", timeout=timeout, **params)["data"])
    if path is None:
        return data
    replace_file(path, data)
    return path
