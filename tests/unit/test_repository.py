"""Dependencies of the workflow are pinned: tags can be moved, and new versions can be anything."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no workflows")
def test_actions_are_pinned_and_keep_no_credentials() -> None:
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        used = re.findall(r"uses: (\S+)(.*)", text)
        assert used
        for action, comment in used:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), f"{path.name}: {action} is not pinned by its commit"
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{path.name}: {action} does not say which version it is"
        checkouts = sum(action.startswith("actions/checkout@") for action, _ in used)
        assert text.count("persist-credentials: false") == checkouts
        # For all jobs, without exceptions.
        assert re.search(r"^permissions:\n  contents: read\n(?!  )", text, re.MULTILINE)
        assert text.count("permissions:") == 1


def test_build_requirements_are_bounded() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert requirements
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement) for requirement in requirements)


def test_pre_commit_and_tox_run_the_same_ruff() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    versions = set(re.findall(r"ruff~=[\d.]+", hooks + (ROOT / "tox.ini").read_text(encoding="utf-8")))
    assert len(versions) == 1
