"""A directory with modules that record their import, like the current directory of an untrusted checkout."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import harness_ipc

PACKAGE = Path(harness_ipc.__file__).parent
_SOURCE = """
with open({marker!r}, "a") as file:
    file.write(f"{{__name__}}\\n")
raise ImportError("planted")
"""


@functools.cache
def imported_names() -> frozenset[str]:
    """Return all top-level modules that the package imports, and all of the standard library, on any system."""
    names = set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return frozenset(names)


class PlantedModules:
    """The modules in `directory`, and a record of imports."""

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        self._marker = directory / "imported"
        for name in names:
            (directory / f"{name}.py").write_text(_SOURCE.format(marker=str(self._marker)), encoding="utf-8")

    def imported(self) -> list[str]:
        """Return the names of the modules that any process has imported."""
        return self._marker.read_text(encoding="utf-8").split() if self._marker.exists() else []
