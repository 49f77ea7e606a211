"""Text that a page may have written, on its way to a terminal."""

from __future__ import annotations


def escape_control(text: str, allow: str = "") -> str:
    """Return `text` with its control characters, invisible characters and lone surrogates written as escapes.

    Those in `allow` are kept. Terminals obey C0 and C1 controls (ECMA-48), and reorder text at bidirectional overrides.
    """
    return "".join(c if c.isprintable() or c in allow else ascii(c)[1:-1] for c in text)
