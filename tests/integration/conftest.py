"""What the tests of the manager share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.managed import end_daemons


@pytest.fixture
def base(private_directories: Path) -> Iterator[Path]:
    """Give the directory above the runtime directory, and end the test's daemons."""
    yield private_directories
    end_daemons(private_directories)
