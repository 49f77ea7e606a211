"""The command `harness-browser`: its output, its exit status, and the processes and files that it leaves."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import pytest

import harness_ipc
from harness_ipc import connect_daemon, daemon_status
from harness_ipc.browser import helpers
from tests.browser.conftest import COMMAND, Pair, harness_browser, kill, main_processes, processes_of, suspended, use
from tests.browser.others import OtherBrowser
from tests.browser.site import Site
from tests.support.managed import the_log
from tests.support.marks import needs_chromium, needs_linux, needs_posix
from tests.support.planted import PlantedModules, imported_names
from tests.support.processes import PATIENCE, lives, runtime_files, spawn_daemon, wait_until

pytestmark = needs_chromium

PACKAGE = str(Path(harness_ipc.__file__).parent)
# On Linux, browsers are found by their names on PATH alone.
needs_path = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there, browsers are found by their places")

ARGV = "import sys; print(sys.argv)"
# `python -c` with this is the command without the extra installed.
WITHOUT_WEBSOCKETS = (
    "import sys; sys.modules['websockets'] = None\n"
    "from harness_ipc.browser.cli import main\n"
    "if __name__ == '__main__': sys.exit(main())"
)


def who(name: str = "browser") -> tuple[int, int, str]:
    """Return the pids of the daemon and of its browser, and the targetId of the current tab."""
    with connect_daemon(name) as client:
        tab = client.request({"meta": "session"})["target_id"]
        return client.pid, client.request({"meta": "connection_status"})["pid"], tab


def serves(*arguments: str) -> bool:
    """Return whether a command with these options is answered by the browser."""
    return harness_browser(*arguments, "-c", "print(js('6 * 7'))").stdout == "42\n"


def daemons(base: Path) -> list[int]:
    return [pid for pid, line in main_processes(base).items() if "harness_ipc.browser.daemon" in line]


def browsers(base: Path) -> list[int]:
    """Return the pids of the managed browsers, without their children."""
    return [pid for pid, line in main_processes(base).items() if f"--user-data-dir={base / 'profile'}" in line]


def assert_nothing_left(base: Path) -> None:
    """Assert that there is no process, no record, no socket, and no lock in the profile."""
    wait_until(lambda: not processes_of(base))
    assert [name for name in runtime_files() if not name.endswith(".start")] == []
    words = ("DevToolsActivePort", "harness-browser.json", "harness-browser.tmp")
    assert [name for name in words if (base / "profile" / name).exists()] == []


def lock_of(base: Path) -> Path:
    """Return the symlink by which Chromium locks its profile."""
    return base / "profile" / "SingletonLock"


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """Start the command, and yield it with its standard output and error."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            process.kill()


def file_of(folder: Path, source: str | bytes, name: str = "program.py") -> str:
    """Write a program, and return its path."""
    (folder / name).write_bytes(source if isinstance(source, bytes) else source.encode())
    return str(folder / name)


# Cold and warm.


def test_one_command_starts_all(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    run = harness_browser("-c", "print(page_info())")
    assert (run.returncode, run.stderr) == (0, "")
    info = ast.literal_eval(run.stdout)
    assert list(info) == ["url", "title", "w", "h", "sx", "sy", "pw", "ph"]
    assert (info["url"], info["title"]) == ("about:blank", "")
    assert daemon_status("browser").state == "running"
    assert "Warning" not in the_log("browser")
    assert len(daemons(fresh)) == len(browsers(fresh)) == 1


def test_the_second_command_finds_all_as_the_first_left_it(killable: Pair, site: Site) -> None:
    first = harness_browser("-c", f"goto_url('{site.url}/form'); wait_for_load(); js('window.mark = 5')")
    assert (first.returncode, first.stdout, first.stderr) == (0, "", "")
    before = who()
    second = harness_browser("-c", "print(page_info()['title'], js('window.mark'))")
    assert (second.returncode, second.stdout, second.stderr) == (0, "A form 5\n", "")
    assert who() == before
    assert ([before[0]], [before[1]]) == (daemons(killable.base), browsers(killable.base))


def test_eight_commands_at_once_start_one_daemon_and_one_browser(fresh: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: harness_browser("-c", "print(current_tab()['url'])"), range(8)))
    assert [(run.returncode, run.stdout, run.stderr) for run in runs] == [(0, "about:blank\n", "")] * 8
    daemon, browser, _ = who()
    assert ([daemon], [browser]) == (daemons(fresh), browsers(fresh))
    assert the_log("browser").count("started pid ") == 1


