"""The browser's command line: what `HARNESS_CHROME_ARGS` adds to it, and what it must not have."""

from __future__ import annotations

import pytest

from harness_ipc.browser.errors import BrowserNotFound
from harness_ipc.browser.program import command_line
from harness_ipc.browser.requested import ARGUMENTS


@pytest.mark.parametrize(
    ("arguments", "switch"),
    [
        ("--remote-allow-origins=*", "--remote-allow-origins"),
        ("--mute-audio --remote-debugging-address=0.0.0.0", "--remote-debugging-address"),
        ("--remote-debugging-port=9222", "--remote-debugging-port"),
        ("-remote-debugging-port=9222", "-remote-debugging-port"),
        ("'--Remote-Debugging-Pipe'", "--Remote-Debugging-Pipe"),
        ("--user-data-dir=/elsewhere", "--user-data-dir"),
    ],
)
def test_a_switch_that_opens_the_browser_is_refused(arguments: str, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ARGUMENTS, arguments)
    with pytest.raises(BrowserNotFound, match=f"^{ARGUMENTS} has {switch}, which is refused: .") as caught:
        command_line("chrome", "profile", window=False)
    assert len(str(caught.value).splitlines()) == 1


def test_other_arguments_are_passed_on_and_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ARGUMENTS, "--mute-audio --user-agent='remote-debugging-port 1' user-data-dir")
    words = command_line("chrome", "profile", window=False)
    assert words[-4:] == ["--mute-audio", "--user-agent=remote-debugging-port 1", "user-data-dir", "about:blank"]
    assert not any("allow-origins" in word for word in words)
