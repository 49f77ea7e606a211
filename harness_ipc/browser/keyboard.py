"""The keyboard: keys by their names, and text that is inserted."""

from __future__ import annotations

import sys

from . import TIMEOUT
from .dialogs import may_open_dialog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .tab import Tab

# The bits of CDP's `modifiers` that make a key type nothing.
_ALT, _CONTROL, _META = 1, 2, 4
# Key to (windowsVirtualKeyCode, text that it types). The code of each is its name.
_KEYS = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Backspace": (8, ""),
    "Escape": (27, ""),
    "Delete": (46, ""),
    "Insert": (45, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "PageUp": (33, ""),
    "PageDown": (34, ""),
    **{f"F{number}": (111 + number, "") for number in range(1, 13)},
    "Space": (32, " "),
}
# On macOS the browser leaves these to the menu, which has to be told (Input.dispatchKeyEvent's `commands`).
_COMMANDS = {"a": "selectAll", "c": "copy", "v": "paste", "x": "cut", "z": "undo"}


def type_text(tab: Tab, text: str, *, timeout: float = TIMEOUT) -> None:
    """Insert text where the focus is, as a paste does: no key events (see `press_key`)."""
    with may_open_dialog():
        tab.cdp("Input.insertText", text=text, timeout=timeout)


def press_key(tab: Tab, key: str, modifiers: int = 0, *, timeout: float = TIMEOUT) -> None:
    """Press and release a key: a character, or a name such as Enter, Tab, Escape, Backspace, ArrowDown, PageUp or F5.

    `modifiers` is the sum of 1 for Alt, 2 for Ctrl, 4 for Meta (Cmd) and 8 for Shift. Raises `ValueError` for an unknown name.
    """
    name = "Space" if key == " " else key
    if name in _KEYS:
        code, (number, text) = name, _KEYS[name]
        key = " " if name == "Space" else key
    elif len(key) == 1:
        number, text, code = 0, key, ""
        if key.isascii() and key.isalnum():
            number = ord(key.upper())
            code = f"Digit{key}" if key.isdigit() else f"Key{key.upper()}"
    else:
        raise ValueError(f"there is no key {key!a}: give one character, or one of {', '.join(_KEYS)}")
    event: dict[str, Any] = {"key": key, "code": code, "modifiers": modifiers}
    event |= {"windowsVirtualKeyCode": number, "nativeVirtualKeyCode": number}
    down: dict[str, Any] = {"type": "rawKeyDown"}
    if text and not modifiers & (_ALT | _CONTROL | _META):
        down = {"type": "keyDown", "text": text}
    elif sys.platform == "darwin" and modifiers & _META and key in _COMMANDS:
        down["commands"] = [_COMMANDS[key]]
    with may_open_dialog():
        tab.cdp("Input.dispatchKeyEvent", **event, **down, timeout=timeout)
        tab.cdp("Input.dispatchKeyEvent", **event, type="keyUp", timeout=timeout)
