"""Names, directories and private files: what is unsafe is refused with a remedy that works, and looking creates nothing."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from harness_ipc import endpoint, log_path, paths, runtime_dir, runtime_path, transport
from harness_ipc.errors import DaemonNotRunning, HarnessIPCError, InvalidName, StartFailed, UnsafeDirectory
from tests.marks import needs_linux, needs_posix, needs_root

STRANGER = 12345


@pytest.fixture
def run(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a runtime directory that does not exist, and that a shell would not take unquoted."""
    path = private_directories / "it's a dir"
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", str(path))
    return path


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def next_descriptor() -> int:
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


def apply(remedy: str) -> None:
    subprocess.run(["/bin/sh", "-c", remedy], check=True)


def refuse(code: int) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return call


# Names.


@pytest.mark.parametrize("name", ["a", "Z9_-", "-", "x" * 64])
def test_a_name_becomes_a_file_name(name: str, private_directories: Path) -> None:
    assert runtime_path(name, "json") == private_directories / "run" / f"{name}.json"
    assert log_path(name) == private_directories / "log" / f"{name}.log"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 65,
        "a\n",
        "\na",
        "a b",
        ".",
        "..",
        "../a",
        "a/b",
        "a\\b",
        "C:a",
        "a.b",
        "a\0",
        "é",
        "\uff41",
        "²",
        "\ud800",
        b"a",
        None,
        1,
    ],
    ids=ascii,
)
@pytest.mark.parametrize(
    "use",
    [
        lambda name: runtime_path(name, "json"),
        log_path,
        endpoint.load,
        endpoint.lock_lifetime,
        endpoint.cleanup_endpoint,
    ],
    ids=["runtime_path", "log_path", "load", "lock_lifetime", "cleanup_endpoint"],
)
def test_any_other_name_is_refused_before_anything_is_done(
    use: Callable[[Any], object], name: Any, private_directories: Path
) -> None:
    with pytest.raises(InvalidName):
        use(name)
    assert list(private_directories.iterdir()) == []


# Where things are.


def test_looking_creates_nothing(private_directories: Path) -> None:
    assert runtime_dir() == private_directories / "run"
    runtime_path("d", "json")
    log_path("d")
    paths.private_temporary_dir()
    with pytest.raises(DaemonNotRunning):
        endpoint.load("d")
    assert endpoint.cleanup_endpoint("d") is True
    assert list(private_directories.iterdir()) == []


