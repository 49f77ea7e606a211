"""Rows of results, their limits, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]

OURS = "harness_ipc"
# References, not peers.
REFERENCES = ("floor", "U")
SCHEMA = 1


class Limit(NamedTuple):
    """`measure` is one of the row's ratios, or one of its extra columns; `stretch` is the target."""

    what: str
    workload: str
    contestant: str
    measure: str
    sense: str
    limit: float
    stretch: float


LIMITS = (
    Limit("one shot, of U's time", "one shot", OURS, "U", "at most", 1.2, 1.0),
    Limit("kept connection, of U's time", "kept connection", OURS, "U", "at most", 0.30, 0.25),
    Limit("8 clients, kept, of U's requests/s", "8 clients, kept", OURS, "U", "at least", 2.8, 3.5),
    Limit("8 clients, one shots, of U's requests/s", "8 clients, one shots", OURS, "U", "at least", 0.8, 1.0),
    Limit("16 MiB there and back, of the floor's time", "16 MiB, JSON", OURS, "floor", "at most", 1.5, 1.1),
    Limit("1,000 idle connections, MiB", "idle connections", "beside 1,000", "RSS MiB", "at most", 25, 3),
    Limit("latency beside 1,000 idle, of that beside none", "idle connections", "beside 1,000", "none", "at most", 1.3, 1.1),
    Limit("whole fresh process, of U's client", "fresh process", OURS, "U", "at most", 0.52, 0.45),
    Limit("cold start, of fresh interpreters", "cold start", OURS, "imports", "at most", 1.3, 1.1),
    Limit(
        "50 calls at once on one AsyncClient, of sleeps",
        "50 calls of 0.1 s at once",
        OURS,
        "sleep",
        "at most",
        3.0,
        1.5,
    ),
    Limit("16 threads on one Client, of sleeps", "16 threads, 320 calls of 10 ms", OURS, "sleep", "at most", 1.5, 1.2),
)
# The ratios in the README.
README_RATIOS = {
    "kept connection, of U's time": "time of a request on an open connection, relative to U",
    "one shot, of U's time": "time of a request with a new connection, both sides authenticated, relative to U",
    "8 clients, kept, of U's requests/s": "requests per second of eight clients, relative to U",
    "whole fresh process, of U's client": "time of a whole process that sends one request, relative to U's client",
    "kept connection, the fastest peer with the same job": "time on an open connection of the fastest peer, relative to ours",
}
# Every peer that does the same job takes longer than we do.
SLOWER = ("one shot", "kept connection")


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest of `values` that at least `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def make_row(workload: str, contestant: str, values: list[float], unit: str, **more: Any) -> Row:
    """Return the row for `values`. `unit` determines whether more is better: requests/s, or a time."""
    return {
        "workload": workload,
        "contestant": contestant,
        "missing": not values,
        "unit": unit,
        "samples": len(values),
        "p50": _rounded(statistics.median(values)) if values else None,
        "p99": _rounded(percentile(values, 99)) if values and unit != "requests/s" else None,
        "mean": _rounded(statistics.fmean(values)) if values else None,
        "by": "p50",
        "ratios": {},
        "same_job": None,
        "authenticates": None,
        "extra": {},
        **more,
    }


def compare(rows: list[Row], references: dict[str, str], by: str = "p50") -> list[Row]:
    """Give each row its ratio to each reference, a short name and a contestant, and return the rows."""
    values = {row["contestant"]: row[by] for row in rows if not row["missing"]}
    for row in rows:
        if not row["missing"]:
            row["by"] = by
            row["ratios"] = {name: _rounded(row[by] / values[of]) for name, of in references.items() if of in values}
    return rows


def judge(rows: list[Row]) -> list[Row]:
    """Return the rows of the limits that apply."""
    found = {(row["workload"], row["contestant"]): row for row in rows if not row["missing"]}
    verdicts = []
    for limit in LIMITS:
        row = found.get((limit.workload, limit.contestant), {"ratios": {}, "extra": {}})
        measured = (row["ratios"] | row["extra"]).get(limit.measure)
        if measured is not None:
            verdicts.append(_verdict(limit.what, measured, limit.sense, limit.limit, limit.stretch))
    for workload in SLOWER:
        peers = {
            name: row["p50"]
            for (of, name), row in found.items()
            if of == workload and row["same_job"] and name not in (OURS, *REFERENCES)
        }
        if peers and (workload, OURS) in found:
            nearest = min(peers, key=lambda name: peers[name])
            ratio = _rounded(peers[nearest] / found[workload, OURS]["p50"])
            verdicts.append(_verdict(f"{workload}, the fastest peer with the same job ({nearest})", ratio, "at least", 1.0))
    return verdicts


def _verdict(what: str, measured: float, sense: str, limit: float, stretch: float | None = None) -> Row:
    within = measured <= limit if sense == "at most" else measured >= limit
    verdict = "pass" if within else "over"
    return {"what": what, "measured": measured, "sense": sense, "limit": limit, "stretch": stretch, "verdict": verdict}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _table(head: list[str], body: Iterable[list[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_shown(cell) for cell in cells] for cells in body)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def readme_ratios(results: dict[str, Any]) -> str:
    """Return the table of five ratios that the README shows."""
    measured = {row["what"].partition(" (")[0]: row["measured"] for row in results["limits"]}
    return "\n".join(_table(["", "ratio"], ([text, measured[what]] for what, text in README_RATIOS.items()))).rstrip("\n")


def markdown(results: dict[str, Any]) -> str:
    """Return results and limits as Markdown."""
    machine = results["machine"]
    versions = [f"{name} {version or 'not installed'}" for name, version in machine["peers"].items()]
    date = f"{results['date']}, " if "date" in results else ""
    lines = [f"{date}{machine['system']}, {machine['cpus']} CPUs, {machine['python']}; {', '.join(versions)}.", ""]
    if results["limits"]:
        lines += _table(
            ["ratio or amount", "measured", "limit", "stretch", ""],
            (
                [row["what"], row["measured"], f"{row['sense']} {row['limit']:g}", row["stretch"], row["verdict"]]
                for row in results["limits"]
            ),
        )
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault(row["workload"], []).append(row)
    for workload, rows in groups.items():
        ratios = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
        extra = list(dict.fromkeys(name for row in rows for name in row["extra"]))
        kinds = ["same_job", "authenticates"] if rows[0]["same_job"] is not None else []
        shown = ["p50", *(["p99"] if any(row["p99"] for row in rows) else []), *(["mean"] if rows[0]["by"] == "mean" else [])]
        head = [f"{workload} ({rows[0]['unit']})", *(kind.replace("_", " ") for kind in kinds), *shown]
        lines += _table(
            head + [f"of {name}" for name in ratios] + extra,
            (
                [row["contestant"], *(row[kind] for kind in kinds)]
                + ["not installed" if row["missing"] and column == "p50" else row[column] for column in shown]
                + [row["ratios"].get(name) for name in ratios]
                + [row["extra"].get(name) for name in extra]
                for row in rows
            ),
        )
    return "\n".join(lines).rstrip("\n")
