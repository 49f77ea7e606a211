"""Fixtures of the unit tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.conftest import set_directories, temporary_directory


@pytest.fixture(scope="session")
def spare() -> Iterator[list[TemporaryDirectory[str]]]:
    """Yield a list for a directory that a test has not changed, for the next test. Remove it at the end."""
    directories: list[TemporaryDirectory[str]] = []
    yield directories
    for directory in directories:
        directory.cleanup()


@pytest.fixture(autouse=True)
def private_directories(monkeypatch: pytest.MonkeyPatch, spare: list[TemporaryDirectory[str]]) -> Iterator[Path]:
    """Point the package at an empty directory: that of the last test, if it was not changed, since most tests use none."""
    directory = spare.pop() if spare else temporary_directory()
    before = fingerprint(directory.name)
    yield set_directories(monkeypatch, directory.name)
    if fingerprint(directory.name) == before:
        spare.append(directory)
    else:
        directory.cleanup()


def fingerprint(directory: str) -> tuple[list[str], int, int, int]:
    """Return the content of `directory`, its inode, mode and owner."""
    info = os.stat(directory)
    return os.listdir(directory), info.st_ino, info.st_mode, info.st_uid
