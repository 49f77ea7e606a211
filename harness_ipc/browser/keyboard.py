"""The keyboard: keys by name, and insertion of text."""

from __future__ import annotations

import sys

from . import TIMEOUT
from .arguments import check_text, shown
from .dialogs import may_open_dialog
from .nodes import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .nodes import Target
    from .tab import Tab

    Modifiers = int | str | Iterable[str]

# The bits of `modifiers` in CDP.
_ALT, _CONTROL, _META, _SHIFT = 1, 2, 4, 8
_MODIFIERS = {
    **dict.fromkeys(("alt", "option"), _ALT),
    **dict.fromkeys(("control", "ctrl"), _CONTROL),
    **dict.fromkeys(("meta", "cmd", "command", "super", "win"), _META),
    "shift": _SHIFT,
    "controlormeta": _META if sys.platform == "darwin" else _CONTROL,
}
# Key to (windowsVirtualKeyCode, text that it types). The code of a key is its name, except for keys with a left and a right.
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
    "Shift": (16, ""),
    "Control": (17, ""),
    "Alt": (18, ""),
    "Meta": (91, ""),
}
_TWO_SIDES = ("Shift", "Control", "Alt", "Meta")
_NAMES = {
    **{name.lower(): name for name in _KEYS},
    **{name.lower().removeprefix("arrow"): name for name in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown")},
    "return": "Enter",
    "esc": "Escape",
    "del": "Delete",
    " ": "Space",
    "ctrl": "Control",
    "cmd": "Meta",
}
# On macOS these are commands of the menu, which CDP has to name (`commands` of Input.dispatchKeyEvent).
_COMMANDS = {"a": "selectAll", "c": "copy", "v": "paste", "x": "cut", "z": "undo"}

_DISPATCH = """function (event, init) {
  this.focus();
  this.dispatchEvent(new KeyboardEvent(event, {...init, bubbles: true, cancelable: true, composed: true}));
}"""


def type_text(tab: Tab, text: str, *, timeout: float = TIMEOUT) -> None:
    """Insert text at the focus, like a paste, without key events (see `press_key`)."""
    check_text("type_text", "text", text)
    with may_open_dialog():
        tab.cdp("Input.insertText", text=text, timeout=timeout)


def press_key(tab: Tab, key: str, modifiers: Modifiers = 0, *, timeout: float = TIMEOUT) -> None:
    """Press and release a key: a character, or a name such as Enter, Tab, Escape, Backspace, ArrowDown, PageUp or F5.

    ```python
    press_key("a", "ctrl")
    press_key("Control+Shift+K")
    press_key("Tab", ["shift"])
    ```

    `modifiers` are one or more names: alt, ctrl, meta or cmd, shift; or ``ControlOrMeta``, the modifier of this system's
    shortcuts. They may also be a sum of 1 for Alt, 2 for Ctrl, 4 for Meta and 8 for Shift. Raises `ValueError` for an unknown
    name.
    """
    check_text("press_key", "key", key)
    held, last = "", key
    if len(key) > 1:
        held, _, last = (key[:-2], "+", "+") if key.endswith("++") else key.rpartition("+")
    bits = _bits(modifiers) | (_bits(held) if held else 0)
    event = _describe(last, bits)
    text = event.pop("text")
    down: dict[str, Any] = {"type": "rawKeyDown"}
    if text and not bits & (_ALT | _CONTROL | _META):
        down = {"type": "keyDown", "text": text}
    elif sys.platform == "darwin" and bits & _META and last.lower() in _COMMANDS:
        down["commands"] = [_COMMANDS[last.lower()]]
    with may_open_dialog():
        tab.cdp("Input.dispatchKeyEvent", **event, **down, timeout=timeout)
        tab.cdp("Input.dispatchKeyEvent", **event, type="keyUp", timeout=timeout)


def dispatch_key(
    tab: Tab,
    target: Target,
    key: str = "Enter",
    event: str = "keypress",
    *,
    frame: Target | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Focus an element and dispatch a synthetic key event to it, for pages that ignore real keys.

    `event` is keydown, keypress or keyup. The event is not trusted: it types nothing. Raises `ElementNotFound`.
    """
    check_text("dispatch_key", "key", key)
    if event not in ("keydown", "keypress", "keyup"):
        raise ValueError(f"dispatch_key(): event must be keydown, keypress or keyup, not {shown(event)}")
    described = _describe(key, 0)
    number = described["windowsVirtualKeyCode"]
    init = {"key": described["key"], "code": described["code"], "keyCode": number, "which": number}
    with resolve(tab, target, frame, timeout=timeout) as node, may_open_dialog():
        node.function(_DISPATCH, event, init)


def _describe(key: str, modifiers: int) -> dict[str, Any]:
    """Return the parameters of a key event: key, code, modifiers, key codes, and the text that the key types."""
    if (name := _NAMES.get(key.lower())) is not None:
        number, text = _KEYS[name]
        key, code = (" " if name == "Space" else name), (f"{name}Left" if name in _TWO_SIDES else name)
    elif len(key) == 1:
        if modifiers == _SHIFT and len(key.upper()) == 1:
            key = key.upper()
        number, text, code = 0, key, ""
        if key.isascii() and key.isalnum():
            number = ord(key.upper())
            code = f"Digit{key}" if key.isdigit() else f"Key{key.upper()}"
    else:
        raise ValueError(f"there is no key {shown(key)}: pass one character, or one of {', '.join(_KEYS)}")
    codes = {"windowsVirtualKeyCode": number, "nativeVirtualKeyCode": number}
    return {"key": key, "code": code, "modifiers": modifiers, "text": text, **codes}


def _bits(modifiers: Modifiers) -> int:
    """Return the bits for the modifiers. Raises `TypeError` and `ValueError`."""
    if isinstance(modifiers, str):
        modifiers = modifiers.split("+")
    if isinstance(modifiers, int) and not isinstance(modifiers, bool):
        if not 0 <= modifiers <= 15:
            raise ValueError(f"press_key(): modifiers must be a sum of 1, 2, 4 and 8, not {modifiers}")
        return modifiers
    if isinstance(modifiers, bool) or not isinstance(modifiers, list | tuple | set | frozenset):
        kind = type(modifiers).__name__
        raise TypeError(f"press_key(): modifiers must be names such as 'ctrl', or a sum, not {kind}: {shown(modifiers)}")
    bits = 0
    for name in modifiers:
        if not isinstance(name, str) or name.strip().lower() not in _MODIFIERS:
            raise ValueError(f"press_key(): there is no modifier {shown(name)}: pass alt, ctrl, meta or shift")
        bits |= _MODIFIERS[name.strip().lower()]
    return bits
