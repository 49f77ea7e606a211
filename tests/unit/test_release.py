"""A release has the version of the source, and a section of the changelog."""

from __future__ import annotations

import pytest

import harness_ipc
from tests.release import __main__ as release


def test_the_version_is_read_from_the_source() -> None:
    assert release.find_version(release.ROOT) == harness_ipc.__version__


@pytest.mark.parametrize(
    ("tag", "changelog", "problem"),
    [
        ("v1.2.3", "## 1.2.3 (2026-01-31)\n", None),
        ("v1.2.4", "## 1.2.3 (2026-01-31)\n", "the tag is v1.2.4, but harness_ipc.__version__ is 1.2.3"),
        ("1.2.3", "## 1.2.3 (2026-01-31)\n", "the tag is 1.2.3, but"),
        ("v1.2.3", "## 1.2.3 (not yet released)\n", "CHANGELOG.md has no section '## 1.2.3 (YYYY-MM-DD)'"),
        ("v1.2.3", "## 1.2.30 (2026-01-31)\n## 1x2.3 (2026-01-31)\n", "CHANGELOG.md has no section"),
    ],
)
def test_a_release_needs_its_version_and_a_dated_section(tag: str, changelog: str, problem: str | None) -> None:
    found = release.tag_problem(tag, "1.2.3", changelog)
    assert found is None if problem is None else found is not None and found.startswith(problem)


def test_another_tag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["--tag", "v999", "--tag-only"]) == 1
    assert capsys.readouterr().err.startswith("the tag is v999, but harness_ipc.__version__ is ")
