"""The requests of a page that are under way, as the browser's events tell them. Pure: it asks no browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .part import Changing

if TYPE_CHECKING:
    from .part import Message

# They stay open for as long as the page likes, or nothing in the page waits for them. (A WebSocket has events of its own.)
_NOT_COUNTED = {"EventSource", "Ping", "WebSocket"}


class Requests(Changing):
    """The requests of one session that have no answer yet. They change with each that begins or ends."""

    def __init__(self) -> None:
        super().__init__()
        # By number: the frame and the loader that it is of.
        self.pending: dict[str, tuple[str | None, str | None]] = {}

    def on_event(self, event: str, params: Message) -> None:
        """Take note of an event of the domain Network."""
        if event == "requestWillBeSent":
            if params.get("type") not in _NOT_COUNTED:
                self.pending[params["requestId"]] = params.get("frameId"), params.get("loaderId")
                self.notify()
        elif event in ("loadingFinished", "loadingFailed") and self.pending.pop(params["requestId"], None) is not None:
            self.notify()

    def leave_document(self, frame: str, loader: str | None = None) -> None:
        """Forget the requests of a frame that is gone, or of its documents before `loader`: not all are told to have failed."""
        for number, (of_frame, of_loader) in list(self.pending.items()):
            if of_frame == frame and (loader is None or of_loader != loader):
                del self.pending[number]
        self.notify()
