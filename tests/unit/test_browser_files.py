"""Atomic replacement of files, with the right mode, and never through a link."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness_ipc.browser._files import move_file, replace_file, safe_name
from tests.support.marks import needs_linux, needs_posix, needs_root

STRANGER = 12345
DATA = b"new" * 100_000


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_is_written_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in b"first", b"", DATA, b"1\r\n2\n":
        replace_file(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


def test_a_name_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_file("file", DATA)
    assert os.listdir(tmp_path) == ["file"]


@needs_posix
@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277], indirect=True)
def test_a_new_file_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    replace_file(tmp_path / "file", DATA)
    assert mode(tmp_path / "file") == 0o600


@needs_posix
@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
@pytest.mark.parametrize("bits", [0o600, 0o640, 0o400, 0o777, 0o4755])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, umask: int, bits: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(bits)
    replace_file(path, DATA)
    assert mode(path) == bits & 0o777
    assert path.read_bytes() == DATA


@needs_posix
@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_a_file_is_private_until_it_is_complete(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fchmod = os.fchmod

    def look(file: int, bits: int) -> None:
        found = os.fstat(file)
        seen.append((stat.S_IMODE(found.st_mode), found.st_size, bits))
        fchmod(file, bits)

    monkeypatch.setattr(os, "fchmod", look)
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o666)
    replace_file(tmp_path / "file", DATA)
    assert seen == [(0o600, len(DATA), 0o666)]


@needs_posix
@pytest.mark.parametrize("umask", [0o022], indirect=True)
@pytest.mark.parametrize("target", ["victim", "nowhere", "."])
def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path, umask: int, target: str) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "victim").chmod(0o600)
    path = tmp_path / "link"
    path.symlink_to(target)
    replace_file(path, DATA)
    assert (path.is_symlink(), path.read_bytes(), mode(path)) == (False, DATA, 0o600)
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["link", "victim"]


@needs_posix
def test_another_name_of_the_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    os.link(tmp_path / "victim", tmp_path / "file")
    replace_file(tmp_path / "file", DATA)
    assert (tmp_path / "victim").read_bytes() == b"precious"


@needs_posix
def test_many_at_once_leave_one_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 1_000_000 for number in range(8)]
    threads = [threading.Thread(target=replace_file, args=(path, data)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["directory", "nowhere/file", "regular/file"])
def test_an_error_names_the_path_that_was_given(tmp_path: Path, place: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "regular").write_bytes(b"old")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - of whatever kind
        replace_file(tmp_path / place, DATA)
    assert caught.value.filename == str(tmp_path / place)
    assert str(caught.value).endswith(f": {str(tmp_path / place)!r}")
    assert sorted(os.listdir(tmp_path)) == ["directory", "regular"]
    assert os.listdir(tmp_path / "directory") == []


@needs_linux
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Like a full disk, it fails after a partial write. Python ignores SIGXFSZ.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            replace_file(path, DATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", DATA)
    assert os.listdir(tmp_path) == []


# With a name chosen by a server.


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("report.csv", "report.csv"),
        ("Grüße 日本.tar.gz", "Grüße 日本.tar.gz"),
        ("../../a.txt", "_.._a.txt"),
        ("C:\\a\\b?.txt", "C__a_b_.txt"),
        (".bashrc", "bashrc"),
        ("..", "download"),
        ("", "download"),
        ("nul.txt", "_nul.txt"),
        ("a\r\n\u202eb.txt", "a___b.txt"),
        ("x" * 300 + ".txt", "x" * 196 + ".txt"),
        ("a." + "y" * 300, "a." + "y" * 49),
        ("ü" * 200, "ü" * 100),
    ],
)
def test_a_safe_name(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_a_file_is_moved_to_the_first_free_name(tmp_path: Path) -> None:
    names = []
    for number in range(3):
        (tmp_path / "source").write_text(str(number))
        names.append(os.path.basename(move_file(str(tmp_path / "source"), str(tmp_path), "a.txt")))
    assert names == ["a.txt", "a (1).txt", "a (2).txt"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]
    with pytest.raises(FileNotFoundError):
        move_file(str(tmp_path / "source"), str(tmp_path), "b.txt")
    assert sorted(os.listdir(tmp_path)) == sorted(names)


# In a directory shared with another user.

AS_STRANGER = """
import os, sys
from harness_ipc.browser._files import replace_file
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
try:
    replace_file(sys.argv[2], b"new")
except OSError as error:
    print(type(error).__name__, error.filename)
"""


def as_stranger(path: Path) -> str:
    """Replace the file as another user, and return the error."""
    run = subprocess.run(
        [sys.executable, "-c", AS_STRANGER, str(STRANGER), str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    return run.stdout.strip()


@pytest.fixture
def shared(private_directories: Path) -> Path:
    """A directory that everybody can write to."""
    path = private_directories / "shared"
    path.mkdir()
    path.chmod(0o777)
    private_directories.chmod(0o711)
    return path


@needs_root
@pytest.mark.parametrize("umask", [0o077], indirect=True)
def test_the_mode_of_another_users_file_is_not_kept(shared: Path, umask: int) -> None:
    path = shared / "file"
    path.touch()
    os.chown(path, STRANGER, STRANGER)
    path.chmod(0o666)
    replace_file(path, DATA)
    assert (mode(path), path.stat().st_uid, path.read_bytes()) == (0o600, 0, DATA)


@needs_root
@pytest.mark.parametrize("planted", ["file", "link"])
def test_another_users_file_in_a_sticky_directory_is_an_error(shared: Path, planted: str) -> None:
    shared.chmod(0o1777)
    path, victim = shared / "file", shared / "victim"
    victim.write_bytes(b"precious")
    victim.chmod(0o666)
    if planted == "file":
        path.write_bytes(b"old")
    else:
        path.symlink_to(victim)
    assert as_stranger(path) == f"PermissionError {path}"
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(shared)) == ["file", "victim"]


@needs_root
def test_a_directory_that_can_not_be_written_to(shared: Path) -> None:
    assert as_stranger(shared / "file") == ""
    shared.chmod(0o755)
    assert as_stranger(shared / "file") == f"PermissionError {shared / 'file'}"
    assert (shared / "file").read_bytes() == b"new"
    assert os.listdir(shared) == ["file"]
