"""Patterns of addresses: a part of one, or a glob of the whole, as Playwright has it."""

from __future__ import annotations

import re


def compile_url_pattern(pattern: str) -> re.Pattern[str]:
    """Return what `search` finds in the addresses that fit.

    A pattern with ``*`` is a glob of the whole address: ``*`` is any text without ``/``, ``**`` any text. Another fits where it
    is a part of the address.
    """
    if "*" not in pattern:
        return re.compile(re.escape(pattern))
    wildcards = {"*": "[^/]*", "**": ".*"}
    parts = re.split(r"(\*\*?)", pattern)
    return re.compile(rf"\A{''.join(wildcards.get(part) or re.escape(part) for part in parts)}\Z")
