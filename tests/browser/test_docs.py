"""The example of docs/browser.md, run as it stands there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.marks import needs_chromium
from tests.support.pages import FILES
from tests.support.processes import PATIENCE

pytestmark = needs_chromium


def test_the_guest_book(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "visit.py").write_text(FILES["visit.py"], encoding="utf-8")
    command = [sys.executable, "-W", "error", "visit.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (run.stdout, run.stderr) == ("Guest book - Ada! was here\nguests.png\n", "")
    assert (tmp_path / "guests.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
