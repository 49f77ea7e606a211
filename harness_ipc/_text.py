"""Text of others that is printed or logged."""

from __future__ import annotations


def escape_control(text: str, allow: str = "") -> str:
    """Return `text` with all control characters as backslash sequences, except those in `allow`.

    For text of others that is printed: it can't end a line or control the terminal. Escaped is what `str.isprintable` rejects.
    """
    return "".join(c if c.isprintable() or c in allow else ascii(c)[1:-1] for c in text)