def test_a_relative_override_means_the_same_after_a_chdir(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", "relative")
    monkeypatch.setenv("HARNESS_IPC_LOG_DIR", "relative")
    monkeypatch.chdir(private_directories)
    assert runtime_dir() == Path.cwd() / "relative"
    assert log_path("d") == Path.cwd() / "relative" / "d.log"


@needs_linux
@pytest.mark.parametrize(
    "uid", [None, pytest.param(STRANGER, marks=needs_root)], ids=["this user", "a user without directories"]
)
def test_the_default_is_one_place_whatever_the_session_says(
    uid: int | None, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARNESS_IPC_RUNTIME_DIR")
    if uid is not None:
        os.chown(private_directories, uid, -1)
        os.seteuid(uid)
    try:
        seen = set()
        for session in [{}, dict.fromkeys(("XDG_RUNTIME_DIR", "TMPDIR", "HOME"), str(private_directories))]:
            for variable in ("XDG_RUNTIME_DIR", "TMPDIR"):
                monkeypatch.delenv(variable, raising=False)
            for variable, value in session.items():
                monkeypatch.setenv(variable, value)
            monkeypatch.setattr(tempfile, "tempdir", None)
            # Any warning is an error here.
            seen.add(runtime_dir())
            assert paths.runtime_location()[1]
        assert str(os.geteuid()) in str(*seen)
        assert list(private_directories.iterdir()) == []
    finally:
        if uid is not None:
            os.seteuid(0)


# Directories.


def _link(run: Path) -> None:
    target = run.parent / "target"
    target.mkdir(0o700)
    run.symlink_to(target)


def _dangling(run: Path) -> None:
    run.symlink_to(run.parent / "missing")


def _file(run: Path) -> None:
    run.touch(0o600)


def _open_to(bits: int) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        run.mkdir()
        run.chmod(0o700 | bits)

    return make


@needs_posix
@pytest.mark.parametrize(
    ("make", "command"),
    [
        (_link, "rm"),
        (_dangling, "rm"),
        (_file, "rm"),
        *((_open_to(bits), "chmod 700") for bits in (0o077, 0o020, 0o004, 0o001)),
    ],
    ids=["link", "dangling", "file", "0777", "0720", "0704", "0701"],
)
def test_an_unsafe_directory_is_refused_everywhere_and_its_remedy_mends_it(
    make: Callable[[Path], None], command: str, run: Path
) -> None:
    make(run)
    before = run.lstat()
    with pytest.raises(HarnessIPCError):
        endpoint.lock_lifetime("d")
    for use in (runtime_dir, lambda: endpoint.cleanup_endpoint("d"), lambda: endpoint.load("d")):
        with pytest.raises(UnsafeDirectory) as caught:
            use()
        assert caught.value.path == str(run)
        assert caught.value.remedy.startswith(f"{command} ")
        assert caught.value.remedy in str(caught.value)
    assert run.lstat().st_mode == before.st_mode
    apply(caught.value.remedy)
    assert runtime_dir() == run
    endpoint.lock_lifetime("d").release()


@needs_root
def test_a_strangers_directory_is_refused(run: Path) -> None:
    run.mkdir(0o700)
    os.chown(run, STRANGER, STRANGER)
    with pytest.raises(UnsafeDirectory, match=f"uid {STRANGER}") as caught:
        runtime_dir()
    assert shlex.split(caught.value.remedy) == ["sudo", "rm", "-r", str(run)]
    # Without sudo, which the machine may not have: the rest is what it would run.
    apply(caught.value.remedy.removeprefix("sudo "))
    assert runtime_dir() == run


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_a_created_directory_is_private_under_any_umask(mask: int, run: Path) -> None:
    with umask(mask):
        paths.create_private_dir(str(run))
    assert mode(run) == 0o700
    paths.create_private_dir(str(run))


def test_a_directory_that_cannot_be_created_is_a_failed_start(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse(30))
        with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR") as caught:
            endpoint.lock_lifetime("d")
    assert str(run) in str(caught.value)
    assert not run.exists()


@needs_posix
def test_a_directory_that_cannot_be_examined_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", refuse(13))
        with pytest.raises(UnsafeDirectory, match="HARNESS_IPC_RUNTIME_DIR"):
            runtime_dir()


# Files.


@needs_posix
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory", "0644", "0620"])
def test_a_file_that_is_not_private_is_not_read_and_its_remedy_mends_it(kind: str, run: Path) -> None:
    paths.create_private_dir(str(run))
    path = run / "d.json"
    target = run / "target"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(0o700)
    elif kind in ("link", "dangling"):
        path.symlink_to(target)
        if kind == "link":
            paths.write_private_file(str(target), b"secret")
    else:
        path.write_bytes(b"secret")
        path.chmod(int(kind, 8))
    with pytest.raises(UnsafeDirectory) as caught:
        paths.read_private_file(str(path), 100)
    assert caught.value.path == str(path)
    apply(caught.value.remedy)
    if kind.isdigit():
        assert paths.read_private_file(str(path), 100) == b"secret"
    else:
        with pytest.raises(FileNotFoundError):
            paths.read_private_file(str(path), 100)
    assert target.exists() == (kind == "link")


@needs_root
def test_a_strangers_file_is_not_read(run: Path) -> None:
    paths.create_private_dir(str(run))
    path = run / "d.json"
    paths.write_private_file(str(path), b"planted")
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(UnsafeDirectory, match=f"uid {STRANGER}"):
        paths.read_private_file(str(path), 100)


@needs_posix
def test_the_remedy_for_a_file_that_cannot_be_opened_is_one_a_shell_understands(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.create_private_dir(str(run))
    path = run / "d.json"
    paths.write_private_file(str(path), b"secret")
    path.chmod(0)
    with monkeypatch.context() as patched:
        # Root could read it.
        patched.setattr(os, "open", refuse(13))
        with pytest.raises(UnsafeDirectory) as caught:
            paths.read_private_file(str(path), 100)
    apply(caught.value.remedy)
    assert paths.read_private_file(str(path), 100) == b"secret"


def test_a_private_file_is_read_up_to_the_byte_that_shows_it_is_too_long(private_directories: Path) -> None:
    path = str(private_directories / "file")
    paths.write_private_file(path, b"x" * 10)
    assert [len(paths.read_private_file(path, limit)) for limit in (11, 10, 9)] == [10, 10, 10]
    assert len(paths.read_private_file(path, 5)) == 6


def test_a_private_file_is_never_written_over(private_directories: Path) -> None:
    path = private_directories / "file"
    paths.write_private_file(str(path), b"first")
    with pytest.raises(FileExistsError):
        paths.write_private_file(str(path), b"second")
    assert path.read_bytes() == b"first"


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o777])
def test_files_are_private_under_any_umask(mask: int, private_directories: Path) -> None:
    log = private_directories / "log" / "d.log"
    file = private_directories / "file"
    with umask(mask):
        os.close(paths.open_private_log(str(log)))
        paths.write_private_file(str(file), b"")
    assert (mode(log.parent), mode(log), mode(file)) == (0o700, 0o600, 0o600)


def test_a_log_is_appended_to(private_directories: Path) -> None:
    log = private_directories / "log" / "d.log"
    for line in (b"first\n", b"second\n"):
        with open(paths.open_private_log(str(log)), "wb") as file:
            file.write(line)
    assert log.read_bytes() == b"first\nsecond\n"


@needs_posix
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "0644", "open directory"])
def test_a_log_that_others_could_read_or_plant_is_refused(kind: str, private_directories: Path) -> None:
    directory = private_directories / "log"
    directory.mkdir(0o700)
    log = directory / "d.log"
    target = private_directories / "target"
    if kind == "link":
        target.touch(0o600)
        log.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(log, 0o600)
    elif kind == "directory":
        log.mkdir(0o700)
    elif kind == "0644":
        log.touch()
        log.chmod(0o644)
    else:
        directory.chmod(0o777)
    free = next_descriptor()
    with pytest.raises(HarnessIPCError) as caught:
        os.close(paths.open_private_log(str(log)))
    assert next_descriptor() == free
    assert str(directory) in str(caught.value)
    assert not target.exists() or target.stat().st_size == 0


