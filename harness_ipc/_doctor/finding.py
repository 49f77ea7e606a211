"""The result of a check, and parts of its text."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal

    from ..errors import UnsafeDirectory


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `remedy` is a shell command that fixes the problem, or None."""

    level: Literal["ok", "warning", "failure"]
    topic: str
    text: str
    remedy: str | None = None


def describe(error: BaseException) -> str:
    """Return the type and text of an error."""
    return f"{type(error).__name__}: {error}"


def without_remedy(error: UnsafeDirectory) -> str:
    """Return the text of an error without its remedy, which a finding has separately."""
    return str(error).removesuffix(f": run `{error.remedy}`")


def set_variable(variable: str, value: str) -> str:
    """Return the shell command that sets a variable."""
    return f"{'set' if sys.platform == 'win32' else 'export'} {variable}={value}"


def quote(path: str) -> str:
    """Return a path quoted for the shell."""
    return f'"{path}"' if sys.platform == "win32" else shlex.quote(path)