@needs_posix
def test_a_start_that_waits_for_the_user_says_so(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    # It accepts connections, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("BU_CDP_WS", f"{place}/secret")
        with running("-c", "1") as (process, _, stderr):
            waits = f"the browser of BU_CDP_WS, {place} waits for you: click Allow in its window if it asks"
            assert stderr.readline() == f"harness-browser: {waits}\n"
            silent.close()
            output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (6, "")
    assert error.startswith("harness-browser: the daemon 'browser' did not start: BU_CDP_WS: ws://127.0.0.1:")
    assert error.count("\n") == 1
    assert "secret" not in error
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    assert serves()


@needs_posix
def test_a_start_that_takes_long_says_so_on_a_terminal(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    master, slave = pty.openpty()
    with socket.create_server(("127.0.0.1", 0)) as silent, open(master, "rb", buffering=0) as terminal:
        monkeypatch.setenv("BU_CDP_WS", f"ws://127.0.0.1:{silent.getsockname()[1]}")
        with subprocess.Popen([*COMMAND, "-c", "1"], stdin=subprocess.DEVNULL, stderr=slave) as process:
            os.close(slave)
            shown = b""
            while b"harness-browser: starting browser and its browser\r\n" not in shown:
                shown += terminal.read(1000)
            silent.close()
            assert process.wait(PATIENCE) == 6


def test_a_warm_command_imports_only_what_it_needs(warm: Path) -> None:
    program = (
        # Coverage may have imported modules before.
        "import sys; before = set(sys.modules); from harness_ipc.browser import cli; "
        "cli.main(['-c', 'print(page_info()[\"w\"])']); "
        "print({'argparse', 'asyncio', 'shlex', 'shutil', 'subprocess', 'traceback'} & (set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    width, heavy = run.stdout.splitlines()
    assert (int(width) > 0, heavy, run.stderr) == (True, "set()", "")


# Programs.


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        ([], ["-c"]),
        (["a", "--b", "-c", "x", "--doctor", "-"], ["-c", "a", "--b", "-c", "x", "--doctor", "-"]),
        (["-"], ["-c", "-"]),
        (["a b", "é😀", ""], ["-c", "a b", "é😀", ""]),
        (["--b", "--json"], ["-c", "--b", "--json"]),
        (["--version"], ["-c", "--version"]),
        (["--", "-c"], ["-c", "--", "-c"]),
    ],
    ids=str,
)
def test_a_program_in_the_command_line(warm: Path, words: list[str], argv: list[str]) -> None:
    run = harness_browser("-c", ARGV, *words)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{argv}\n", "")


@pytest.mark.parametrize(
    ("words", "argv"), [([], ["-"]), (["-"], ["-"]), (["-", "a", "--b", "-c"], ["-", "a", "--b", "-c"])], ids=str
)
def test_a_program_on_standard_input(warm: Path, words: list[str], argv: list[str]) -> None:
    run = harness_browser(*words, stdin=f"{ARGV}\nprint(__name__, 'é😀', js('6 * 7'))\n")
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{argv}\n__main__ é😀 42\n", "")


def test_a_program_in_a_file(warm: Path, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("from harness_ipc.browser.helpers import js\nanswer = js('6 * 7')\n")
    source = "if __name__ == '__main__':\n    print([__file__, sys.argv, sys.path[0], neighbour.answer])\n"
    path = file_of(tmp_path, f"import neighbour, sys\n{source}")
    run = harness_browser(path, "a", "--b", "--json", "-c", "--", "x")
    assert (run.returncode, run.stderr) == (0, "")
    words = ["a", "--b", "--json", "-c", "--", "x"]
    assert ast.literal_eval(run.stdout) == [path, [path, *words], str(tmp_path), 42]


def test_dunder_file_is_absolute(warm: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file_of(tmp_path / "folder", "import os, sys\nos.chdir('..')\nprint([__file__, sys.argv[0]])\nraise ValueError\n")
    relative = os.path.join("folder", "program.py")
    run = harness_browser(relative, cwd=tmp_path)
    assert ast.literal_eval(run.stdout) == [str(tmp_path / relative), relative]
    assert run.stderr.splitlines()[1:] == [
        f'  File "{tmp_path / relative}", line 4, in <module>',
        "    raise ValueError",
        "ValueError",
    ]


def test_a_file_leaves_standard_input_to_the_program(warm: Path, tmp_path: Path) -> None:
    run = harness_browser(file_of(tmp_path, "print(js('6 * 7'), input())"), stdin="said\n")
    assert (run.returncode, run.stdout, run.stderr) == (0, "42 said\n", "")


@pytest.mark.parametrize("safe", ["", "1"])
@pytest.mark.parametrize("way", ["-c", "file"])
def test_modules_are_looked_for_as_by_python_itself(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, safe: str
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", safe)
    source = "import sys; print(sys.path)"
    words = ["-c", source] if way == "-c" else [file_of(tmp_path, source)]
    python = subprocess.run([sys.executable, *words], capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert harness_browser(*words).stdout == python.stdout
    # Modules beside the command itself are not importable.
    script = "import sys; from harness_ipc.browser.cli import main; sys.exit(main())"
    (tmp_path / "bin").mkdir()
    command = [sys.executable, file_of(tmp_path / "bin", script, "harness-browser"), *words]
    installed = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (installed.stdout, installed.stderr) == (python.stdout, "")


def test_a_file_in_another_encoding(warm: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, "# coding: latin-1\nprint('\xe9', len('\xe9'))\nraise ValueError('\xe9')\n".encode("latin-1"))
    run = harness_browser(path)
    assert (run.returncode, run.stdout) == (1, "é 1\n")
    assert run.stderr.endswith("    raise ValueError('é')\nValueError: é\n")


def test_a_file_with_a_mark_and_the_line_ends_of_windows(warm: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, b"\xef\xbb\xbfif True:\r\n    print('''a\r\nb''')\r\n")
    run = harness_browser(path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "a\nb\n", "")


def test_a_program_is_the_module_main(warm: Path) -> None:
    source = """
import __main__, pickle, sys, typing
class Thing:
    other: "Thing"
assert __main__ is sys.modules["__main__"] and __main__.Thing is Thing
assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
assert typing.get_type_hints(Thing) == {"other": Thing}
from harness_ipc.browser import helpers
print(sorted(set(globals()) - set(helpers.__all__)))
print(set(helpers.__all__) - set(globals()))
"""
    run = harness_browser("-c", source)
    assert (run.returncode, run.stderr) == (0, "")
    names, missing = run.stdout.splitlines()
    assert missing == "set()"
    common = ["__builtins__", "__doc__", "__loader__", "__name__", "__package__", "__spec__"]
    assert ast.literal_eval(names) == sorted([*common, "__main__", "pickle", "sys", "typing", "Thing", "helpers"])


def test_a_program_inherits_no_future_imports(warm: Path) -> None:
    run = harness_browser("-c", "def f(x: int) -> None: pass\nprint(f.__annotations__)")
    assert (run.stdout, run.stderr) == ("{'x': <class 'int'>, 'return': None}\n", "")


def test_an_empty_program(warm: Path) -> None:
    for run in (harness_browser("-c", ""), harness_browser(stdin=""), harness_browser(os.devnull)):
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_file_that_can_not_be_read(attached: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.py")
    run = harness_browser(missing, "a", "--b")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"harness-browser: {missing} can't be read: No such file or directory\n"
    run = harness_browser(str(tmp_path))
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"harness-browser: {tmp_path} can't be read: ")
    assert run.stderr.count("\n") == 1
    # These errors come before a daemon is started.
    assert list(attached.iterdir()) == processes_of(attached) == []
    assert serves()


@needs_posix
def test_control_characters_in_paths_are_escaped(fresh: Path) -> None:
    run = harness_browser("a\n\x1b[31m\u2028.py")
    assert run.stderr == "harness-browser: a\\n\\x1b[31m\\u2028.py can't be read: No such file or directory\n"


@needs_posix
def test_nothing_to_run_on_a_terminal(fresh: Path) -> None:
    import pty

    master, slave = pty.openpty()
    try:
        run = subprocess.run(COMMAND, stdin=slave, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    finally:
        os.close(master)
        os.close(slave)
    assert (run.returncode, run.stdout) == (2, "")
    words = "nothing to run: give -c CODE, a file, or a program on standard input; --help says more"
    assert run.stderr == f"harness-browser: {words}\n"
    assert processes_of(fresh) == []


@needs_posix
@pytest.mark.parametrize(("redirection", "words", "status"), [("<&-", [], 2), (">&-", ["-c", "1"], 0)], ids=str)
def test_a_closed_standard_stream(warm: Path, redirection: str, words: list[str], status: int) -> None:
    shell = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *words]
    run = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert "Traceback" not in run.stderr
    assert run.returncode == status
    assert serves()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["-c"], "argument -c: expected one argument"),
        (["--name"], "argument --name: expected one argument"),
        (["--doctor", "--reload"], "not allowed with argument"),
        (["--doctor", "-c", "1"], "not allowed with argument"),
        (["--doctor", "program.py"], "there is nothing to run with --doctor"),
        (["--reload", "-"], "there is nothing to run with --reload"),
        (["--json"], "only with --doctor"),
        (["--reload", "--json"], "only with --doctor"),
        (["--name", "a/b", "-c", "1"], "'a/b' is not a daemon name"),
        (["--name", "a/b", "--reload"], "'a/b' is not a daemon name"),
        (["--name", "a/b", "--doctor"], "'a/b' is not a daemon name"),
    ],
    ids=str,
)
def test_wrong_usage(fresh: Path, words: list[str], problem: str) -> None:
    run = harness_browser(*words)
    assert (run.returncode, run.stdout) == (2, "")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("harness-browser: ")
    assert problem in last
    assert "Traceback" not in run.stderr
    assert list(fresh.iterdir()) == processes_of(fresh) == []


@pytest.mark.parametrize("words", [["-x\x1b[2J\n\x9b"], ["--doctor", "--\x1b]0;x\x07"]])
def test_control_characters_in_arguments_are_escaped(fresh: Path, words: list[str]) -> None:
    run = harness_browser(*words)
    assert (run.returncode, run.stdout) == (2, "")
    assert all(c.isprintable() or c == "\n" for c in run.stderr), ascii(run.stderr)
    assert run.stderr.splitlines()[-1].startswith("harness-browser: error: ")


def test_version(fresh: Path) -> None:
    run = harness_browser("--version")
    assert (run.returncode, run.stdout, run.stderr) == (0, f"harness-browser {harness_ipc.__version__}\n", "")
    assert list(fresh.iterdir()) == []


def test_help_names_every_exit_status(fresh: Path) -> None:
    run = harness_browser("--help")
    assert (run.returncode, run.stderr) == (0, "")
    _, _, statuses = " ".join(run.stdout.split()).partition("exit status: ")
    assert [part.split()[0] for part in statuses.split("; ")] == ["0", "1", "2", "4", "5", "6", "else"]
    for option in ("-c CODE", "FILE", "--name NAME", "--doctor", "--json", "--reload", "--version"):
        assert option in run.stdout
    assert list(fresh.iterdir()) == []


# Exit status, errors and output.

ENDS = {
    "functions": "def f(x):\n    return 1 / x\n\n\ndef g():\n    f(\n        0)\n\n\nprint('before')\ng()\n",
    "from": "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('é 😀 \\ud800') from error\n",
    "during": "def f():\n    try:\n        {}['a']\n    except KeyError:\n        1 / 0\nf()\n",
    "from none": "try:\n    {}['a']\nexcept KeyError:\n    raise ValueError from None\n",
    "group": """
def fail(kind, cause):
    try:
        raise cause
    except Exception as error:
        raise kind("é") from error
errors = []
for kind in (ValueError, TypeError):
    try:
        fail(kind, KeyError("k"))
    except Exception as error:
        errors.append(error)
raise ExceptionGroup("all", [*errors, ExceptionGroup("more", [OSError(2, "x")])])
""",
    "notes": "error = ValueError('a\\nb')\nerror.add_note('c\\nd')\nraise error\n",
    "unprintable": "class Bad(Exception):\n    def __str__(self):\n        raise OSError\nraise Bad\n",
    "suggestion": "value = 1\nprint(valeu)\n",
    "syntax": "print('never')\nx = = 3\n",
    "in a module": "import failing\n",
    "syntax of a module": "import invalid\n",
    "warning": "import warnings\nwarnings.warn('so')\n",
    "text after 2028": "text = '\u2028\x0c\x85'\n\nraise ValueError\n",
    "exit": "import sys\nprint('before')\nsys.exit()\n",
    "exit 0": "raise SystemExit(0)",
    "exit 3": "import sys\nprint('before')\nsys.exit(3)\n",
    "exit text": "import sys\nprint('before')\nsys.exit('é 😀 \\ud800')\n",
    "exit in a function": "def f():\n    try:\n        exit(4)\n    finally:\n        print('finally')\nf()\n",
    "in a thread": "import threading\nthread = threading.Thread(target=lambda: 1 / 0, name='T')\nthread.start()\n",
    "own hook": "import sys\nsys.excepthook = lambda kind, error, _: print(kind, error)\n1 / 0\n",
    "at exit": "import atexit\natexit.register(print, 'at exit')\n1 / 0\n",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_with_python_itself(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    file_of(tmp_path, "\n\nraise ValueError('in the module')\n", "failing.py")
    file_of(tmp_path, "1 +\n", "invalid.py")
    path = file_of(tmp_path, ENDS[end])
    ours = harness_browser(path)
    # Python writes UTF-8 only in this mode, harness-browser always.
    monkeypatch.setenv("PYTHONUTF8", "1")
    python = [sys.executable, "-W", "error", path]
    theirs = subprocess.run(python, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert helpers.js("6 * 7") == 42


@pytest.mark.parametrize(
    "raised", ["import asyncio\nraise asyncio.CancelledError\n", "class Mine(BaseException): pass\nraise Mine\n"], ids=repr
)
def test_an_error_that_is_not_an_exception(warm: Path, tmp_path: Path, raised: str) -> None:
    path = file_of(tmp_path, raised)
    ours = harness_browser(path)
    python = [sys.executable, "-W", "error", path]
    theirs = subprocess.run(python, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)


SOURCE = "\n\ndef visit():\n    print('before')\n    js('throw new Error(\"é\")')\n\n\nvisit()  # é\n"


@pytest.mark.parametrize("way", ["-c", "-", "file"])
def test_a_traceback_shows_the_lines_of_the_program_alone(warm: Path, tmp_path: Path, way: str) -> None:
    path = file_of(tmp_path, SOURCE)
    name = {"-c": "<string>", "-": "<stdin>", "file": path}[way]
    run = harness_browser(*([way, SOURCE] if way == "-c" else [path if way == "file" else "-"]), stdin=SOURCE)
    assert (run.returncode, run.stdout) == (1, "before\n")
    lines = [line for line in run.stderr.splitlines() if line.strip("^~ ")]
    assert lines[:6] == [
        "Traceback (most recent call last):",
        f'  File "{name}", line 8, in <module>',
        "    visit()  # é",
        f'  File "{name}", line 5, in visit',
        "    js('throw new Error(\"é\")')",
        "harness_ipc.browser.errors.JavaScriptError: Error: é",
    ]
    assert PACKAGE not in run.stderr


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("try:\n    js('throw 1')\nexcept JavaScriptError as error:\n    raise ValueError from error\n", 2),
        ("try:\n    js('throw 1')\nexcept JavaScriptError:\n    switch_tab('nobody')\n", 2),
        ("try:\n    js('throw 1')\nexcept JavaScriptError as error:\n    raise ExceptionGroup('all', [error]) from error\n", 3),
        (
            "import concurrent.futures as f\nwith f.ThreadPoolExecutor() as p:\n    p.submit(lambda: js('throw 1')).result()\n",
            2,
        ),
    ],
)
def test_no_traceback_shows_our_frames(warm: Path, tmp_path: Path, source: str, lines: int) -> None:
    path = file_of(tmp_path, source)
    run = harness_browser(path)
    assert run.returncode == 1
    assert run.stderr.count(f'File "{path}", line ') == lines
    assert "JavaScriptError: 1\n" in run.stderr
    assert PACKAGE not in run.stderr
    assert "helpers.py" not in run.stderr


def test_a_traceback_counts_lines_as_python_does(warm: Path) -> None:
    run = harness_browser(stdin="text = '\u2028\x0c\x85'\n\nraise ValueError\n")
    assert run.stderr.splitlines()[1:] == ['  File "<stdin>", line 3, in <module>', "    raise ValueError", "ValueError"]


def test_a_traceback_quotes_standard_input_in_its_encoding(warm: Path) -> None:
    source = "# coding: latin-1\nraise ValueError('\xe9')\n".encode("latin-1")
    run = subprocess.run([*COMMAND, "-"], input=source, capture_output=True, timeout=PATIENCE)
    assert run.stderr.decode().endswith("    raise ValueError('é')\nValueError: é\n")


@pytest.mark.parametrize("source", ["x = 1\ny = = 2\n", "def f(:\n    pass\n"])
@pytest.mark.parametrize("way", ["-c", "-"])
def test_a_syntax_error_shows_the_line(warm: Path, source: str, way: str) -> None:
    run = harness_browser(way, *([source] if way == "-c" else []), stdin=source)
    assert (run.returncode, run.stdout) == (1, "")
    number, text = (2, "y = = 2") if source.startswith("x") else (1, "def f(:")
    name = "<string>" if way == "-c" else "<stdin>"
    assert [line for line in run.stderr.splitlines() if line.strip("^ ")] == [
        f'  File "{name}", line {number}',
        f"    {text}",
        "SyntaxError: invalid syntax",
    ]


def test_output_comes_before_the_traceback(warm: Path) -> None:
    command = [*COMMAND, "-c", "print('before')\n1 / 0"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=PATIENCE)
    lines = run.stdout.splitlines()
    assert lines[:2] == ["before", "Traceback (most recent call last):"]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_program_that_raises_an_interrupt(warm: Path) -> None:
    run = harness_browser("-c", "print('before')\nraise KeyboardInterrupt")
    assert (run.returncode, run.stdout, run.stderr) == (130, "before\n", "")


@needs_posix
@pytest.mark.parametrize("busy", ["wait(600)", "js('new Promise(() => {})', timeout=600)"])
def test_ctrl_c_ends_the_command_and_not_the_daemon(warm: Path, busy: str) -> None:
    before = who()
    with running("-c", f"print('ready', flush=True)\n{busy}") as (process, stdout, stderr):
        assert stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert (stdout.read(), stderr.read()) == ("", "")
    assert serves()
    assert who() == before


def into_closed_pipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a standard output whose reader has closed it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, *arguments]
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8", timeout=PATIENCE
        )
    finally:
        os.close(writer)


@needs_posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("count", [1, 100_000])
def test_a_closed_reader_is_no_error(warm: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str, count: int) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    run = into_closed_pipe("-c", f"print('x' * {count})")
    assert serves()
    assert (run.returncode, run.stderr) == (1, "")


@needs_posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_reader_of_the_doctor_is_no_error(warm: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    run = into_closed_pipe("--doctor")
    assert (run.returncode, run.stderr) == (1, "")


@needs_posix
def test_a_broken_pipe_in_the_program_is_reported(warm: Path) -> None:
    run = harness_browser("-c", "import os\nreader, writer = os.pipe()\nos.close(reader)\nos.write(writer, b'x')")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


# Characters.

CONSOLES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1:strict"},
    {"PYTHONIOENCODING": "utf-16"},
]


TITLE = """
js("document.title = 'é 😀 ' + '日本'")
print(page_info()["title"])
print("é", "\\ud800", js("'\\\\ud800'"))
1 / 0  # é😀
"""


@pytest.mark.parametrize("console", CONSOLES, ids=str)
@pytest.mark.parametrize("way", ["-c", "-", "file"])
def test_all_is_utf_8_whatever_the_console(warm: Path, tmp_path: Path, console: dict[str, str], way: str) -> None:
    words = [way, TITLE] if way == "-c" else [file_of(tmp_path, TITLE) if way == "file" else "-"]
    run = harness_browser(*words, stdin=TITLE, env={**os.environ, **console})
    assert (run.returncode, run.stdout) == (1, "é 😀 日本\né \\ud800 \\ud800\n")
    assert "    1 / 0  # é😀\n" in run.stderr


@pytest.mark.parametrize("console", CONSOLES[2:], ids=str)
def test_our_output_is_utf8(warm: Path, console: dict[str, str]) -> None:
    run = harness_browser("é😀.py", env={**os.environ, "PYTHONUTF8": "1", **console})
    assert (run.returncode, run.stderr) == (2, "harness-browser: é😀.py can't be read: No such file or directory\n")


@needs_linux
def test_an_invalid_path(warm: Path, tmp_path: Path) -> None:
    (tmp_path / "\udce9.py").write_text("print(ascii(__file__[-4:]))\n1 / 0\n")
    run = harness_browser(str(tmp_path / "\udce9.py"))
    assert (run.returncode, run.stdout) == (1, "'\\udce9.py'\n")
    assert '\\udce9.py", line 2, in <module>\n    1 / 0\n' in run.stderr


# Texts of a page that would write to the clipboard, clear the screen, color it and reorder it.
STEERING = "\x1b]52;c;eA==\x07\x1b[2J\x9b31m\u202e\u2066\ud800"
OF_THE_PAGE = f"text = js({json.dumps(STEERING)!r})\n"
IN_THREAD = """
import threading
def f(): raise ValueError(text)
thread = threading.Thread({})
thread.start()
thread.join()
1 / 0
"""

QUOTES_A_PAGE = {
    "of ours": f"js({f'throw new Error({json.dumps(STEERING)})'!r})",
    "of the program": "raise ValueError(text)",
    "cause": "try:\n    raise ValueError(text)\nexcept ValueError as error:\n    raise TypeError from error",
    "context": "try:\n    raise ValueError(text)\nexcept ValueError:\n    1 / 0",
    "group": "raise ExceptionGroup('all', [TypeError(), ExceptionGroup(text, [ValueError(text)])])",
    "note": "error = ValueError()\nerror.add_note(text)\nraise error",
    "class": "raise type(text[:-1], (Exception,), {})",
    "file": "raise OSError(2, text, text)",
    "syntax": "raise SyntaxError(text, (text, 1, 1, text, 1, 2))",
    "no exception": "class Mine(BaseException): pass\nraise Mine(text)",
    "thread": IN_THREAD.format("target=f"),
    "thread's name": IN_THREAD.format("target=lambda: 1 / 0, name=text"),
    "destructor": "class Mine:\n    def __del__(self): raise ValueError(text)\nMine()\n1 / 0",
    "at exit": "import atexit\ndef f(): raise ValueError(text)\natexit.register(f)\n1 / 0",
}


@pytest.mark.parametrize("way", ["-c", "file"])
@pytest.mark.parametrize("quotes", QUOTES_A_PAGE)
def test_control_characters_in_tracebacks_are_escaped(warm: Path, tmp_path: Path, quotes: str, way: str) -> None:
    program = OF_THE_PAGE + QUOTES_A_PAGE[quotes]
    run = harness_browser(*(["-c", program] if way == "-c" else [file_of(tmp_path, program)]))
    assert (run.returncode, run.stdout) == (1, "")
    assert all(c.isprintable() or c in "\n\t" for c in run.stderr), ascii(run.stderr)
    escaped = ascii(STEERING)[1:-1]
    assert (escaped.removesuffix("\\ud800") if quotes == "class" else escaped) in run.stderr


def test_output_of_the_program_is_unchanged(warm: Path) -> None:
    prints = "import sys\nprint(text[:-1])\nprint(text[:-1], file=sys.stderr)\n"
    run = harness_browser("-c", OF_THE_PAGE + prints)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{STEERING[:-1]}\n", f"{STEERING[:-1]}\n")
    hook = "sys.excepthook = lambda kind, error, trace: sys.stderr.write('\\x1b[31mred')\n1 / 0"
    run = harness_browser("-c", f"import sys\n{hook}")
    assert (run.returncode, run.stderr) == (1, "\x1b[31mred")


# Names.


def test_two_names_are_two_daemons_with_two_browsers(fresh: Path) -> None:
    one = {**os.environ, "HARNESS_CHROME_PROFILE": str(fresh / "one")}
    two = {**os.environ, "HARNESS_CHROME_PROFILE": str(fresh / "two"), "BU_NAME": "two"}
    code = "import os; js('window.name = \"mine\"'); print(os.environ['BU_NAME'])"
    assert harness_browser("--name", "one", "-c", code, env=one).stdout == "one\n"
    run = harness_browser("-c", "import os; print(js('window.name'), os.environ['BU_NAME'])", env=two)
    assert (run.returncode, run.stdout, run.stderr) == (0, " two\n", "")
    first, second = who("one"), who("two")
    assert all(ours != theirs for ours, theirs in zip(first, second, strict=True))
    # An option overrides the variable.
    assert harness_browser("--name", "one", "-c", "print(js('window.name'))", env={**one, "BU_NAME": "two"}).stdout == "mine\n"
    assert harness_browser("--name", "two", "--reload", env=two).stdout == "two: stopped\n"
    assert who("one") == first
    assert daemon_status("browser").state == daemon_status("two").state == "absent"


def test_two_names_can_not_have_one_profile(killable: Pair) -> None:
    daemon, browser, tab = who()
    run = harness_browser("--name", "two", "-c", "1")
    assert run.returncode == 6
    first = run.stderr.splitlines()[0]
    assert first.startswith(
        f"harness-browser: the daemon 'two' did not start: the profile {killable.base / 'profile'} is in use by "
    )
    assert f"pid {daemon}" in first
    assert "set HARNESS_CHROME_PROFILE to another directory" in first
    # The browser of the other daemon is not ended.
    run = harness_browser("--name", "two", "--reload")
    assert (run.returncode, run.stdout, run.stderr) == (0, "two: was not running\n", "")
    assert serves()
    assert who() == (daemon, browser, tab)


# Errors before the program runs.


def assert_refused(run: subprocess.CompletedProcess[str], status: int, words: str, *, log: bool) -> None:
    """Assert that the error is one line that says what to do, followed by the end of the daemon's log if `log`."""
    assert (run.returncode, run.stdout) == (status, "")
    first, *tail = run.stderr.splitlines()
    assert first.startswith("harness-browser: ")
    assert words in first
    assert bool(tail) == log
    assert all(line.startswith("    ") for line in tail)
    assert "Traceback" not in run.stderr


def test_a_browser_that_is_not_there(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CHROME", "/nonexistent")
    run = harness_browser("-c", "print('never')")
    assert_refused(run, 6, "HARNESS_CHROME=/nonexistent is not a program; install Chrome or Chromium, or set", log=False)
    assert_nothing_left(fresh)
    monkeypatch.delenv("HARNESS_CHROME")
    assert serves()


@needs_path
def test_no_browser_at_all(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    run = harness_browser("-c", "print('never')")
    assert_refused(run, 6, "none is installed; install Chrome or Chromium, or set HARNESS_CHROME to its program", log=False)
    monkeypatch.undo()
    use(monkeypatch, fresh)
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    assert serves()


@needs_posix
def test_a_runtime_directory_that_is_open_to_others(attached: Path) -> None:
    (attached / "run").mkdir()
    (attached / "run").chmod(0o777)
    for words in (["-c", "print('never')"], ["--reload"]):
        run = harness_browser(*words)
        assert_refused(run, 5, f"{attached / 'run'} has mode 0777, so it is not private to you: run `chmod 700 ", log=False)
        assert processes_of(attached) == []
    subprocess.run(["/bin/sh", "-c", run.stderr.split("`")[1]], check=True)
    assert serves()


def run_without_websockets(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_WEBSOCKETS, *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)


def test_without_the_extra(attached: Path) -> None:
    run = run_without_websockets("-c", "print('never')")
    assert_refused(run, 6, f"run {sys.executable} -m pip install 'harness-ipc[browser]'", log=False)
    assert processes_of(attached) == []
    # A client of a running daemon does not need the extra.
    assert serves()
    run = run_without_websockets("-c", "print(js('6 * 7'))")
    assert (run.returncode, run.stdout, run.stderr) == (0, "42\n", "")


def test_without_the_extra_there_is_no_reload(fresh: Path) -> None:
    assert_refused(run_without_websockets("--reload"), 6, "-m pip install 'harness-ipc[browser]'", log=False)
    assert harness_browser("--reload").returncode == 0


@needs_posix
def test_a_daemon_that_is_stopped(warm: Path) -> None:
    before = who()
    with suspended(before[0]):
        assert_refused(harness_browser("-c", "print('never')"), 4, "timed out after", log=False)
    assert serves()
    assert who() == before


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("words", [["-c", "print(page_info())"], ["--reload"]], ids=str)
def test_a_daemon_of_another_program_is_not_touched(words: list[str]) -> None:
    with spawn_daemon("browser") as daemon:
        run = harness_browser(*words)
        assert daemon.process.poll() is None
        assert_refused(run, 6, "belongs to another program: choose another --name, or BU_NAME", log=False)
    assert serves()


# The end of the daemon.


def test_reload_ends_all(killable: Pair) -> None:
    base, daemon, browser = killable
    run = harness_browser("--reload")
    assert (run.returncode, run.stdout, run.stderr) == (0, "browser: stopped\n", "")
    assert not lives(daemon)
    assert not lives(browser)
    assert_nothing_left(base)
    assert not os.path.lexists(lock_of(base))
    assert serves()
    assert daemon not in who()
    assert browser not in who()


def test_commands_are_words(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("doctor", "status"):
        (tmp_path / word).write_text("print('a file')", encoding="utf-8")
        run = harness_browser(word, "--json")
        assert (run.returncode, run.stderr) == (0, "")
        assert json.loads(run.stdout)
        assert harness_browser(f"./{word}").stdout == "a file\n"
    assert json.loads(harness_browser("status", "--json").stdout)["state"] == "running"
    assert "connected to" in harness_browser("logs").stdout
    assert harness_browser("-c", ARGV, "doctor").stdout == "['-c', 'doctor']\n"
    assert harness_browser("reload", "words").returncode == 2


@pytest.mark.parametrize("word", ["reload", "--reload"])
def test_reload_when_nothing_runs(attached: Path, word: str) -> None:
    run = harness_browser(word)
    assert (run.returncode, run.stdout, run.stderr) == (0, "browser: was not running\n", "")
    assert list(attached.iterdir()) == []
    assert serves()


@needs_posix
def test_reload_after_the_daemon_was_killed(killable: Pair) -> None:
    base, daemon, browser = killable
    kill(daemon)
    assert lives(browser)
    run = harness_browser("--reload")
    expected = "browser: was not running; ended the browser that it had left\n"
    assert (run.returncode, run.stdout, run.stderr) == (0, expected, "")
    assert not lives(browser)
    assert_nothing_left(base)
    assert not os.path.lexists(lock_of(base))
    assert serves()


@needs_posix
@pytest.mark.parametrize("which", [0, 1], ids=["the daemon", "the browser"])
def test_reload_ends_a_suspended_daemon(killable: Pair, which: int) -> None:
    base, *pids = killable
    with suspended(pids[which]):
        run = harness_browser("--reload")
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.startswith("browser: stopped")
        assert not any(map(lives, pids))
        assert_nothing_left(base)
    assert serves()


def test_reload_does_not_end_a_foreign_browser(attached: Path, other: OtherBrowser) -> None:
    tabs = other.tabs()
    assert harness_browser("-c", "js('window.name = \"mine\"'); print(page_info()['url'])").stdout == "about:blank\n"
    assert browsers(attached) == []
    run = harness_browser("--reload")
    assert (run.returncode, run.stdout, run.stderr) == (0, "browser: stopped\n", "")
    assert daemons(attached) == []
    assert other.process.poll() is None
    assert other.tabs() == tabs
    assert harness_browser("-c", "print(js('window.name'))").stdout == "mine\n"


# Profiles that another browser has left locked.


@needs_linux
def test_a_lock_of_a_renamed_machine(killable: Pair) -> None:
    harness_browser("--reload")
    lock_of(killable.base).symlink_to("a-container-4")
    assert serves()


# Modules in the current directory.

# Built-in modules only: an import of the program itself does look there, as with Python.
# It kills the daemon, so that the next helper starts another while the program runs.
RESTARTS = """
import posix
from harness_ipc import ConnectionLost, DaemonNotRunning
from harness_ipc.browser.helpers import connect
page_info()
posix.kill(connect().pid, 9)
while True:
    try:
        page_info()
        break
    except (ConnectionLost, DaemonNotRunning):  # the daemon is being killed
        pass
"""
USES_THE_HELPERS = """
new_tab()
goto_url("data:text/html,<title>here</title>")
assert wait_for_load() and page_info()["title"] == "here"
assert js("await 6 * 7") == 42
click_at_xy(1, 1); type_text("a"); press_key("b"); scroll(1, 1); drain_events()
assert capture_screenshot()[:4] == b"\\x89PNG"
close_tab()
"""


class Checkout(NamedTuple):
    """A current directory with modules that no command may import."""

    directory: Path
    command: list[str]
    planted: PlantedModules

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.command, *words], input=stdin, capture_output=True, encoding="utf-8", timeout=PATIENCE, cwd=self.directory
        )
        assert self.planted.imported() == [], done.stderr
        return done


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "bin").mkdir()
    script = "import sys; from harness_ipc.browser.cli import main; sys.exit(main())"
    command = [sys.executable, file_of(tmp_path / "bin", script, "harness-browser")]
    directory = tmp_path / "checkout"
    directory.mkdir()
    return Checkout(directory, command, PlantedModules(directory, imported_names()))


@needs_posix
@pytest.mark.parametrize("way", ["-c", "-", "file"])
def test_nothing_is_imported_from_the_programs_directory(killable: Pair, checkout: Checkout, way: str) -> None:
    def run(source: str) -> subprocess.CompletedProcess[str]:
        words = {"-c": ["-c", source], "-": ["-"], "file": [file_of(checkout.directory, source)]}[way]
        return checkout.run(*words, stdin=source if way == "-" else "")

    for source, words, status in (
        ("print(page_info()['url'])", "about:blank", 0),
        (USES_THE_HELPERS, "", 0),
        ("raise ValueError(page_info()['url'])", "", 1),
        ("def f(:", "", 1),
        ("import sibling_that_is_not_there", "", 1),
    ):
        done = run(source)
        assert (done.returncode, done.stdout.strip()) == (status, words), done.stderr
    done = run(RESTARTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon_status("browser").pid != killable.daemon


@needs_posix
def test_no_option_imports_from_the_current_directory(killable: Pair, checkout: Checkout) -> None:
    for words in (["--doctor"], ["--reload"], ["-c", "page_info()"]):
        done = checkout.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    # The last one has started all.
    assert who()[0] != killable.daemon
