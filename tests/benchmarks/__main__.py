"""Compares the package with peers and two references: latency, throughput, memory.

The floor is a blocking socket with a thread for each connection, without authentication or event loop. U is a daemon without
this package: an asyncio Unix server with JSON lines, a connection for each request, and no authentication. Quote ratios, since
the speed of a machine drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import report
from .clients import CONTESTANTS
from .workloads import WORKLOADS, run, version_of


def describe_machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "peers": {it.needs: version_of(it.needs) for it in CONTESTANTS.values() if it.needs},
    }


def measure(workloads: list[str], rounds: int) -> list[report.Row]:
    import resource

    # Inherited by the daemon and its clients: 1,000 connections need as many descriptors.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    rows = []
    with tempfile.TemporaryDirectory(prefix="hib-") as directory:
        os.environ |= {"HARNESS_IPC_RUNTIME_DIR": f"{directory}/run", "HARNESS_IPC_LOG_DIR": f"{directory}/log"}
        # Some peers choose a path below TMPDIR. Installed packages are compiled, so compile ours too.
        os.environ |= {"TMPDIR": directory, "PYTHONPYCACHEPREFIX": f"{directory}/cache"}
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for number, workload in enumerate(workloads):
            print(f"{workload} ...", file=sys.stderr)
            rows += run(workload, f"{directory}/{number}", rounds)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant (default: 20)")
    parser.add_argument(
        "--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=f"of {', '.join(map(repr, WORKLOADS))}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--date", help="note this date in the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print the table of these results")
    options = parser.parse_args()
    if options.table:
        print(report.markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    results: dict[str, Any] = {"schema": report.SCHEMA, "machine": describe_machine()}
    if options.date:
        results["date"] = options.date
    results["rows"] = rows = measure(options.only or list(WORKLOADS), options.rounds)
    results["limits"] = report.judge(rows)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
