"""Namespaces: the two directories of an application and their choice. Queries create nothing."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import (
    DaemonNotRunning,
    InvalidName,
    Namespace,
    UnsafeDirectory,
    cleanup_endpoint,
    daemon_status,
    log_path,
    runtime_dir,
    runtime_path,
)
from harness_ipc._registry import records, trust
from harness_ipc._registry.namespace import all_namespaces, private_temporary_dir, runtime_root
from harness_ipc._server.server import acquire_name
from tests.support.marks import needs_linux, needs_posix, needs_root, needs_windows

STRANGER = 12345
FALLBACK = "/home/ada/.local/state/harness-ipc/run"


def test_the_default_application_has_the_root_itself(private_directories: Path) -> None:
    namespace = Namespace()
    assert namespace.app == "harness-ipc"
    assert Path(namespace.runtime_dir) == private_directories / "run" == runtime_dir()
    assert Path(namespace.log_dir) == private_directories / "log"
    assert runtime_path("d", "json") == private_directories / "run" / "d.json"
    assert log_path("d") == private_directories / "log" / "d.log"


def test_another_application_has_a_directory_of_its_name(private_directories: Path) -> None:
    namespace = Namespace("my-tool")
    assert runtime_dir(namespace=namespace) == private_directories / "run" / "my-tool"
    assert runtime_path("d", "json", namespace=namespace) == private_directories / "run" / "my-tool" / "d.json"
    assert log_path("d", namespace=namespace) == private_directories / "log" / "my-tool" / "d.log"
    assert list(private_directories.iterdir()) == []


def test_an_argument_overrides_the_environment(private_directories: Path) -> None:
    namespace = Namespace("my-tool", runtime_dir=private_directories / "r", log_dir=str(private_directories / "l"))
    assert namespace.runtime_dir == str(private_directories / "r")
    assert namespace.log_dir == str(private_directories / "l")


def test_a_platforms_log_directory_has_the_applications_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_IPC_LOG_DIR")
    default, other = Namespace(), Namespace("my-tool")
    assert "harness-ipc" in default.log_dir
    assert "my-tool" in other.log_dir
    assert "harness-ipc" not in other.log_dir


def test_a_relative_directory_means_the_same_after_a_chdir(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(private_directories)
    namespace = Namespace(runtime_dir="r", log_dir="l")
    monkeypatch.chdir("/")
    assert Path(namespace.runtime_dir) == private_directories.resolve() / "r"
    assert Path(namespace.log_dir) == private_directories.resolve() / "l"


@pytest.mark.parametrize("app", ["", "a/b", "..", "a.b", "x" * 65, "a\n", None, 7], ids=ascii)
def test_an_applications_name_follows_the_rule_for_names(app: Any) -> None:
    with pytest.raises(InvalidName, match="application"):
        Namespace(app)


def test_a_namespace_is_a_value(private_directories: Path) -> None:
    namespace = Namespace("my-tool")
    assert namespace == Namespace("my-tool") != Namespace("other")
    assert namespace == pickle.loads(pickle.dumps(namespace))
    assert len({namespace, Namespace("my-tool"), Namespace("other")}) == 2
    assert repr(namespace).startswith("Namespace('my-tool', runtime_dir=")
    with pytest.raises(AttributeError):
        namespace.runtime_dir = "/"  # type: ignore[misc]


def test_all_namespaces_are_those_with_a_directory(private_directories: Path) -> None:
    assert all_namespaces() == [Namespace()]
    assert list(private_directories.iterdir()) == []
    run = private_directories / "run"
    for app in ("b", "a", "not.a.name"):
        os.makedirs(run / app, 0o700)
    os.chmod(run, 0o700)
    (run / "file").touch()
    (run / "link").symlink_to(run / "a")
    assert all_namespaces() == [Namespace(), Namespace("a"), Namespace("b")]


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
        records.load,
        acquire_name,
        cleanup_endpoint,
    ],
    ids=["runtime_path", "log_path", "load", "acquire_name", "cleanup_endpoint"],
)
def test_an_invalid_name_is_refused_and_nothing_is_created(
    use: Callable[[Any], object], name: Any, private_directories: Path
) -> None:
    with pytest.raises(InvalidName):
        use(name)
    assert list(private_directories.iterdir()) == []


# Directories.


def test_queries_create_nothing(private_directories: Path) -> None:
    assert runtime_dir() == private_directories / "run"
    runtime_path("d", "json")
    log_path("d")
    private_temporary_dir()
    with pytest.raises(DaemonNotRunning):
        records.load("d")
    assert cleanup_endpoint("d") is True
    assert list(private_directories.iterdir()) == []


def test_a_relative_override_means_the_same_after_a_chdir(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", "relative")
    monkeypatch.setenv("HARNESS_IPC_LOG_DIR", "relative")
    monkeypatch.chdir(private_directories)
    assert runtime_dir() == Path.cwd() / "relative"
    assert log_path("d") == Path.cwd() / "relative" / "d.log"


@pytest.fixture
def places(private_directories: Path) -> Iterator[Path]:
    """Redirect the usual directories below one of the test: ``/tmp``, ``/run/user`` and a home."""
    real = os.lstat

    def lstat(path: str) -> os.stat_result:
        return real(f"{private_directories}{path}" if path.startswith(("/tmp/h", "/run/user/", "/home/")) else path)

    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("HARNESS_IPC_RUNTIME_DIR")
        patched.setattr(trust, "home", lambda: "/home/ada")
        patched.setattr(os, "lstat", lstat)
        yield private_directories


@needs_linux
@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ([], "/tmp/harness-ipc-runtime-UID"),
        (["/run/user/UID"], "/run/user/UID/harness-ipc"),
        (["/run/user/UID", FALLBACK], FALLBACK),
        (["/run/user/UID", FALLBACK, "/tmp/harness-ipc-runtime-UID"], "/tmp/harness-ipc-runtime-UID"),
    ],
    ids=["nothing", "login", "fallback", "own"],
)
def test_the_existing_runtime_directory_is_used(there: list[str], chosen: str, places: Path) -> None:
    uid = str(os.geteuid())
    for path in there:
        os.makedirs(f"{places}{path.replace('UID', uid)}", 0o700)
    assert Namespace().runtime_dir == chosen.replace("UID", uid)
    assert Namespace("my-tool").runtime_dir == f"{chosen.replace('UID', uid)}/my-tool"


@needs_root
@needs_linux
@pytest.mark.parametrize("login", [False, True])
def test_fallback_behind_another_users_directory(login: bool, places: Path) -> None:
    squatted = places / "tmp" / f"harness-ipc-runtime-{os.geteuid()}"
    squatted.mkdir(parents=True)
    os.chown(squatted, STRANGER, STRANGER)
    login_dir = places / "run" / "user" / str(os.geteuid())
    if login:
        login_dir.mkdir(parents=True)
        assert Namespace().runtime_dir == f"/run/user/{os.geteuid()}/harness-ipc"
        return
    assert Namespace().runtime_dir == FALLBACK
    os.makedirs(f"{places}{FALLBACK}", 0o700)
    squatted.rmdir()
    login_dir.mkdir(parents=True)
    assert Namespace().runtime_dir == FALLBACK


@needs_windows
@pytest.mark.parametrize(("elevated", "kind"), [(False, "run"), (True, "run-elevated")])
def test_elevated_processes_have_their_own_records(
    elevated: bool, kind: str, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    monkeypatch.delenv("HARNESS_IPC_RUNTIME_DIR")
    monkeypatch.setenv("USERPROFILE", str(private_directories))
    monkeypatch.setattr(vars(ctypes)["windll"].shell32, "IsUserAnAdmin", lambda: elevated)
    assert Path(Namespace().runtime_dir) == private_directories / ".harness-ipc" / kind


@needs_windows
def test_without_a_profile_the_error_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HARNESS_IPC_RUNTIME_DIR", "USERPROFILE", "HOMEPATH", "HOMEDRIVE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UnsafeDirectory, match="USERPROFILE"):
        daemon_status("d")


@needs_posix
@pytest.mark.parametrize("home", [None, "", "/", "/nonexistent", "~", "relative"])
def test_without_a_home_the_logs_are_in_the_runtime_directory(
    home: str | None, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARNESS_IPC_LOG_DIR")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert log_path("d") == private_directories / "run" / ".log" / "d.log"
    assert log_path("d", namespace=Namespace("my-tool")) == private_directories / "run" / "my-tool" / ".log" / "d.log"


@needs_linux
@pytest.mark.parametrize("state", ["~", "~/state", "state", ""])
def test_a_state_directory_that_is_not_absolute_is_ignored(
    state: str, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARNESS_IPC_LOG_DIR")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert log_path("d") == private_directories / "run" / ".log" / "d.log"
    monkeypatch.setenv("XDG_STATE_HOME", str(private_directories))
    assert log_path("d") == private_directories / "harness-ipc" / "log" / "d.log"


@needs_posix
def test_a_tilde_that_no_shell_has_expanded_is_the_home(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(private_directories))
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", "~/r")
    assert Namespace("my-tool", log_dir="~/l").runtime_dir == str(private_directories / "r" / "my-tool")
    assert Namespace(log_dir="~/l").log_dir == str(private_directories / "l")


@needs_posix
@needs_root
def test_a_tilde_without_a_home_is_a_typed_error(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("HARNESS_IPC_RUNTIME_DIR", "~/r")
    monkeypatch.chdir("/")
    os.setresuid(STRANGER, STRANGER, 0)
    try:
        with pytest.raises(UnsafeDirectory, match="HARNESS_IPC_RUNTIME_DIR"):
            runtime_dir()
    finally:
        os.setresuid(0, 0, 0)


@needs_linux
@pytest.mark.parametrize("variable", ["HARNESS_IPC_RUNTIME_DIR", "HARNESS_IPC_LOG_DIR"])
def test_relative_directory_below_a_removed_one(
    variable: str, private_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = private_directories / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv(variable, "relative")
    with pytest.raises(UnsafeDirectory, match=variable):
        daemon_status("d")


@needs_linux
@pytest.mark.parametrize(
    "uid", [None, pytest.param(STRANGER, marks=needs_root)], ids=["this user", "a user without directories"]
)
def test_the_default_does_not_depend_on_the_session(
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
            assert runtime_root()[1]
        assert str(os.geteuid()) in str(*seen)
        assert list(private_directories.iterdir()) == []
    finally:
        if uid is not None:
            os.seteuid(0)
