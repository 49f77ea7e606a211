"""Bar charts of the benchmarks' JSON as SVG. Colors are defined in plots.css, and follow the theme."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

WIDTH, LABEL_WIDTH, ROW_HEIGHT = 720, 210, 26


class Bar(NamedTuple):
    label: str
    value: float
    shown: str
    kind: str = ""


def bars(results: dict[str, Any], workload: str) -> list[Bar]:
    """Return a bar for each contestant that was measured: the shortest time, or the most requests, first."""
    rows = [row for row in results["rows"] if row["workload"] == workload and not row["missing"]]
    if not rows:
        raise ValueError(f"no results for the workload {workload!r}")
    unit = rows[0]["unit"]
    rows.sort(key=lambda row: row["p50"], reverse="/s" in unit)
    return [Bar(row["contestant"], row["p50"], f"{row['p50']:,.4g} {unit}".replace("e+04", ""), _kind(row)) for row in rows]


def _kind(row: dict[str, Any]) -> str:
    if row["contestant"].startswith("harness_ipc"):
        return "ours"
    return "peer" if row["same_job"] in (True, None) else "other"


def svg(title: str, rows: list[Bar]) -> str:
    """Return a chart of horizontal bars. `title` is its text for screen readers."""
    height = ROW_HEIGHT * len(rows) + 8
    longest = max(row.value for row in rows)
    scale = (WIDTH - LABEL_WIDTH - 120) / longest
    lines = [f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">']
    lines.append(f"<title>{escape(title)}</title>")
    for index, row in enumerate(rows):
        top, length = index * ROW_HEIGHT + 4, max(row.value * scale, 1)
        middle = top + ROW_HEIGHT / 2
        lines += [
            f'<text x="{LABEL_WIDTH - 8}" y="{middle}" class="label">{escape(row.label)}</text>',
            f'<rect x="{LABEL_WIDTH}" y="{top + 3}" width="{length:.1f}" height="{ROW_HEIGHT - 6}" class="{row.kind}"/>',
            f'<text x="{LABEL_WIDTH + length + 8:.1f}" y="{middle}">{escape(row.shown)}</text>',
        ]
    return "\n".join([*lines, "</svg>"])
