"""The standard library's `multiprocessing.connection`, imported without what it does not need here.

Up to CPython 3.13 it imports `tempfile`, to make up addresses, which this package never asks for. `tempfile` imports `shutil`,
`random` and three compressors: a tenth of what a client takes above the bare interpreter (-X importtime). So its `tempfile` is
imported when it is first used, as CPython 3.14 does by itself.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _WhenUsed(ModuleType):
    """Stands for a module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        from importlib import import_module

        # It is there still for a thread that imports the same at this very moment.
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


if sys.version_info >= (3, 14):
    from multiprocessing import connection
else:
    _tempfile = _WhenUsed("tempfile")
    sys.modules.setdefault("tempfile", _tempfile)
    try:
        from multiprocessing import connection
    finally:
        # Every other module gets the real one.
        if sys.modules.get("tempfile") is _tempfile:
            del sys.modules["tempfile"]

__all__ = ["connection"]
