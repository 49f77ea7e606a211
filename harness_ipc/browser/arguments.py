"""Validation of the helpers' arguments. An error names the helper, the argument and what to pass."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def check_kind(helper: str, name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise `TypeError` unless `value` is of one of the `kinds`, described by `expected`. A bool is not a number."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{helper}(): {name} must be {expected}, not {type(value).__name__}: {shown(value)}")


def check_text(helper: str, name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is a str."""
    check_kind(helper, name, value, str, "str")


def check_number(helper: str, name: str, value: Any, expected: str = "a number") -> None:
    """Raise `TypeError` unless `value` is an int or a float, `ValueError` if it is NaN or infinite."""
    check_kind(helper, name, value, (int, float), expected)
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{helper}(): {name} must be {expected}, not {value}")


def check_url(helper: str, url: Any) -> None:
    """Raise `TypeError` unless `url` is a str, and `ValueError` without a scheme, for which Chrome takes a host with a port."""
    check_text(helper, "url", url)
    scheme, colon, rest = url.strip().partition(":")
    port = rest.split("/")[0].isdecimal() and (scheme == "localhost" or "." in scheme)
    if colon and scheme[:1].isalpha() and not port and "/" not in scheme:
        return
    add = (
        "file://"
        if url.startswith("/") and not url.startswith("//")
        else "http:"
        if url.startswith("//")
        else "http:// or https://"
    )
    raise ValueError(f"{helper}(): {shown(url)} is not a complete URL: add {add}")


def check_seconds(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is a number of seconds, `ValueError` if it is below 0 or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}: {shown(value)}")
    if not value >= 0:
        raise ValueError(f"{name} must be a number of seconds from 0 on, not {value}")


def shown(value: Any) -> str:
    """Return `value` for a message: escaped and truncated."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_path(helper: str, path: Any) -> None:
    """Raise `TypeError` unless `path` is None or a path, and `FileNotFoundError` if its folder does not exist."""
    if path is None:
        return
    check_kind(helper, "path", path, (str, os.PathLike), "the path of a file")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"{helper}(): there is no folder {folder}: create it first", os.fspath(path))
