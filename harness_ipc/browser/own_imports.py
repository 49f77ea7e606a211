"""Keeps the imports of this package from the directory of the user's program, which is first on `sys.path`.

`harness-browser` runs a program in its own process. Modules that are imported later, to start a daemon or to print a traceback,
must not come from the program's directory, which is not trusted.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from importlib.machinery import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# `sys.path` without the program's directory; None if there is not a program.
_path: list[str] | None = None


def put_program_directory(directory: str) -> None:
    """Replace the first entry of `sys.path`, that of the command, with `directory` of the program that runs next."""
    global _path
    _path = sys.path[1:]
    sys.path[0] = directory


@contextlib.contextmanager
def without_program_directory() -> Iterator[None]:
    """Ignore the program's directory in imports of this thread within the block. Imports of other threads still use it."""
    if _path is None:
        yield
        return
    finder = _Finder(_path)
    # After the finders of built-in and frozen modules.
    sys.meta_path.insert(sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path), finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder:
    """Finds top-level modules on `path` for one thread, and nothing for others. No later finder is used in that thread."""

    def __init__(self, path: list[str]) -> None:
        self._path = path
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None, /) -> ModuleSpec | None:
        """Return the spec of a module. Raises `ModuleNotFoundError`, so that the program's directory is not searched."""
        if path is not None or threading.get_ident() != self._thread:
            return None
        spec = PathFinder.find_spec(name, self._path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec
