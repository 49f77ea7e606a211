"""Private directories and files: unsafe ones are refused with a working remedy, and queries create nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from harness_ipc import _transport, cleanup_endpoint, list_daemons, runtime_dir
from harness_ipc._registry import files, records, trust
from harness_ipc._server.server import acquire_name
from harness_ipc._transport import listen
from harness_ipc.errors import HarnessIPCError, ResourceExhausted, StartFailed, UnsafeDirectory
from tests.support.marks import needs_linux, needs_posix, needs_root

STRANGER = 12345


@pytest.fixture
def run(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a runtime directory that does not exist, and needs quoting in a shell."""
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
        (_file, "mv"),
        *((_open_to(bits), "chmod 700") for bits in (0o077, 0o007, 0o002)),
    ],
    ids=["link", "dangling", "file", "0777", "0707", "0702"],
)
def test_the_remedy_fixes_an_unsafe_directory(make: Callable[[Path], None], command: str, run: Path) -> None:
    make(run)
    before = run.lstat()
    with pytest.raises(HarnessIPCError):
        acquire_name("d")
    for use in (runtime_dir, lambda: cleanup_endpoint("d"), lambda: records.load("d")):
        with pytest.raises(UnsafeDirectory) as caught:
            use()
        assert caught.value.path == str(run)
        assert caught.value.remedy.startswith(f"{command} ")
        assert caught.value.remedy in str(caught.value)
    assert run.lstat().st_mode == before.st_mode
    apply(caught.value.remedy)
    assert runtime_dir() == run
    acquire_name("d").release()


@needs_root
def test_a_foreign_directory_is_refused_and_unchanged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.mkdir(0o700)
    os.chown(run, STRANGER, STRANGER)
    with pytest.raises(UnsafeDirectory, match=f"uid {STRANGER}") as caught:
        runtime_dir()
    assert str(run) not in caught.value.remedy
    assert caught.value.remedy.startswith("export HARNESS_IPC_RUNTIME_DIR=")


@needs_posix
@pytest.mark.parametrize("bits", [0o755, 0o744, 0o701])
def test_only_writers_tighten_a_readable_directory(bits: int, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    run.mkdir()
    run.chmod(bits)
    with pytest.raises(UnsafeDirectory, match=f"mode {bits:04o}") as caught:
        runtime_dir()
    assert caught.value.remedy == f"chmod 700 {shlex.quote(str(run))}"
    assert mode(run) == bits
    acquire_name("d").release()
    assert mode(run) == 0o700
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{run} was open to others" in caplog.text


@needs_posix
def test_a_systems_directory_and_a_home_are_not_tightened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(trust.is_shared, ("/", "/tmp", "/etc", "/usr/share/doc", "/var/log")))
    with pytest.raises(UnsafeDirectory) as caught:
        files.check_private_dir("/etc")
    assert "/etc" not in caught.value.remedy
    home = run.parent / "home" / "ada"
    home.mkdir(parents=True)
    home.chmod(0o755)
    monkeypatch.setattr(trust, "home", lambda: str(home))
    for path in (home, home.parent):
        with pytest.raises(UnsafeDirectory) as caught:
            files.create_private_dir(str(path), tighten=True)
        assert caught.value.remedy.startswith("export ")
        assert mode(path) == 0o755


@needs_posix
@pytest.mark.parametrize("shared", ["a directory in it", "a link that others can change"])
def test_a_directory_that_others_may_need_is_not_tightened(shared: str, run: Path) -> None:
    run.mkdir(0o755)
    path = run
    if shared == "a directory in it":
        (run / "data").mkdir(0o755)
    else:
        planted = run.parent / "planted"
        planted.mkdir()
        planted.chmod(0o777)
        (planted / "link").symlink_to(run.parent)
        path = planted / "link" / run.name
    with pytest.raises(UnsafeDirectory) as caught:
        files.create_private_dir(str(path), tighten=True)
    assert mode(run) == 0o755
    if path == run:
        assert caught.value.remedy.startswith("export ")


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_a_created_directory_is_private_under_any_umask(mask: int, run: Path) -> None:
    with umask(mask):
        files.create_private_dir(str(run))
    assert mode(run) == 0o700
    files.create_private_dir(str(run))


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_the_parents_that_are_made_are_private_under_any_umask(mask: int, run: Path) -> None:
    with umask(mask):
        files.create_private_dir(str(run / "a" / "b"))
    assert [mode(path) for path in (run, run / "a", run / "a" / "b")] == [0o700] * 3


def test_a_directory_that_cannot_be_created_is_a_failed_start(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse(30))
        with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR") as caught:
            acquire_name("d")
    assert str(run) in str(caught.value)
    assert not run.exists()


@needs_posix
def test_a_directory_that_cannot_be_examined_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", refuse(13))
        with pytest.raises(UnsafeDirectory, match="HARNESS_IPC_RUNTIME_DIR"):
            runtime_dir()


def test_an_unlistable_directory_is_a_typed_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.list_private_dir(str(run)) == []
    files.create_private_dir(str(run))
    (run / "d.json").touch()
    assert files.list_private_dir(str(run)) == ["d.json"]
    for code, kind in ((errno.EACCES, UnsafeDirectory), (errno.EMFILE, ResourceExhausted)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", refuse(code))
            with pytest.raises(kind, match=re.escape(str(run))):
                list_daemons()


# Parent directories.


@needs_posix
@pytest.mark.parametrize("links", [False, True], ids=["directory", "link"])
@pytest.mark.parametrize("bits", [0o777, 0o757, 0o1777], ids=oct)
def test_world_writable_parent_must_be_sticky(bits: int, links: bool, private_directories: Path) -> None:
    parent = private_directories / "it's a parent"
    run = parent / "a" / "run"
    run.parent.mkdir(parents=True)
    run.mkdir(0o700)
    parent.chmod(bits)
    if links:
        # A relative link in the target of a link.
        (parent / "relative").symlink_to("a")
        (private_directories / "link").symlink_to(parent)
        run = private_directories / "link" / "relative" / ".." / "relative" / "run"
    if bits & 0o1000:
        assert files.check_private_dir(str(run)) is True
        return
    for use in (files.check_private_dir, files.create_private_dir):
        with pytest.raises(UnsafeDirectory, match="others can write") as caught:
            use(str(run))
    apply(caught.value.remedy)
    assert mode(parent) == bits & 0o755
    files.create_private_dir(str(run))


@needs_posix
def test_one_remedy_fixes_all_open_parents(private_directories: Path) -> None:
    run = private_directories / ".local" / "it's state" / "run"
    with umask(0):
        run.mkdir(parents=True)
    run.chmod(0o700)
    with pytest.raises(UnsafeDirectory, match=r"\.local, where others can write") as caught:
        files.check_private_dir(str(run))
    apply(caught.value.remedy)
    assert files.check_private_dir(str(run)) is True


@needs_posix
def test_nothing_is_created_where_others_can_write(private_directories: Path) -> None:
    parent = private_directories / "parent"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(UnsafeDirectory):
        files.create_private_dir(str(parent / "a" / "run"))
    assert list(parent.iterdir()) == []


@needs_root
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_another_users_parent_directory_or_link_is_refused(kind: str, private_directories: Path) -> None:
    own, theirs = private_directories / "own", private_directories / "theirs"
    (own / "run").mkdir(0o700, parents=True)
    if kind == "directory":
        own.rename(theirs)
        os.chown(theirs, STRANGER, STRANGER)
    else:
        theirs.symlink_to(own)
        os.chown(theirs, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(UnsafeDirectory, match=f"theirs, which belongs to uid {STRANGER}") as caught:
        files.check_private_dir(str(theirs / "run"))
    assert str(theirs) not in caught.value.remedy


@needs_posix
def test_links_in_a_circle_are_refused(private_directories: Path) -> None:
    (private_directories / "a").symlink_to("b")
    (private_directories / "b").symlink_to("a")
    for use in (files.check_private_dir, files.create_private_dir):
        with pytest.raises(UnsafeDirectory, match="links"):
            use(str(private_directories / "a" / "run"))


@needs_root
@pytest.mark.parametrize(
    ("members", "accounts", "safe"),
    [([], [], True), (["ada"], [], True), (["ada", "bob"], [], False), ([], [("bob", 7, STRANGER)], False)],
    ids=["nobody", "the user", "another member", "another account"],
)
def test_a_parent_that_the_users_own_group_can_write_is_safe(
    members: list[str],
    accounts: list[tuple[str, int, int]],
    safe: bool,
    private_directories: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import grp
    import pwd

    # It may be looked up, and kept, first here.
    home = pwd.getpwuid(os.geteuid()).pw_dir

    def account(name: str, uid: int, gid: int) -> SimpleNamespace:
        return SimpleNamespace(pw_name=name, pw_uid=uid, pw_gid=gid, pw_dir=home)

    ada = account("ada", os.geteuid(), STRANGER)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: ada)
    monkeypatch.setattr(pwd, "getpwall", lambda: [ada, *(account(*fields) for fields in accounts)])
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_mem=members))
    parent = private_directories / "parent"
    (parent / "run").mkdir(0o700, parents=True)
    os.chown(parent, -1, STRANGER)
    parent.chmod(0o775)
    with contextlib.nullcontext() if safe else pytest.raises(UnsafeDirectory, match="others can write"):
        files.check_private_dir(str(parent / "run"))


@needs_posix
def test_replaced_ancestor_is_checked_again(private_directories: Path) -> None:
    run = private_directories / "parent" / "run"
    run.mkdir(0o700, parents=True)
    assert files.check_private_dir(str(run))
    run.parent.chmod(0o777)
    run.rename(private_directories / "aside")
    run.mkdir(0o700)
    with pytest.raises(UnsafeDirectory, match="others can write"):
        files.check_private_dir(str(run))


# Files of root.


@contextlib.contextmanager
def as_stranger(base: Path) -> Iterator[None]:
    os.chown(base, STRANGER, STRANGER)
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
@pytest.mark.parametrize("bits", [0o755, 0o700])
def test_the_remedy_returns_a_parent_created_by_root(bits: int, private_directories: Path) -> None:
    run = private_directories / "made by root" / "state" / "run"
    (run.parent.parent / "state").mkdir(0o700, parents=True)
    run.parent.parent.chmod(bits)
    with as_stranger(private_directories):
        with pytest.raises(HarnessIPCError) as caught:
            files.create_private_dir(str(run))
        made = shlex.quote(str(private_directories / "made by root"))
        remedy = f"sudo chown -R {STRANGER} {made}"
        assert f"`{remedy}`" in str(caught.value)
    # Without sudo, which may be missing.
    apply(remedy.removeprefix("sudo "))
    with as_stranger(private_directories):
        files.create_private_dir(str(run))


@needs_root
@pytest.mark.parametrize("kind", ["directory", "log", "record"])
def test_the_remedy_returns_files_of_root(kind: str, private_directories: Path) -> None:
    path = private_directories / "run"
    path.mkdir(0o700)
    uses: dict[str, Callable[[], object]] = {
        "directory": lambda: files.create_private_dir(str(path)),
        "log": lambda: os.close(files.open_private_log(str(path))),
        "record": lambda: files.read_private_file(str(path), 100),
    }
    if kind != "directory":
        os.chown(path, STRANGER, STRANGER)
        path /= "d"
        path.touch(0o600)
    with as_stranger(private_directories), pytest.raises(UnsafeDirectory) as caught:
        uses[kind]()
    assert caught.value.remedy.startswith(f"sudo chown -R {STRANGER} {private_directories}")
    apply(caught.value.remedy.removeprefix("sudo "))
    with as_stranger(private_directories):
        uses[kind]()


@needs_root
def test_root_with_a_users_home_is_refused_with_advice(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = private_directories / "ada"
    (home / "log").mkdir(0o700, parents=True)
    for path in (home, home / "log"):
        os.chown(path, STRANGER, STRANGER)
    monkeypatch.setenv("HOME", str(home))
    for log in (home / "log" / "d.log", home / "new" / "d.log"):
        with pytest.raises(UnsafeDirectory, match="sudo -H") as caught:
            files.open_private_log(str(log))
        assert "rm" not in caught.value.remedy.split()
    assert not (home / "new").exists()


# Files.


@needs_posix
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory", "0644", "0620"])
def test_the_remedy_fixes_a_file_that_is_not_private(kind: str, run: Path) -> None:
    files.create_private_dir(str(run))
    path = run / "d.json"
    target = run / "target"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(0o700)
    elif kind in ("link", "dangling"):
        path.symlink_to(target)
        if kind == "link":
            files.write_private_file(str(target), b"secret")
    else:
        path.write_bytes(b"secret")
        path.chmod(int(kind, 8))
    with pytest.raises(UnsafeDirectory) as caught:
        files.read_private_file(str(path), 100)
    assert caught.value.path == str(path)
    apply(caught.value.remedy)
    if kind.isdigit():
        assert files.read_private_file(str(path), 100) == b"secret"
    else:
        with pytest.raises(FileNotFoundError):
            files.read_private_file(str(path), 100)
    assert target.exists() == (kind == "link")


@needs_root
def test_a_strangers_file_is_not_read(run: Path) -> None:
    files.create_private_dir(str(run))
    path = run / "d.json"
    files.write_private_file(str(path), b"planted")
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(UnsafeDirectory, match=f"uid {STRANGER}"):
        files.read_private_file(str(path), 100)


@needs_posix
def test_remedy_for_an_unreadable_file_is_shell_quoted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.create_private_dir(str(run))
    path = run / "d.json"
    files.write_private_file(str(path), b"secret")
    path.chmod(0)
    with monkeypatch.context() as patched:
        # Root could read it.
        patched.setattr(os, "open", refuse(13))
        with pytest.raises(UnsafeDirectory) as caught:
            files.read_private_file(str(path), 100)
    apply(caught.value.remedy)
    assert files.read_private_file(str(path), 100) == b"secret"


def test_a_private_file_is_read_one_byte_beyond_its_limit(private_directories: Path) -> None:
    path = str(private_directories / "file")
    files.write_private_file(path, b"x" * 10)
    assert [len(files.read_private_file(path, limit)) for limit in (11, 10, 9)] == [10, 10, 10]
    assert len(files.read_private_file(path, 5)) == 6


def test_a_private_file_is_never_written_over(private_directories: Path) -> None:
    path = private_directories / "file"
    files.write_private_file(str(path), b"first")
    with pytest.raises(FileExistsError):
        files.write_private_file(str(path), b"second")
    assert path.read_bytes() == b"first"


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o777])
def test_files_are_private_under_any_umask(mask: int, private_directories: Path) -> None:
    log = private_directories / "log" / "d.log"
    file = private_directories / "file"
    with umask(mask):
        os.close(files.open_private_log(str(log)))
        files.write_private_file(str(file), b"")
    assert (mode(log.parent), mode(log), mode(file)) == (0o700, 0o600, 0o600)


def test_a_log_is_appended_to(private_directories: Path) -> None:
    log = private_directories / "log" / "d.log"
    for line in (b"first\n", b"second\n"):
        with open(files.open_private_log(str(log)), "wb") as file:
            file.write(line)
    assert log.read_bytes() == b"first\nsecond\n"


@needs_posix
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "0666", "open directory"])
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
    elif kind == "0666":
        log.touch()
        log.chmod(0o666)
    else:
        directory.chmod(0o777)
    free = next_descriptor()
    with pytest.raises(HarnessIPCError) as caught:
        os.close(files.open_private_log(str(log)))
    assert next_descriptor() == free
    assert str(directory) in str(caught.value)
    assert not target.exists() or target.stat().st_size == 0


@needs_posix
def test_only_writers_tighten_a_readable_log(private_directories: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = private_directories / "log" / "d.log"
    log.parent.mkdir(0o755)
    log.write_bytes(b"first\n")
    log.chmod(0o644)
    with pytest.raises(UnsafeDirectory, match="mode 0644"):
        files.open_log_for_reading(str(log))
    os.close(files.open_private_log(str(log)))
    assert (mode(log), mode(log.parent), log.read_bytes()) == (0o600, 0o755, b"first\n")
    assert f"{log} was open to others" in caplog.text


# The limit of a socket's path.

if sys.platform != "win32":
    from harness_ipc._transport.listen import MAX_ADDRESS

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
    def test_the_limit_is_that_of_the_system() -> None:
        assert MAX_ADDRESS == 107

    def test_the_longest_path_binds_and_connects(private_directories: Path) -> None:
        directory = directory_for(private_directories, MAX_ADDRESS)
        address = listen.new_address(directory, records.new_generation_id())
        assert os.path.dirname(address) == directory
        assert len(os.fsencode(address)) == MAX_ADDRESS
        listener = listen.Listener(address)
        try:
            _transport.connect(address, _transport.deadline_after(60)).close()
        finally:
            listener.close()

    @pytest.mark.parametrize("deep", ["one byte too long", "long", "characters fit, bytes do not"])
    def test_above_the_limit_a_short_private_directory_is_used(deep: str, private_directories: Path, temporary: Path) -> None:
        if deep == "one byte too long":
            directory = directory_for(private_directories, MAX_ADDRESS + 1)
        else:
            directory = f"{private_directories}/{'d' * 200 if deep == 'long' else 'é' * 40}"
        address = listen.new_address(directory, records.new_generation_id())
        assert os.path.dirname(address) == str(temporary)
        assert mode(temporary) == 0o700
        listen.Listener(address).close()

    def test_the_short_directory_is_checked_like_the_other(temporary: Path) -> None:
        temporary.mkdir()
        temporary.chmod(0o777)
        with pytest.raises(UnsafeDirectory) as caught:
            listen.new_address("/d" * 100, records.new_generation_id())
        assert caught.value.remedy == f"chmod 700 {temporary}"

    def test_when_both_are_too_long_the_error_says_what_to_set(
        private_directories: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(private_directories / ("t" * 100)))
        with pytest.raises(StartFailed, match="HARNESS_IPC_RUNTIME_DIR") as caught:
            listen.new_address(str(private_directories / ("d" * 100)), records.new_generation_id())
        assert str(MAX_ADDRESS) in str(caught.value)
        assert list(private_directories.iterdir()) == []
