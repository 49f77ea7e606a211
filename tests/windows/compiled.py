"""Write the file from which `sitecustomize` loads modules. It is run under Wine, with -S, by the same interpreter."""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
import sys
import warnings
import zipfile

# What no test imports: parts of the standard library, and packages that come with the interpreter.
SKIPPED = {
    *("__pycache__", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "pydoc_data", "ensurepip"),
    *("pip", "setuptools", "pkg_resources", "wheel", "winpython"),
}
Entry = tuple[str, bool, tuple[int, int] | None]


def main(root: str) -> None:
    """Compile the standard library, installed packages, and the package and its tests at `root`."""
    target = os.path.join(sys.prefix, "compiled")
    cache = f"{target}.cache"
    before: dict[tuple[str, int, int], bytes] = {}
    with contextlib.suppress(OSError), open(cache, "rb") as file:
        before = marshal.load(file)
    codes: dict[tuple[str, int, int], bytes] = {}
    folders: dict[str, dict[str, Entry]] = {sys.prefix: {}}
    size = 0
    library = os.path.join(sys.prefix, "Lib")
    tops = [os.path.join(sys.prefix, "DLLs"), library, os.path.join(library, "site-packages"), root]
    warnings.simplefilter("ignore")
    while tops:
        folder = tops.pop()
        modules = folders.setdefault(folder, {})
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name, _, ending = entry.name.partition(".")
            path = entry.path
            if ending == "pyd" or ending.endswith(".pyd"):
                modules[name] = path, False, None
                continue
            is_package = not ending and name not in SKIPPED - ({"tests"} if folder == root else set())
            if is_package:
                path = os.path.join(path, "__init__.py")
                if not os.path.isfile(path):
                    continue
                tops.append(entry.path)
            elif ending != "py" or name == "__init__":
                continue
            state = os.stat(path)
            key = path, state.st_mtime_ns, state.st_size
            if key not in before:
                with open(path, "rb") as file, contextlib.suppress(SyntaxError):
                    before[key] = marshal.dumps(compile(file.read(), path, "exec", dont_inherit=True))
            if key in before:
                codes[key] = before[key]
                end = size + len(before[key])
                if is_package or name not in modules:
                    modules[name] = path, is_package, (size, end)
                size = end
    index = marshal.dumps(folders)
    with open(target, "wb") as file:
        file.writelines([len(index).to_bytes(8, "little"), index, *codes.values()])
    with open(cache, "wb") as file:
        marshal.dump(codes, file)
    write_start(library, codes)


def write_start(library: str, codes: dict[tuple[str, int, int], bytes]) -> None:
    """Write modules that are imported earlier into the zip file that is first on the path of each interpreter."""
    before = {
        os.path.relpath(path, library): code for (path, *_), code in codes.items() if path.startswith(f"{library}\\encodings\\")
    }
    with open(os.path.join(os.path.dirname(__file__), "sitecustomize.py"), "rb") as source:
        before["sitecustomize.py"] = marshal.dumps(compile(source.read(), "sitecustomize", "exec"))
    # An unchecked hash: the code is not compared with a source.
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
    with zipfile.ZipFile(os.path.join(sys.prefix, f"python{sys.version_info.major}{sys.version_info.minor}.zip"), "w") as file:
        for path, code in before.items():
            file.writestr(f"{path.replace(os.sep, '/')}c", header + code)


if __name__ == "__main__":
    main(sys.argv[1])
