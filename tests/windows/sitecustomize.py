"""Load modules from the file that `compiled` has written. Each Windows interpreter under Wine imports this first.

A file system call takes tens of round trips to Wine's server, and an import several such calls. The modules keep
their paths and their order on `sys.path`; folders that are not in the file are read as usual.
"""

import marshal
import mmap
import os
import sys

# Not from importlib, which would import several other modules.
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import ExtensionFileLoader, SourceFileLoader, spec_from_file_location

with open(os.path.join(sys.base_prefix, "compiled"), "rb") as _file:
    _data = memoryview(mmap.mmap(_file.fileno(), 0, access=mmap.ACCESS_READ))
_begin = 8 + int.from_bytes(_data[:8], "little")
# The modules of each folder: path, whether it is a package, and position of the code (None for extensions).
_folders: dict[str, dict[str, tuple[str, bool, tuple[int, int] | None]]] = marshal.loads(_data[8:_begin])


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, place: tuple[int, int]) -> None:
        super().__init__(name, path)
        self._place = place

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        begin, end = self._place
        return marshal.loads(_data[_begin + begin : _begin + end])


class _Finder:
    def __init__(self, folder: str) -> None:
        try:
            self._modules, self._folder = _folders[folder], folder
        except KeyError:
            raise ImportError from None

    def find_spec(self, fullname: str, target: object = None) -> ModuleSpec | None:
        name = fullname.rpartition(".")[2]
        if name not in self._modules:
            return None
        path, is_package, place = self._modules[name]
        loader = _Loader(fullname, path, place) if place else ExtensionFileLoader(fullname, path)
        inside = [os.path.join(self._folder, name)] if is_package else None
        return spec_from_file_location(fullname, path, loader=loader, submodule_search_locations=inside)


sys.path_hooks.insert(0, _Finder)
sys.path_importer_cache.clear()
