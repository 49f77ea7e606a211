"""Converts docstrings from Markdown to reStructuredText for autodoc."""

from __future__ import annotations

import re
from typing import Any

import harness_ipc

_FENCE = re.compile(r"\s*```(\w*)$")
# `name`, but not ``literal``.
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def convert(lines: list[str], public: set[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText; a name in `public` becomes a link."""
    converted: list[str] = []
    in_fence = False
    for line in lines:
        if fence := _FENCE.match(line):
            in_fence = not in_fence
            converted += ["", f".. code-block:: {fence[1] or 'text'}", ""] if in_fence else [""]
        else:
            converted.append(f"    {line}" if in_fence else _CODE.sub(lambda code: _inline(code[1], public), line))
    return converted


def _inline(code: str, public: set[str]) -> str:
    return f":py:obj:`~harness_ipc.{code}`" if code.partition(".")[0] in public else f"``{code}``"


def _process(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = convert(lines, set(harness_ipc.__all__))


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
