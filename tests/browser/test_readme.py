"""The README's example of the browser, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = needs_chromium

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_guest_book(fresh: Path, tmp_path: Path) -> None:
    source = re.findall(r"<!-- file: visit\.py -->\n```python\n(.*?)```", README, re.DOTALL)[0]
    (tmp_path / "visit.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-W", "error", "visit.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (run.stdout, run.stderr) == ("Guest book - Ada! was here\nguests.png\n", "")
    assert (tmp_path / "guests.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
