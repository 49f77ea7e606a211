"""The pending network requests of a page, from the browser's events. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .part import Changing

if TYPE_CHECKING:
    from .part import Message

# Requests that stay open, or that nothing in the page waits for. (WebSockets have other events.)
_NOT_COUNTED = {"EventSource", "Ping", "WebSocket"}


class Requests(Changing):
    """The pending requests of one session. Notifies of each start and end."""

    def __init__(self) -> None:
        super().__init__()
        # Frame and loader, by request id.
        self.pending: dict[str, tuple[str | None, str | None]] = {}

    def on_event(self, event: str, params: Message) -> None:
        """Process a Network event."""
        if event == "requestWillBeSent":
            if params.get("type") not in _NOT_COUNTED:
                self.pending[params["requestId"]] = params.get("frameId"), params.get("loaderId")
                self.notify()
        elif event in ("loadingFinished", "loadingFailed") and self.pending.pop(params["requestId"], None) is not None:
            self.notify()

    def leave_document(self, frame: str, loader: str | None = None) -> None:
        """Forget the requests of a removed frame, or of documents before `loader`: not each end has an event."""
        for number, (of_frame, of_loader) in list(self.pending.items()):
            if of_frame == frame and (loader is None or of_loader != loader):
                del self.pending[number]
        self.notify()
