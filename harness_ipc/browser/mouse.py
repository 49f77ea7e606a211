"""The mouse: clicks and the wheel at a point of the viewport."""

from __future__ import annotations

from . import TIMEOUT
from .arguments import check_kind, check_number, shown
from .dialogs import may_open_dialog
from .errors import DialogOpen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .tab import Tab

_BUTTONS = ("left", "middle", "right", "back", "forward")


def click_at_xy(tab: Tab, x: float, y: float, button: str = "left", clicks: int = 1, *, timeout: float = TIMEOUT) -> None:
    """Click at a point of the viewport, in CSS pixels. `button` is left, middle or right; two `clicks` are a double click."""
    _check_place("click_at_xy", x=x, y=y)
    if button not in _BUTTONS:
        raise ValueError(f"click_at_xy(): button must be {', '.join(_BUTTONS)}, not {shown(button)}")
    check_kind("click_at_xy", "clicks", clicks, int, "a number of clicks")
    try:
        move(tab, x, y, timeout)
    except DialogOpen as error:
        # The dialog opened before the click.
        raise DialogOpen(str(error), dialog=error.dialog, ran=False) from None
    with may_open_dialog():
        for count in range(1, clicks + 1):
            _mouse(tab, "mousePressed", x, y, timeout, button=button, clickCount=count)
            _mouse(tab, "mouseReleased", x, y, timeout, button=button, clickCount=count)


def scroll(tab: Tab, x: float, y: float, dy: float = -300, dx: float = 0, *, timeout: float = TIMEOUT) -> None:
    """Turn the mouse wheel at a point of the viewport: `dy` CSS pixels down (negative: up), `dx` to the right."""
    _check_place("scroll", x=x, y=y, dy=dy, dx=dx)
    with may_open_dialog():
        _mouse(tab, "mouseWheel", x, y, timeout, deltaX=dx, deltaY=dy)


def move(tab: Tab, x: float, y: float, timeout: float) -> None:
    """Move the mouse to a point of the viewport."""
    _mouse(tab, "mouseMoved", x, y, timeout)


def _check_place(helper: str, **values: Any) -> None:
    for name, value in values.items():
        check_number(helper, name, value, "a number of CSS pixels")


def _mouse(tab: Tab, kind: str, x: float, y: float, timeout: float, **params: Any) -> None:
    tab.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, timeout=timeout, **params)
