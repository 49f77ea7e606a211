"""A command gets the requested browser, or an error that names both."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness_ipc import daemon_status, stop_daemon
from harness_ipc.browser import helpers
from harness_ipc.browser.errors import BrowserMismatch
from tests.browser.conftest import harness_browser, kill
from tests.browser.others import OtherBrowser, kill_browser, other_browser
from tests.support.managed import the_log
from tests.support.marks import needs_chromium

pytestmark = needs_chromium

REPLACE = "run harness-browser --name=browser --reload to replace it, or choose another --name"


def refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the error of a process with these variables in its environment."""
    with monkeypatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        helpers.disconnect()
        with pytest.raises(BrowserMismatch) as caught:
            helpers.page_info()
    helpers.disconnect()
    return str(caught.value)


def test_a_managed_browser_matches_only_its_settings(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds = f"the daemon 'browser' holds our own browser, its profile {warm / 'profile'}"
    url = {"BU_CDP_URL": "http://127.0.0.1:1/secret"}
    asks = "but this command asks for BU_CDP_URL, http://127.0.0.1:1"
    assert refused(url, monkeypatch) == f"{holds}, {asks}: {REPLACE}"
    profile = {"HARNESS_CHROME_PROFILE": str(warm / "other")}
    assert f"{holds}, but this command asks for HARNESS_CHROME_PROFILE={warm / 'other'}: " in refused(profile, monkeypatch)
    assert not (warm / "other").exists()
    arguments = {"HARNESS_CHROME_ARGS": "--user-agent=secret"}
    assert f"{holds} with no HARNESS_CHROME_ARGS, but this command asks for HARNESS_CHROME_ARGS=--user-agent: " in refused(
        arguments, monkeypatch
    )
    with monkeypatch.context() as patch:
        patch.setenv("BU_CDP_URL", "http://127.0.0.1:1/secret")
        run, doctor = harness_browser("-c", "print('never')"), harness_browser("--doctor")
    assert (run.returncode, run.stdout) == (6, "")
    assert run.stderr == f"harness-browser: {holds}, {asks}: {REPLACE}\n"
    assert doctor.returncode == 1
    remedy = "harness-browser --name=browser --reload"
    assert f"but the next command asks for BU_CDP_URL, http://127.0.0.1:1 -> {remedy}" in doctor.stdout
    assert "secret" not in run.stderr + doctor.stdout + the_log("browser")


def test_another_named_browser_is_a_mismatch(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_CHROME_OWN")
    monkeypatch.delenv("HARNESS_CHROME_PROFILE")
    monkeypatch.setenv("HOME", str(fresh))
    with other_browser(fresh) as theirs:
        monkeypatch.setenv("BU_CDP_URL", theirs.url)
        assert helpers.page_info()["url"] == "about:blank"
        text = refused({"BU_CDP_URL": "http://127.0.0.1:1"}, monkeypatch)
        assert f"holds BU_CDP_URL, {theirs.url}, but this command asks for BU_CDP_URL, http://127.0.0.1:1: " in text
        assert "holds BU_CDP_URL" in refused({"BU_CDP_URL": "", "HARNESS_CHROME_OWN": "1"}, monkeypatch)
        # The same browser with another variable, in another form, and without one.
        for words in ({"BU_CDP_WS": theirs.websocket}, {"BU_CDP_URL": f"http://localhost:{theirs.port}/"}, {"BU_CDP_URL": ""}):
            with monkeypatch.context() as patch:
                for variable, value in words.items():
                    patch.setenv(variable, value)
                helpers.disconnect()
                helpers.page_info()
        kill_browser(theirs.process)
    # A daemon whose browser has ended makes room for one with other settings.
    monkeypatch.setenv("BU_CDP_URL", other.url)
    helpers.disconnect()
    assert helpers.page_info()["url"] == "about:blank"
    assert helpers.connect().request({"meta": "connection_status"})["found"] == f"BU_CDP_URL, {other.url}"


def test_a_browser_that_was_started_otherwise_is_not_adopted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(helpers.connect().pid)
    helpers.disconnect()
    monkeypatch.setenv("HARNESS_CHROME_ARGS", "--user-agent='Robot 7'")
    monkeypatch.chdir(fresh)
    # A relative path is resolved against the command's directory.
    monkeypatch.setenv("HARNESS_CHROME_PROFILE", "profile")
    assert helpers.js("navigator.userAgent") == "Robot 7"
    assert "was started with other settings" in the_log("browser")
    assert daemon_status("browser").state == "running"
    helpers.disconnect()
    stop_daemon("browser")
