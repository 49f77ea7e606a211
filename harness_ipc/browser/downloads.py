"""Saving downloads of a tab in a folder."""

from __future__ import annotations

import os

from . import TIMEOUT
from ._files import move_file
from .arguments import check_kind, check_seconds, shown
from .errors import BrowserError, BrowserTimeout
from .requested import DOWNLOADS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

    from .tab import Tab


class Download:
    """A download started in a ``with`` block. After the block: `path`, and the `name` and `url` given by the server."""

    def __init__(self, tab: Tab, folder: str, timeout: float) -> None:
        self._tab = tab
        self._folder = folder
        self._timeout = timeout
        self._stream: Iterator[dict[str, Any]] | None = None
        self._found: dict[str, Any] = {}

    @property
    def path(self) -> str:
        """The path of the file."""
        return str(self._get("path"))

    @property
    def name(self) -> str:
        """The name that the page or the server proposed."""
        return str(self._get("name"))

    @property
    def url(self) -> str:
        """The URL of the download."""
        return str(self._get("url"))

    def _get(self, key: str) -> Any:
        if "path" not in self._found:
            raise RuntimeError("use wait_for_download() in a with statement, and start the download in its block")
        return self._found[key]

    def __enter__(self) -> Self:
        self._stream = self._tab.stream({"meta": "downloads"}, timeout=self._timeout)
        next(self._stream)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._stream is not None
        try:
            if kind is None:
                self._found = self._save(self._wait(self._stream))
        finally:
            self._stream.close()  # type: ignore[attr-defined]

    def _wait(self, stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
        begun: str | None = None
        try:
            for item in stream:
                begun = item["name"]
                if item["state"] == "canceled":
                    raise BrowserError(f"the download of {shown(begun)} was canceled by the browser or its user")
                if item["state"] == "completed":
                    return item
        except TimeoutError:
            what = "no download has begun" if begun is None else f"the download of {shown(begun)} has not ended"
            raise BrowserTimeout(f"{what} within {self._timeout:g} s") from None
        raise BrowserError("the daemon ended during the download: see harness-browser --doctor")

    def _save(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**item, "path": move_file(item["path"], self._folder, item["name"])}
        except FileNotFoundError:
            raise BrowserError(f"the browser has saved {shown(item['path'])}, which is not on this machine") from None

    def __repr__(self) -> str:
        return f"<Download {self.path}>" if self._found else "<Download, to be used in a with statement>"


def wait_for_download(tab: Tab, folder: str | os.PathLike[str] | None = None, *, timeout: float = TIMEOUT) -> Download:
    """Save the download that is started in the block in `folder`, and wait until it is complete.

    ```python
    with wait_for_download("reports") as download:
        click("#export")
    print(download.path)
    ```

    The file gets the name given by the server, with invalid characters replaced, and numbered if it exists: ``name (1).ext``.
    Its mode is 0600. The default `folder` is ``HARNESS_CHROME_DOWNLOADS``. `timeout` in seconds applies to the start and to the
    end of the download. Raises `BrowserTimeout`, and `BrowserError` for a canceled download.
    """
    if folder is None:
        folder = os.environ.get(DOWNLOADS)
        if not folder:
            raise ValueError(f"wait_for_download(): name the folder, or set {DOWNLOADS}")
    check_kind("wait_for_download", "folder", folder, (str, os.PathLike), "the path of a folder")
    check_seconds("wait_for_download(): timeout", timeout)
    path = os.path.abspath(folder)
    if not os.path.isdir(path):
        raise FileNotFoundError(2, "wait_for_download(): there is no such folder: create it first", path)
    return Download(tab, path, timeout)
