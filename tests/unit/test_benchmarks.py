"""The evaluation of benchmarks, and their results in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import report
from tests.benchmarks.clients import CONTESTANTS
from tests.benchmarks.workloads import WORKLOADS

_ROOT = Path(__file__).parents[2]
_RESULTS = json.loads((_ROOT / "tests" / "benchmarks" / "results.json").read_text(encoding="utf-8"))


def _row(contestant: str, *values: float, workload: str = "one shot", same_job: bool = True) -> report.Row:
    return report.make_row(workload, contestant, list(values), "µs", same_job=same_job, authenticates=False)


def test_the_readme_shows_the_ratios_of_the_results() -> None:
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- ratios -->\n(.*?)\n<!-- /ratios -->", readme, re.DOTALL)
    assert shown.strip("\n") == report.readme_ratios(_RESULTS)


def test_results_cover_all_workloads_and_limits() -> None:
    found = {(row["workload"], row["contestant"]) for row in _RESULTS["rows"] if not row["missing"]}
    assert {workload for workload, _ in found} == set(WORKLOADS)
    for workload in report.SLOWER:
        assert {contestant for of, contestant in found if of == workload} == set(CONTESTANTS)
    assert report.judge(_RESULTS["rows"]) == _RESULTS["limits"]
    assert len(_RESULTS["limits"]) == len(report.LIMITS) + len(report.SLOWER)
    assert set(_RESULTS) - {"date"} == {"schema", "machine", "limits", "rows"}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7], 99, 7),
        ([2, 1], 50, 1),
        ([2, 1], 51, 2),
        (range(1, 101), 99, 99),
        (range(1, 1001), 99, 990),
        (range(100, 0, -1), 0, 1),
    ],
)
def test_a_percentile_is_a_measured_value(values: list[float], percent: float, expected: float) -> None:
    assert report.percentile(values, percent) == expected


def test_ratios_use_the_chosen_measure() -> None:
    rows = [_row("U", 10, 20, 90), _row("harness_ipc", 5, 10, 15), _row("absent")]
    assert (rows[0]["p50"], rows[0]["mean"], rows[0]["p99"]) == (20, 40, 90)
    report.compare(rows, {"U": "U", "none": "not there"})
    assert [row["ratios"] for row in rows] == [{"U": 1.0}, {"U": 0.5}, {}]
    assert [row["ratios"] for row in report.compare(rows, {"U": "U"}, by="mean")] == [{"U": 1.0}, {"U": 0.25}, {}]
    assert rows[2]["missing"]
    assert rows[2]["p50"] is None


@pytest.mark.parametrize(
    ("ours", "peer", "verdicts"), [(120, 121, ["pass", "pass"]), (121, 122, ["over", "pass"]), (110, 109, ["pass", "over"])]
)
def test_limits_are_inclusive(ours: float, peer: float, verdicts: list[str]) -> None:
    rows = [_row("U", 100), _row("harness_ipc", ours), _row("peer", peer), _row("floor", 1), _row("other", 2, same_job=False)]
    limits: list[dict[str, Any]] = report.judge(report.compare(rows, {"U": "U"}))
    assert [limit["verdict"] for limit in limits] == verdicts
    assert limits[1]["what"].endswith("(peer)")
    more_is_better = [
        report.make_row("8 clients, kept", name, [rate], "requests/s") for name, rate in (("U", 100), ("harness_ipc", 279))
    ]
    (limit,) = report.judge(report.compare(more_is_better, {"U": "U"}))
    assert limit["verdict"] == "over"


def test_a_peer_that_is_not_installed_is_in_the_table() -> None:
    rows = report.compare([_row("U", 100), _row("peer")], {"U": "U"})
    machine = {"system": "Linux", "cpus": 2, "python": "CPython 3.11.7", "peers": {"peer": None}}
    text = report.markdown({"machine": machine, "rows": rows, "limits": report.judge(rows)})
    assert text.splitlines() == [
        "Linux, 2 CPUs, CPython 3.11.7; peer not installed.",
        "",
        "| one shot (µs) | same job | authenticates | p50 | p99 | of U |",
        "| --- | --- | --- | --- | --- | --- |",
        "| U | yes | no | 100 | 100 | 1 |",
        "| peer | yes | no | not installed |  |  |",
    ]
