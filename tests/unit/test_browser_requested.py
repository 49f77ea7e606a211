"""The browser that a command asks for, and whether a daemon's browser matches it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness_ipc.browser.requested import find_mismatch, requested_settings, wants_managed

HTTP, WS = "http://127.0.0.1:9222", "ws://127.0.0.1:9222/devtools/browser/1"
NAMED, FOUND = ("BU_CDP_URL", HTTP), None


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({}, False),
        ({"HARNESS_CHROME_OWN": ""}, False),
        ({"HARNESS_CHROME": "chromium", "HARNESS_CHROME_ROOT": "1", "HARNESS_CHROME_DOWNLOADS": "x"}, False),
        ({"HARNESS_CHROME_OWN": "1"}, True),
        ({"HARNESS_CHROME_PROFILE": "x"}, True),
        ({"HARNESS_CHROME_ARGS": "--x"}, True),
    ],
)
def test_settings_that_require_a_managed_browser(environment: dict[str, str], own: bool) -> None:
    assert wants_managed(environment) is own


def test_a_named_browser_overrides_managed_settings() -> None:
    environment = {"BU_CDP_WS": WS, "BU_CDP_URL": HTTP, "HARNESS_CHROME_OWN": "1"}
    assert requested_settings(environment) == {"BU_CDP_WS": WS}
    del environment["BU_CDP_WS"]
    assert requested_settings(environment) == {"BU_CDP_URL": HTTP}


def test_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = {"HARNESS_CHROME_PROFILE": "profile", "HARNESS_CHROME_DOWNLOADS": "saved", "HARNESS_CHROME": os.path.join(".", "x")}
    found = {key: str(Path.cwd() / value) for key, value in here.items()}
    assert requested_settings({**here, "HARNESS_CHROME_ROOT": "1"}) == found
    assert requested_settings({"HARNESS_CHROME": "chromium"}) == {"HARNESS_CHROME": "chromium"}


@pytest.mark.parametrize(
    ("wanted", "named", "endpoint"),
    [
        ({}, NAMED, WS),
        ({"BU_CDP_URL": HTTP}, NAMED, WS),
        ({"BU_CDP_URL": "http://localhost:9222/"}, NAMED, WS),
        ({"BU_CDP_URL": HTTP}, FOUND, WS),
        ({"BU_CDP_WS": WS}, FOUND, WS),
        ({"BU_CDP_WS": WS}, NAMED, WS),
        ({"BU_CDP_URL": "https://b.example/?token=1"}, ("BU_CDP_URL", "https://b.example/?token=1"), "wss://b.example/x"),
        ({"HARNESS_CHROME": "chromium", "HARNESS_CHROME_DOWNLOADS": "/x"}, FOUND, WS),
    ],
)
def test_the_same_browser_is_no_mismatch(wanted: dict[str, str], named: tuple[str, str] | None, endpoint: str) -> None:
    assert find_mismatch(wanted, None, named, endpoint) is None


@pytest.mark.parametrize(
    ("wanted", "named", "endpoint"),
    [
        ({"BU_CDP_URL": "http://127.0.0.1:9223"}, NAMED, WS),
        ({"BU_CDP_URL": "http://other:9222"}, NAMED, WS),
        ({"BU_CDP_WS": "ws://127.0.0.1:9222/devtools/browser/2"}, FOUND, WS),
        ({"BU_CDP_URL": "https://b.example/?token=2"}, ("BU_CDP_URL", "https://b.example/?token=1"), "wss://b.example/x"),
        ({"BU_CDP_URL": "https://me:2@b.example/"}, ("BU_CDP_URL", "https://me:1@b.example/"), "wss://b.example/x"),
        ({"BU_CDP_URL": "nonsense"}, NAMED, WS),
        ({"BU_CDP_URL": "http://[::1"}, NAMED, WS),
        ({"HARNESS_CHROME_OWN": "1"}, NAMED, WS),
        ({"HARNESS_CHROME_PROFILE": "/x"}, FOUND, WS),
        ({"HARNESS_CHROME_ARGS": "--x"}, FOUND, WS),
    ],
)
def test_another_browser_is_a_mismatch(wanted: dict[str, str], named: tuple[str, str] | None, endpoint: str) -> None:
    assert find_mismatch(wanted, None, named, endpoint) is not None


OWN = {
    "HARNESS_CHROME": "/nowhere/chromium",
    "HARNESS_CHROME_PROFILE": "/nowhere/profile",
    "HARNESS_CHROME_ARGS": "--a  '--b=1 2'",
}


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        ({"HARNESS_CHROME_OWN": "1"}, True),
        ({"HARNESS_CHROME_PROFILE": "/nowhere/./profile"}, True),
        ({"HARNESS_CHROME_PROFILE": "/nowhere/other"}, False),
        ({"HARNESS_CHROME": "/nowhere/chromium"}, True),
        ({"HARNESS_CHROME": "/nowhere/chrome"}, False),
        ({"HARNESS_CHROME_ARGS": '--a "--b=1 2"'}, True),
        ({"HARNESS_CHROME_ARGS": "--a"}, False),
        ({"HARNESS_CHROME_ENV": "TOKEN"}, False),
        ({"HARNESS_CHROME_DOWNLOADS": "/x"}, False),
        ({"BU_CDP_URL": HTTP}, False),
    ],
)
def test_the_settings_of_a_managed_browser(wanted: dict[str, str], same: bool) -> None:
    assert (find_mismatch(wanted, OWN) is None) is same


def test_secrets_are_not_shown() -> None:
    secret = "hush"
    for wanted, own in (
        ({"BU_CDP_URL": f"http://me:{secret}@127.0.0.1:9/{secret}?{secret}"}, OWN),
        ({"HARNESS_CHROME_ARGS": f"--proxy-server=me:{secret}@proxy"}, OWN | {"HARNESS_CHROME_ARGS": f"--x={secret}"}),
    ):
        found = find_mismatch(wanted, own)
        assert found is not None
        assert secret not in "".join(found)
