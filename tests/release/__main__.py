"""Build the wheel and the source distribution, and check both: ``python -m tests.release [--tag v1.2.3] [--dist FOLDER]``.

With a tag, the package must have that version and the changelog a date for it. The source distribution is installed and
unpacked, and its unit tests run.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("harness_ipc", "_harness_ipc_pytest.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 after printing the problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("--tag", help="the release's tag: the version with a leading v")
    parser.add_argument("--dist", type=Path, help="where to leave what is built, instead of a temporary folder")
    parser.add_argument("--tag-only", action="store_true", help="build nothing")
    options = parser.parse_args(arguments)
    problem = options.tag and tag_problem(options.tag, find_version(ROOT), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if problem:
        print(problem, file=sys.stderr)
    elif not options.tag_only:
        with tempfile.TemporaryDirectory(prefix="hi-") as scratch:
            check_distributions(options.dist or Path(scratch, "dist"), Path(scratch))
    return 1 if problem else 0


def find_version(root: Path) -> str:
    """Return `__version__` from the source, without importing it."""
    tree = ast.parse((root / "harness_ipc" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise LookupError("harness_ipc/__init__.py assigns no __version__")


def tag_problem(tag: str, version: str, changelog: str) -> str | None:
    """Return why the tag can't be released, or None."""
    if tag != f"v{version}":
        return f"the tag is {tag}, but harness_ipc.__version__ is {version}: tag v{version}, or change the version first"
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)': date it before the release"
    return None


def check_distributions(dist: Path, scratch: Path) -> None:
    """Build both into `dist`. Raise an error if one has unexpected files, lacks expected ones, or fails its tests."""
    _run("build", "--outdir", str(dist), str(ROOT))
    version = find_version(ROOT)
    wheel, sdist = dist / f"harness_ipc-{version}-py3-none-any.whl", dist / f"harness_ipc-{version}.tar.gz"
    _run("twine", "check", "--strict", str(wheel), str(sdist))
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert top == {*PACKAGES, f"harness_ipc-{version}.dist-info"}, f"the wheel has {sorted(top)}"
    with tarfile.open(sdist) as unpacked:
        # From Python 3.11.4 on. It is our own archive.
        unpacked.extraction_filter = getattr(tarfile, "data_filter", None)
        unpacked.extractall(scratch)
    _run("pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(sdist))
    _run("pip", "install", "--quiet", f"{sdist}[browser]")
    _run("pytest", "-q", "-n", "2", "tests/unit", cwd=scratch / f"harness_ipc-{version}")


def _run(*command: str, cwd: Path = ROOT) -> None:
    subprocess.run([sys.executable, "-m", *command], cwd=cwd, check=True)


if __name__ == "__main__":
    sys.exit(main())
