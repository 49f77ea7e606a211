"""Run the unit and integration suites under Windows builds of CPython, on Linux, with Wine.

``python -m tests.windows 3.12 [-- PYTEST ARGUMENTS]`` sets up a Wine prefix and the interpreters in a cache folder (given by
``HARNESS_TEST_CACHE``, else the user's), installs the package and the test tools into them from Linux, since pip has no
network in Wine, and runs the suites. It needs Debian's wine and wine64. docs/platforms.md says what a pass proves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

import platformdirs

ROOT = Path(__file__).parents[2]
VERSIONS = ["3.11", "3.12", "3.13"]
SUITES = ["tests/unit", "tests/integration"]
TOOLS = [
    *("pytest>=8", "pytest-timeout>=2.3", "pluggy", "iniconfig", "packaging", "colorama", "pygments"),
    *("pytest-rerunfailures>=14", "pytest-xdist>=3.6", "execnet", "hypothesis>=6.100", "sortedcontainers"),
]
# The summary of pytest: "7 passed, 1 skipped in 0.12s".
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed|deselected|rerun)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up what is missing, run the suites on each version, print the results, and return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.windows", description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"{', '.join(VERSIONS)} (default: all)")
    parser.add_argument("--setup", action="store_true", help="set up, and print the commands that run the interpreters")
    own, pytest_arguments = _split(sys.argv[1:] if arguments is None else list(arguments))
    options = parser.parse_args(own)
    if unknown := set(options.versions) - set(VERSIONS):
        parser.error(f"there is no {', '.join(unknown)} for Windows here: use {', '.join(VERSIONS)}")
    if shutil.which("wine") is None:
        parser.error("wine is not installed: apt-get install wine wine64")

    def run(version: str) -> tuple[int, str]:
        with wine(version) as (python, environment):
            if options.setup:
                return 0, f"WINEPREFIX={environment['WINEPREFIX']} WINEDEBUG=-all wine {python}"
            return run_suites(python, version, pytest_arguments or SUITES, environment)

    # In parallel: a process takes a second to start in Wine, most of which is waiting.
    versions = options.versions or VERSIONS
    with ThreadPoolExecutor(len(versions)) as pool:
        results = list(pool.map(run, versions))
    print("\n".join(result for _, result in results))
    return 1 if any(status for status, _ in results) else 0


@contextlib.contextmanager
def wine(version: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the interpreter of `version` and its environment, and end Wine afterwards."""
    cache = Path(os.environ.get("HARNESS_TEST_CACHE") or platformdirs.user_cache_dir("harness-ipc-tests", False)) / "windows"
    # A prefix for each version, since ending Wine's services ends all processes of the prefix.
    prefix = cache / f"prefix-{version}"
    environment = wine_environment(prefix)
    python = install(cache, version)
    start_wine(prefix, environment)
    compile_modules(python, environment)
    try:
        yield python, environment
    finally:
        subprocess.run(["wineserver", "-k"], env=environment, check=False)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def wine_environment(prefix: Path) -> dict[str, str]:
    """Return the environment of processes in a Wine prefix."""
    environment = {
        **os.environ,
        "WINEPREFIX": str(prefix),
        "WINEARCH": "win64",
        # Turn off Wine's log, its dialogs that offer to install Mono and Gecko, and consoles: each is a process, and delivers
        # no signal here.
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml,wbemprox,conhost.exe=",
        # Separate from the bytecode that pip writes, which is for the interpreter on Linux.
        "PYTHONPYCACHEPREFIX": r"C:\bytecode",
        "HARNESS_TEST_REQUIRE": "windows",
    }
    # There is no display, and paths of Linux are invalid there.
    for variable in ("DISPLAY", "TMPDIR", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPATH"):
        environment.pop(variable, None)
    return environment


def start_wine(prefix: Path, environment: dict[str, str]) -> None:
    """Create the prefix if it is missing, and start Wine's services without the caller's pipes, which they would keep open."""

    def quietly(*command: str, check: bool = True) -> None:
        null = subprocess.DEVNULL
        subprocess.run(command, check=check, env=environment, stdin=null, stdout=null, stderr=null)

    if not (prefix / "system.reg").exists():
        prefix.mkdir(parents=True, exist_ok=True)
        quietly("wineboot", "-i")
        # The default of a new prefix is Windows 7.
        quietly("wine", "winecfg", "-v", "win10")
    # Only a wineserver started explicitly stays after its last client: end the implicit one first, and wait for that (-w).
    quietly("wineserver", "-k", check=False)
    quietly("wineserver", "-w", check=False)
    quietly("wineserver", "-p")
    quietly("wine", "cmd", "/c", "exit")


def install(cache: Path, version: str) -> Path:
    """Return the interpreter of `version`, with the package and the test tools in it."""
    home = cache / f"cp{version.replace('.', '')}"
    if not (home / "ready").exists():
        shutil.rmtree(home, ignore_errors=True)
        pinned = Path(__file__).with_name(f"requirements-{version}.txt")
        _pip("--target", str(home), "--require-hashes", "-r", str(pinned))
        # _wmi, which `platform` uses, crashes on Wine 8. OpenSSL is not needed here and loads Wine's fonts.
        for name in ("_wmi", "_ssl", "_hashlib"):
            if (extension := home / "DLLs" / f"{name}.pyd").exists():
                extension.rename(extension.with_suffix(".off"))
        # Setuptools would be imported by every process.
        (home / "Lib" / "site-packages" / "distutils-precedence.pth").unlink(missing_ok=True)
        (home / "ready").touch()
    packages = home / "Lib" / "site-packages"
    tag = ["--platform", "win_amd64", "--python-version", version, "--only-binary", ":all:", "--upgrade"]
    _pip("--target", str(packages), *tag, *TOOLS, "platformdirs", "filelock", "psutil")
    _pip("--target", str(packages), "--upgrade", str(ROOT))
    return home / "python.exe"


def compile_modules(python: Path, environment: dict[str, str]) -> None:
    """Write all compiled modules into the file from which `sitecustomize` loads them: imports take a fourth of the time."""
    command = ["wine", str(python), "-S", str(Path(__file__).with_name("compiled.py")), str(PureWindowsPath("Z:", ROOT))]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the modules of {python} were not compiled: {done.stdout}{done.stderr}")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def run_suites(python: Path, version: str, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run pytest and pass its output on. Return its status, and a line with its summary and duration."""
    begun = time.monotonic()
    # Wine loses about one of some thousand processes, or delays it beyond any deadline. Failed tests are run once more, and
    # the summary has the number of these reruns.
    # A test that exceeds the timeout ends its worker, since no signal can interrupt it.
    arguments = ["-n", "3", "--dist", "worksteal", "--reruns", "1", "-raR", "--timeout", "400", *arguments]
    # With a regular file as its output, or without input, the interpreter crashes on Wine 8.
    process = subprocess.Popen(
        ["wine", str(python), "-X", "utf8", "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def end_wine() -> None:
        process.wait()
        # Processes that are left would keep the pipe open.
        subprocess.run(["wineserver", "-k"], env=environment, check=False)

    threading.Thread(target=end_wine, daemon=True).start()
    counted = "nothing was counted"
    assert process.stdout is not None
    with process.stdout as output:
        for raw in output:
            line = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
            print(f"{version}  {line}", flush=True)
            if re.search(r" in [\d.]+s", line) and (counts := _COUNT.findall(line)):
                counted = ", ".join(f"{number} {what}" for number, what in counts)
    status = process.wait()
    return status, f"CPython {version} for Windows: {counted}; {time.monotonic() - begun:.0f} s; exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
