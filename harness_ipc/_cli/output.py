"""Output of commands: reports go to stdout, errors to stderr in one line."""

from __future__ import annotations

import json
import sys

from .._text import escape_control


def print_json(value: object) -> None:
    """Print `value` as one line."""
    # ASCII: any console can encode it, and it has neither lone surrogates nor control characters.
    print(json.dumps(value), flush=True)


def print_error(text: str) -> None:
    """Print `text` on stderr."""
    print(f"harness-ipc: {escape(text)}", file=sys.stderr, flush=True)


def escape(text: str) -> str:
    """Return `text` without control characters."""
    return escape_control(text, allow="\n\t")
