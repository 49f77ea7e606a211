"""Two directives over tests/benchmarks/results.json: a plot of one workload, and the tables of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plots
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from tests.benchmarks import report

RESULTS = Path(__file__).parents[2] / "tests" / "benchmarks" / "results.json"


def _results(directive: SphinxDirective) -> dict[str, Any]:
    directive.env.note_dependency(str(RESULTS))
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


class BenchmarkPlot(SphinxDirective):
    """`{benchmark-plot} WORKLOAD`: a bar for each contestant."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        workload = self.arguments[0]
        return [nodes.raw("", plots.svg(workload, plots.bars(_results(self), workload)), format="html")]


class BenchmarkTables(SphinxDirective):
    """`{benchmark-tables}`: the machine, the limits, and a table for each workload."""

    def run(self) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(report.markdown(_results(self)).splitlines()), 0, container)
        return container.children


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("benchmark-plot", BenchmarkPlot)
    app.add_directive("benchmark-tables", BenchmarkTables)
    return {"parallel_read_safe": True}
