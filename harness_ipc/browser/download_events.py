"""Downloads, in the daemon: allowed while a client waits for one, and reported to the client of their tab."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from typing import TYPE_CHECKING

from ._files import move_file
from .errors import BrowserError
from .part import Part
from .program import download_behavior

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from .daemon import BrowserApp
    from .part import Message, Stream

logger = logging.getLogger(__name__)


class DownloadEvents(Part):
    """A stream of the downloads of a tab. While it is open, a managed browser saves them in its profile, named by guid."""

    def __init__(self, app: BrowserApp) -> None:
        super().__init__(app)
        # By tab: the waiting clients, in order.
        self._waiting: dict[str, list[asyncio.Queue[Message]]] = {}
        # By browser context: the number of waiting clients.
        self._contexts: dict[str, int] = {}
        # By guid: tab, name, url.
        self._running: dict[str, Message] = {}

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The start and the end of each download of a tab."""
        return {"downloads": self._stream}

    async def _stream(self, params: Message) -> AsyncIterator[Message]:
        session = await self.app.sessions.session_for(params.get("session_id"))
        target = self.app.sessions.target_of(session)
        info = await self.app.connection.call("Target.getTargetInfo", {"targetId": target})
        context = info["targetInfo"].get("browserContextId", "")
        queue: asyncio.Queue[Message] = asyncio.Queue()
        self._contexts[context] = self._contexts.get(context, 0) + 1
        self._waiting.setdefault(target, []).append(queue)
        try:
            await self._allow(context)
            yield {"state": "ready"}
            while True:
                yield await queue.get()
        finally:
            self._waiting[target].remove(queue)
            if not self._waiting[target]:
                del self._waiting[target]
            self._contexts[context] -= 1
            if not self._contexts[context]:
                del self._contexts[context]
                with contextlib.suppress(BrowserError):
                    await self._restore(context)

    @property
    def _folder(self) -> str | None:
        """Where a managed browser saves downloads that a client waits for."""
        return None if self.app.own_browser is None else os.path.join(self.app.own_browser.profile, "Harness downloads")

    async def _allow(self, context: str) -> None:
        # A browser that is not managed keeps the settings of its user.
        params: Message = {"behavior": "default"}
        if (folder := self._folder) is not None:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            params = {"behavior": "allowAndName", "downloadPath": folder}
        await self._set(context, {**params, "eventsEnabled": True})

    async def _restore(self, context: str) -> None:
        if (folder := self._folder) is None:
            await self._set(context, {"behavior": "default", "eventsEnabled": False})
            return
        await self._set(context, {**download_behavior(), "eventsEnabled": False})
        # Not in a thread: no download may start meanwhile.
        if not self._contexts:
            shutil.rmtree(folder, ignore_errors=True)

    async def _set(self, context: str, params: Message) -> None:
        if context:
            params["browserContextId"] = context
        await self.app.connection.call("Browser.setDownloadBehavior", params, outlasting=True)

    def on_event(self, method: str, params: Message, session: str | None) -> None:
        """Record a download that starts, and report its end to the waiting client."""
        if method == "Page.downloadWillBegin" and self._contexts:
            target = self.app.sessions.target_of(session)
            download = {"name": params.get("suggestedFilename", ""), "url": params.get("url", ""), "guid": params.get("guid")}
            if (queue := self._queue(target)) is not None:
                queue.put_nowait({**download, "state": "begun"})
            elif self._folder is not None and download_behavior()["behavior"] == "deny":
                self.start(self._cancel(download["guid"]))
                return
            self._running[str(download["guid"])] = {**download, "target": target}
        elif method == "Browser.downloadProgress" and params.get("state") in ("completed", "canceled"):
            ended = self._running.pop(str(params.get("guid")), None)
            if ended is not None:
                path = params.get("filePath") or os.path.join(self._folder or "", ended["guid"])
                self._end(ended.pop("target"), {**ended, "state": params["state"], "path": path})

    def on_lost(self) -> None:
        """Forget the downloads of the browser that was lost."""
        self._running.clear()

    def _queue(self, target: str) -> asyncio.Queue[Message] | None:
        waiting = self._waiting.get(target)
        return waiting[0] if waiting else None

    def _end(self, target: str, download: Message) -> None:
        if (queue := self._queue(target)) is not None:
            queue.put_nowait(download)
        elif download["state"] == "completed" and self._folder is not None:
            folder = download_behavior().get("downloadPath")
            if folder is not None:
                self.start(self._move(download, folder))

    async def _move(self, download: Message, folder: str) -> None:
        try:
            await asyncio.to_thread(move_file, download["path"], folder, download["name"])
        except OSError as error:
            logger.warning("a download can't be moved to %s: %s", folder, error.strerror)

    async def _cancel(self, guid: str) -> None:
        with contextlib.suppress(BrowserError):
            await self.app.connection.call("Browser.cancelDownload", {"guid": guid})
