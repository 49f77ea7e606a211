"""The snippets of the README and of docs/ are run, and tables are compared with the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import Namespace, cli, ensure_daemon, errors, ping, request
from harness_ipc.testing import RunningDaemon
from tests.support.commands import run_command
from tests.support.marks import needs_network, needs_posix
from tests.support.pages import ALL_FILES, COMMANDS, FILES, OUTPUTS, PAGES, README, ROOT, page
from tests.support.processes import PATIENCE, spawn_python, wait_until

_JSON_TYPES = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "integer",
    list: "array",
    str: "string",
    type(None): "null",
}
# tests/browser/test_porting.py runs its snippets.
_PORTING = "porting-browser-harness.md"
# tests/browser runs these.
_WITH_BROWSER = {"tabs.py", "visit.py"}
# Separate tests below run or import these.
_TESTED_APART = {"ask.py", "careful.py", "index.py", "service.py", "test_texts.py", "texts.py", "wire.py", "words.py"}


@pytest.fixture
def snippets(tmp_path: Path, ipc_namespace: Namespace) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def _run(script: Path) -> str:
    result = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_every_python_block_is_a_file_that_a_test_runs() -> None:
    for path, text in PAGES.items():
        if path.name == _PORTING:
            continue
        assert text.count("```python") == len(re.findall(r"<!-- file: \S+ -->\n```python", text)), path
    assert OUTPUTS.keys() | _TESTED_APART | _WITH_BROWSER == FILES.keys()


def test_a_file_that_several_pages_show_is_the_same_in_all() -> None:
    assert all(FILES[name] == text for name, text in ALL_FILES)


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_a_program_prints_text_of_its_page(name: str, snippets: Path) -> None:
    assert _run(snippets / name) == OUTPUTS[name]


@needs_posix
def test_shell_blocks_parse_and_name_commands_that_exist() -> None:
    blocks = [block for text in PAGES.values() for block in re.findall(r"^```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)]
    assert len(blocks) > len(COMMANDS)
    for block in blocks:
        subprocess.run(["/bin/sh", "-n"], input=block, text=True, check=True)
    assert {verb for block in blocks for verb in re.findall(r"^harness-ipc (\w+)", block, re.MULTILINE)} <= _known_commands()


def test_the_readme_is_short_and_has_the_two_set_up_commands() -> None:
    assert README.stat().st_size <= 7 * 1024
    assert sorted(COMMANDS) == ["demo", "tests"]


def test_links_of_the_readme_lead_to_files() -> None:
    for path in (README, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "SECURITY.md"):
        links = re.findall(r'(?:\]\(|srcset="|src=")(?!https?:|#)([^)#"]+)', path.read_text(encoding="utf-8"))
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_tests_that_the_table_of_attackers_names_exist() -> None:
    text = (ROOT / "tests" / "SECURITY.md").read_text(encoding="utf-8")
    for folder, name in re.findall(r"`(?:(unit|browser)/)?(test_\w+\.py)`", text):
        assert (ROOT / "tests" / (folder or "integration") / name).exists(), name
    attackers = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[2:]
    assert [attacker for attacker in attackers if f"| {attacker} |" not in page("security.md")] == []


def test_the_pictures_are_those_that_the_script_draws() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pictures
    finally:
        sys.path.pop(0)
    for name, draw in pictures.PICTURES.items():
        for theme in pictures.THEMES:
            drawn = (ROOT / "docs" / "_static" / f"{name}-{theme}.svg").read_text(encoding="utf-8")
            assert drawn == draw(theme), f"python docs/pictures.py draws another {name}"


def test_the_service_and_a_standard_library_client(snippets: Path) -> None:
    with spawn_python(str(snippets / "service.py")) as daemon:
        wait_until(lambda: ping("words"))
        assert _run(snippets / "ask.py") == "4\n"
        assert "harness_ipc" not in re.sub("harness-ipc/1", "", FILES["wire.py"])
        assert _run(snippets / "wire.py") == "{'result': 3}\n"
        assert request("words", {"meta": "shutdown"}) == {"shutdown": True}
        assert daemon.wait() == 0


def test_the_methods(snippets: Path, ipc_daemon: Callable[..., RunningDaemon]) -> None:
    (snippets / "a.txt").write_text("the quick brown fox", encoding="utf-8")
    counted = {"file": str(snippets / "a.txt"), "words": 4}
    with ipc_daemon([sys.executable, str(snippets / "texts.py")], "texts").connect(request_timeout=PATIENCE) as client:
        assert client.call("split", text="a b c", most=1) == ["a", "b c"]
        assert client.call("count", file=snippets / "a.txt") == counted
        assert list(client.stream("reindex", folder=snippets)) == [counted]


def test_the_object_app(snippets: Path) -> None:
    with spawn_python(str(snippets / "index.py")) as daemon:
        wait_until(lambda: ping("index"))
        reply = request("index", {"params": {"word": "fox"}})
        assert reply["result"] is True
        assert reply["asked_by"] in (os.getpid(), None)
        assert request("index", {"meta": "health"}) == {"health": {"words": 2}}
        if sys.platform != "win32":
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0


def test_the_careful_client(snippets: Path) -> None:
    assert _run(snippets / "careful.py").startswith("start it: no daemon 'nobody' is running")


def test_the_tests_of_a_daemon(snippets: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_texts.py"]
    result = subprocess.run(command, cwd=snippets, capture_output=True, text=True, timeout=PATIENCE)
    assert "2 passed" in result.stdout, result.stdout


def _json_of(*arguments: str) -> Any:
    return json.loads(run_command(*arguments, "--json").stdout)


def _documented(command: str) -> dict[str, str]:
    """Return the fields in the table of the command's output, in order, with their types."""
    table = page("cli.md").partition(f"<!-- json: {command} -->\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\S+)` \| ([a-z ]+) \|", table, re.MULTILINE))


