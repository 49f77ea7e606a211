"""The mouse: clicks and the wheel at a place of the viewport."""

from __future__ import annotations

from . import TIMEOUT
from .dialogs import may_open_dialog
from .errors import DialogOpen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .tab import Tab


def click_at_xy(tab: Tab, x: float, y: float, button: str = "left", clicks: int = 1, *, timeout: float = TIMEOUT) -> None:
    """Click at a place of the viewport, in CSS pixels. `button` is left, middle or right; two `clicks` are a double click."""
    try:
        _mouse(tab, "mouseMoved", x, y, timeout)
    except DialogOpen as error:
        # That was not the click.
        raise DialogOpen(str(error), dialog=error.dialog, ran=False) from None
    with may_open_dialog():
        for count in range(1, clicks + 1):
            _mouse(tab, "mousePressed", x, y, timeout, button=button, clickCount=count)
            _mouse(tab, "mouseReleased", x, y, timeout, button=button, clickCount=count)


def scroll(tab: Tab, x: float, y: float, dy: float = -300, dx: float = 0, *, timeout: float = TIMEOUT) -> None:
    """Turn the mouse wheel at a place of the viewport: `dy` CSS pixels down (below 0, up), `dx` to the right."""
    with may_open_dialog():
        _mouse(tab, "mouseWheel", x, y, timeout, deltaX=dx, deltaY=dy)


def _mouse(tab: Tab, kind: str, x: float, y: float, timeout: float, **params: Any) -> None:
    tab.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, timeout=timeout, **params)