# The socket's path, which the operating system limits.

if sys.platform != "win32":
    from harness_ipc._posix import MAX_ADDRESS

    def directory_for(base: Path, size: int) -> str:
        """Return a new directory in `base` in which a socket's path has `size` bytes."""
        directory = f"{base}{os.sep}".ljust(size - len("/0123456789abcdef.sock"), "d")
        os.mkdir(directory, 0o700)
        return directory

    @pytest.fixture
    def temporary(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(private_directories))
        return private_directories / f"harness-ipc-{os.geteuid()}"

    @needs_linux
    def test_the_limit_is_the_systems_own() -> None:
        assert MAX_ADDRESS == 107

    def test_the_longest_path_binds_and_connects(private_directories: Path) -> None:
        directory = directory_for(private_directories, MAX_ADDRESS)
        address = transport.new_address(directory, endpoint.new_generation_id())
        assert os.path.dirname(address) == directory
        assert len(os.fsencode(address)) == MAX_ADDRESS
        listener = transport.Listener(address)
        try:
            transport.dial(address, transport.deadline_after(60)).close()
        finally:
            listener.close()

    @pytest.mark.parametrize("deep", ["one byte too long", "long", "characters fit, bytes do not"])
    def test_above_the_limit_a_short_private_directory_serves(deep: str, private_directories: Path, temporary: Path) -> None:
        if deep == "one byte too long":
            directory = directory_for(private_directories, MAX_ADDRESS + 1)
        else:
            directory = f"{private_directories}/{'d' * 200 if deep == 'long' else 'é' * 40}"
        address = transport.new_address(directory, endpoint.new_generation_id())
        assert os.path.dirname(address) == str(temporary)
        assert mode(temporary) == 0o700
        transport.Listener(address).close()

    def test_the_short_directory_is_checked_like_the_other(temporary: Path) -> None:
        temporary.mkdir()
        temporary.chmod(0o777)
        with pytest.raises(UnsafeDirectory) as caught:
            transport.new_address("/d" * 100, endpoint.new_generation_id())
        assert caught.value.remedy == f"chmod 700 {temporary}"

    def test_when_both_are_too_long_the_error_says_what_to_set(
        private_directories: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(private_directories / ("t" * 100)))
        with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR") as caught:
            transport.new_address(str(private_directories / ("d" * 100)), endpoint.new_generation_id())
        assert str(MAX_ADDRESS) in str(caught.value)
        assert list(private_directories.iterdir()) == []
