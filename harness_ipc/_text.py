"""Escaping of untrusted text for output."""

from __future__ import annotations


def escape_control(text: str, allow: str = "") -> str:
    """Return `text` with all control characters as backslash sequences, except those in `allow`.

    Untrusted text can be printed then: it can't end a line or control the terminal. Escapes all that `str.isprintable` rejects.
    """
    return "".join(c if c.isprintable() or c in allow else ascii(c)[1:-1] for c in text)
