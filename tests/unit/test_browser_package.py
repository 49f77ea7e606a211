"""The browser harness uses only the public API."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import harness_ipc
from harness_ipc.browser import daemon_name

SOURCES = sorted((Path(harness_ipc.__file__).parent / "browser").glob("*.py"))


def private_uses(source: str) -> list[str]:
    """Return the private names of the core that `source` uses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level > 1:
                found.append(f"{'.' * node.level}{module}")
            elif node.level == 0 and module.startswith("harness_ipc."):
                found.append(module)
            elif node.level == 0 and module == "harness_ipc":
                found += [alias.name for alias in node.names if alias.name not in harness_ipc.__all__]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("harness_ipc.")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "harness_ipc":
            found += {node.attr} - {*harness_ipc.__all__, "__file__"}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_uses_only_public_names(path: Path) -> None:
    assert private_uses(path.read_text(encoding="utf-8")) == []


def test_a_private_name_would_be_found() -> None:
    source = "from ..messages import encode\nfrom harness_ipc.auth import Keys\nimport harness_ipc\nharness_ipc.endpoint\n"
    assert private_uses(source) == ["..messages", "harness_ipc.auth", "endpoint"]


def test_the_variable_names_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BU_NAME", raising=False)
    assert daemon_name() == "browser"
    monkeypatch.setenv("BU_NAME", "work")
    assert daemon_name() == "work"
