"""Coverage-guided fuzzing: ``python -m tests.fuzz [--seconds N] [--keep] [TARGET ...]``.

Needs atheris. Each target runs in its own process, starting from the inputs in ``tests/fuzz/corpus/<target>``. An input that
fails is stored there as ``crash-...``, and the unit tests fail on it until the bug is fixed. With ``--keep``, inputs that reach
new code are stored too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORDS = (
    *("#CHALLENGE#", "#WELCOME#", "#FAILURE#", "{md5}", "{sha1}", "{sha256}", "{sha384}", "{sha3_256}"),
    *('{"', '":', "NaN", "Infinity", "1e999", "-0.0", r"\\ud800", '"meta"', '"result"', '"error"', '"message"', '"type"'),
    *('"schema"', '"name"', '"address"', '"authkey"', '"pid"', '"create_time"', '"started_at"', '"argv"', '"max_message"'),
    *("--name=", "--timeout=", "--help", "-", r"\xff\xff\xff\xff", r"\x7f\xff\xff\xff", r"\x80\x00\x00\x00", r"\x1b["),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz each target for some seconds, print the results, and return 1 if a bug was found."""
    from .targets import CORPUS, TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each target (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reached new code")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}: use {', '.join(TARGETS)}")
    results = []
    for target in options.targets or TARGETS:
        kept = CORPUS / target
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hi-") as directory:
            found, words, program = (Path(directory, name) for name in ("found", "words", target))
            found.mkdir()
            # libFuzzer restarts itself by this name.
            program.write_text(
                f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.fuzz.__main__ --one {target} "$0" "$@"\n'
            )
            program.chmod(0o700)
            words.write_text("".join('"{}"\n'.format(word.replace('"', r"\"")) for word in _WORDS))
            status, executions = _run(
                program,
                f"-max_total_time={options.seconds}",
                f"-artifact_prefix={kept}{os.sep}",
                f"-dict={words}",
                "-max_len=4096",
                # The limits of one input, in seconds and in MiB of memory.
                "-timeout=30",
                "-rss_limit_mb=1024",
                "-malloc_limit_mb=64",
                str(found),
                str(kept),
            )
            if options.keep and status == 0:
                _run(program, "-merge=1", str(kept), str(found))
            new = len(list(found.iterdir()))
        results.append((target, status, f"{target}: {executions} executions, {new} new inputs, exit status {status}"))
    print("\n".join(line for _, _, line in results))
    return 1 if any(status for _, status, _ in results) else 0


def _run(program: Path, *arguments: str) -> tuple[int, int]:
    """Run libFuzzer on a target in a new process. Return its exit status and the number of executions."""
    directories = {f"HARNESS_IPC_{kind}_DIR": str(program.with_name(kind.lower())) for kind in ("RUNTIME", "LOG")}
    executions = 0
    with subprocess.Popen(
        [program, *arguments], env={**os.environ, **directories}, stderr=subprocess.PIPE, text=True, errors="backslashreplace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(f"{program.name:9} {line.rstrip()}", flush=True)
            if done := re.match(r"#(\d+)\t|Done (\d+) runs", line):
                executions = int(done[1] or done[2])
    return process.returncode, executions


def _fuzz_one(target: str, arguments: Sequence[str]) -> None:
    """Run libFuzzer in this process, with its own command line."""
    # It has no types, and may not be installed.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["harness_ipc", "multiprocessing.connection", "json"]):
        from .targets import TARGETS
    atheris.Setup(list(arguments), TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _fuzz_one(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