def _assert_documented(command: str, *outputs: dict[str, Any]) -> None:
    documented = _documented(command)
    for shape in outputs:
        assert list(shape) == list(documented)
        for field, value in shape.items():
            assert _JSON_TYPES[type(value)] in documented[field].split(" or "), field


def test_json_output_matches_the_docs(snippets: Path) -> None:
    # In several states: absent, healthy, without a health check, stopped.
    _assert_documented("status", _json_of("status", "--name", "words"))
    for name, script in ("words", "service.py"), ("index", "index.py"):
        ensure_daemon(name, [sys.executable, str(snippets / script)])
    words, index = (_json_of("status", "--name", name, "--timeout", str(PATIENCE)) for name in ("words", "index"))
    assert [(status["state"], status["problem"]) for status in (words, index)] == [("running", None)] * 2
    _assert_documented("status", words, index, *_json_of("list"))
    # These are null without an app version, without a problem and after a start.
    assert {field for field, value in index.items() if value is None} == {"app_version", "problem", "progress"}
    assert words["health"] is None
    assert index["health"] == {"words": 2}
    _assert_documented("stop", _json_of("stop", "--name", "words"), _json_of("stop", "--name", "words"))
    ensure_daemon("texts", [sys.executable, str(snippets / "texts.py")])
    described = _json_of("describe", "--name", "texts")
    assert [found["name"] for found in described["methods"]] == ["count", "reindex", "split"]
    for found in described["methods"]:
        _assert_documented("describe", described | {f"methods[].{field}": value for field, value in found.items()})
    report = _json_of("doctor")
    for finding in report["findings"]:
        _assert_documented("doctor", report | {f"findings[].{field}": value for field, value in finding.items()})


def test_the_table_of_states_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d) \|$", page("guide/lifecycle.md"), re.MULTILINE)
    assert {state: int(status) for state, status in rows} == cli._STATE_STATUS


def test_the_block_of_commands_is_what_the_parser_takes() -> None:
    block = page("cli.md").partition("<!-- commands -->\n")[2].partition("\n\n")[0]
    assert {*re.findall(r"^harness-ipc (\w+)", block, re.MULTILINE)} == _known_commands()


def _known_commands() -> set[str]:
    known = re.search(r"invalid choice: 'nonesuch' \(choose from (.*)\)", run_command("nonesuch").stderr)
    assert known is not None
    return {*known[1].replace("'", "").split(", ")}


def test_the_table_of_errors_is_complete() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page("errors.md"), re.MULTILINE))
    leaves = {error.__name__: error for error in errors.HarnessIPCError.__subclasses__()}
    assert rows.keys() == leaves.keys()
    for name, builtin in rows.items():
        assert builtin in [base.__name__ for base in leaves[name].__mro__]


@needs_posix
@needs_network
def test_the_set_up_command_on_a_fresh_checkout(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "harness_ipc", "_harness_ipc_pytest.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    # `python3` on PATH is the interpreter under test.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        ["/bin/sh", "-c", COMMANDS["demo"]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing: no process, no file" in result.stdout
    assert "dropped after" in result.stdout
