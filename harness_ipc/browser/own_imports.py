"""Imports of this package while a program runs whose directory is first on `sys.path`. It knows neither browser nor daemon.

`harness-browser` runs a program in its own process, and most runs need no more than a connection. What is imported later, to
start a daemon or to print a traceback, must not come from the program's directory: that may be anybody's.
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

# What `sys.path` is without the program's directory; None where no program has one.
_path: list[str] | None = None


def put_program_directory(directory: str) -> None:
    """Make `directory` the first on `sys.path`, in the place of the command's own, for the program that runs next."""
    global _path
    _path = sys.path[1:]
    sys.path[0] = directory


@contextlib.contextmanager
def without_program_directory() -> Iterator[None]:
    """Ignore the program's directory in the imports that this thread makes within the block; other threads' go on with it."""
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
    """Finds top-level modules on `path` for one thread, and nothing for the others. It is the last one to be asked."""

    def __init__(self, path: list[str]) -> None:
        self._path = path
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None, /) -> ModuleSpec | None:
        """Return the module's spec. Raises `ModuleNotFoundError`, so that nobody looks in the program's directory."""
        if path is not None or threading.get_ident() != self._thread:
            return None
        spec = PathFinder.find_spec(name, self._path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec
