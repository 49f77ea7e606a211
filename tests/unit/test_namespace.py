"""Namespaces: the two directories of an application, what chooses them, and that looking creates nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import InvalidName, Namespace, log_path, runtime_dir, runtime_path
from harness_ipc._registry.namespace import all_namespaces


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


def test_an_argument_wins_over_the_environment_and_is_used_as_it_is(private_directories: Path) -> None:
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
