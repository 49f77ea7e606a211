"""URL patterns: a part of the URL, or a glob of the whole URL, as in Playwright."""

from __future__ import annotations

import re


def compile_url_pattern(pattern: str) -> re.Pattern[str]:
    """Return a regular expression for use with `search`.

    A pattern with ``*`` is a glob of the whole URL: ``*`` matches any text without ``/``, and ``**`` any text. Any other
    pattern matches a part of the URL.
    """
    if "*" not in pattern:
        return re.compile(re.escape(pattern))
    wildcards = {"*": "[^/]*", "**": ".*"}
    parts = re.split(r"(\*\*?)", pattern)
    return re.compile(rf"\A{''.join(wildcards.get(part) or re.escape(part) for part in parts)}\Z")
