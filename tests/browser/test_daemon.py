"""The browser daemon over its channel: requests, sessions, events, and killed processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness_ipc import (
    Client,
    ConnectionLost,
    DaemonNotRunning,
    StartFailed,
    __version__,
    connect_daemon,
    daemon_status,
    process_identity,
    stop_daemon,
)
from harness_ipc.browser import helpers
from harness_ipc.browser.errors import BrowserLost, TabClosed
from harness_ipc.browser.launcher import ManagedBrowser
from harness_ipc.browser.program import find_binary
from tests.browser.conftest import Pair, kill, processes_of, suspended
from tests.browser.others import OtherBrowser, answering, http, kill_browser, other_browser, relaying
from tests.browser.site import Site
from tests.support.managed import in_thread, the_log
from tests.support.marks import needs_chromium, needs_posix
from tests.support.processes import PATIENCE, wait_until

pytestmark = needs_chromium

# It counts how often a request has run in the page.
COUNT = "window.count = (window.count || 0) + 1"

Reply = dict[str, Any]


def connected() -> Client:
    """Return a new connection, not that of the helpers."""
    return connect_daemon("browser", request_timeout=PATIENCE)


@pytest.fixture
def client(page: str) -> Iterator[Client]:
    """A connection to the shared daemon. Its default session is that of `page`."""
    with connected() as daemon:
        yield daemon


@pytest.fixture
def any_tab(warm: Path) -> Iterator[Client]:
    """A connection to the shared daemon, for requests that need no tab of their own."""
    helpers.connect()
    with connected() as daemon:
        yield daemon


@pytest.fixture
def own(killable: Pair) -> Iterator[Client]:
    """A connection to the shared daemon, with one empty tab. A test may end that daemon and its browser."""
    with connected() as daemon:
        yield daemon


def ask(daemon: Client, method: str, session: str | None = None, **params: Any) -> Reply:
    return daemon.request({"method": method, "params": params, "session_id": session})


def evaluate(daemon: Client, expression: str, session: str | None = None, **more: Any) -> Reply:
    params = {"expression": expression, "awaitPromise": True, "returnByValue": True}
    return daemon.request({"method": "Runtime.evaluate", "params": params, "session_id": session, **more})


def value(reply: Reply) -> Any:
    assert "error" not in reply, reply
    assert "exceptionDetails" not in reply["result"], reply
    return reply["result"]["result"].get("value")


def error_of(reply: Reply, kind: str) -> Any:
    """Return the error in `reply`. Its type is `kind`, its message one line."""
    assert list(reply) == ["error"], reply
    error = reply["error"]
    assert error["type"] == kind, error
    assert error["message"].splitlines() == [error["message"]]
    return error


def new_tab(daemon: Client) -> tuple[str, str]:
    """Open a tab, make its session the default one, and return targetId and session."""
    target = ask(daemon, "Target.createTarget", url="about:blank")["result"]["targetId"]
    return target, daemon.request({"meta": "set_session", "target_id": target})["session_id"]


def kill_daemon(pid: int) -> None:
    """Kill the daemon, and wait until connections are refused."""
    kill(pid)
    wait_until(lambda: daemon_status("browser").state == "stale")


def main_processes(base: Path) -> set[int]:
    """Return the pids of the browsers that run below `base`, without their children."""
    found = set()
    for process in processes_of(base):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "--user-data-dir=" in words and "--type=" not in words and "crashpad" not in words:
                found.add(process.pid)
    return found


def started() -> int:
    """Return how often a browser was started, by the log."""
    return the_log("browser").count("started pid ")


def assert_serves(daemon: Client) -> None:
    assert value(evaluate(daemon, "6 * 7")) == 42
    status = daemon_status("browser", timeout=PATIENCE)
    assert status.state == "running"
    assert status.health is not None
    assert status.health["round_trip_ms"] >= 0


@contextlib.contextmanager
def in_flight(session: str | None = None, *, expression: str = "new Promise(() => {})") -> Iterator[Future[Reply]]:
    """Run an expression that does not end. Yield the future of its reply once it runs."""

    def run() -> Reply:
        with connected() as daemon:
            return evaluate(daemon, f"{COUNT}, {expression}", session)

    with connected() as daemon, in_thread(run) as job:
        wait_until(lambda: value(evaluate(daemon, "window.count || 0", session)) == 1)
        yield job


def at_once(number: int, what: Any) -> list[Any]:
    """Call `what` in `number` threads at once, each with a connection of its own. Return the results."""
    barrier = threading.Barrier(number)

    def run(_: int) -> Any:
        with connected() as daemon:
            daemon.request({"meta": "ping"})
            barrier.wait(PATIENCE)
            return what(daemon)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


# The first page.


@pytest.mark.usefixtures("attached")
def test_it_opens_a_page_if_there_are_only_the_browsers_own(other: OtherBrowser) -> None:
    (blank,) = other.tabs()
    internal = other.call("Target.createTarget", url="chrome://version")["targetId"]
    other.call("Target.closeTarget", targetId=blank)
    wait_until(lambda: other.tabs() == {internal: "chrome://version/"})
    tab = helpers.current_tab()
    assert tab["url"] == "about:blank"
    assert other.tabs() == {internal: "chrome://version/", tab["targetId"]: "about:blank"}
    # The same after it was closed.
    helpers.close_tab()
    after = helpers.current_tab()
    assert (after["url"], after["targetId"] == tab["targetId"]) == ("about:blank", False)
    assert internal in other.tabs()
    with connected() as daemon:
        assert_serves(daemon)


@pytest.mark.usefixtures("attached")
def test_it_prefers_a_real_page_to_an_empty_one(other: OtherBrowser, site: Site) -> None:
    other.call("Target.createTarget", url="chrome://version")
    real = other.call("Target.createTarget", url=f"{site.url}/")["targetId"]
    other.call("Target.createTarget", url="about:blank")
    wait_until(lambda: other.tabs().get(real) == f"{site.url}/" and len(other.tabs()) == 4)
    assert helpers.current_tab()["targetId"] == real
    assert helpers.js("document.title") == "Home"
    assert len(other.tabs()) == 4


def test_many_clients_may_close_the_last_tab(own: Client) -> None:
    tab = own.request({"meta": "session"})["target_id"]
    assert ask(own, "Target.closeTarget", targetId=tab)["result"] == {"success": True}
    replies = at_once(8, lambda daemon: evaluate(daemon, COUNT))
    assert sorted(map(value, replies)) == list(range(1, 9))
    assert len({reply["session_id"] for reply in replies}) == 1
    (only,) = [info for info in ask(own, "Target.getTargets")["result"]["targetInfos"] if info["type"] == "page"]
    assert (only["url"], only["targetId"] == tab) == ("about:blank", False)
    assert_serves(own)


# Requests.


def test_each_meta_request_has_its_shape(client: Client, page: str, site: Site) -> None:
    url = f"{site.url}/form"
    session = client.request({"meta": "session"})["session_id"]
    here = {"session_id": session, "target_id": page}
    assert ask(client, "Page.navigate", url=url)["session_id"] == session
    wait_until(lambda: value(evaluate(client, "document.title")) == "A form")
    assert client.request({"meta": "session"}) == here
    assert client.request({"meta": "session", "session_id": session}) == here
    assert client.request({"meta": "set_session", "session_id": session}) == here
    assert client.request({"meta": "set_session", "target_id": page}) == here
    tab = {"targetId": page, "url": url, "title": "A form"}
    assert client.request({"meta": "current_tab"}) == {**tab, "session_id": session}
    assert client.request({"meta": "pending_dialog"}) == {"dialog": None, "session_id": session}
    reply = client.request({"meta": "drain_events", "session_id": session})
    assert list(reply) == ["events"]
    assert {tuple(event) for event in reply["events"]} == {("method", "params", "session_id")}
    assert {event["session_id"] for event in reply["events"]} == {session}
    assert "Page.frameNavigated" in [event["method"] for event in reply["events"]]
    status = client.request({"meta": "connection_status"})
    found = f"our own browser, its profile {os.environ['HARNESS_CHROME_PROFILE']}"
    expected = {"connected": True, "own": True, "found": found, "session_id": session, "tab": tab, "problem": None}
    assert expected.items() <= status.items()
    assert psutil.pid_exists(status["pid"])
    assert status["round_trip_ms"] > 0
    assert status["browser"] == ask(client, "Browser.getVersion")["result"]["product"]
    health = client.request({"meta": "health"})["health"]
    assert {key: health[key] for key in ("browser", "found")} == {"browser": status["browser"], "found": found}
    assert health["round_trip_ms"] > 0
    assert client.request({"meta": "ping"})["pid"] == client.pid
    running = daemon_status("browser", timeout=PATIENCE)
    assert (running.state, running.app_version) == ("running", f"harness-browser {__version__}")
    assert_serves(client)


def test_the_current_tab_is_where_the_page_is(client: Client, site: Site) -> None:
    for number in range(10):
        url = f"{site.url if number % 2 else site.other_url}/form?{number}"
        ask(client, "Page.navigate", url=url)
        # At once: the new URL may come later than the reply to Page.navigate.
        assert client.request({"meta": "current_tab"})["url"] == url
        assert value(evaluate(client, "location.href")) == url
    assert_serves(client)


EVALUATE = {"method": "Runtime.evaluate", "params": {"expression": "6 * 7"}}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({}, -32600),
        ({"params": {}}, -32600),
        ({"meta": "no such thing"}, -32600),
        ({"meta": ""}, -32600),
        ({"meta": 5}, -32600),
        ({"meta": ["session"]}, -32600),
        ({"meta": {"session": 1}}, -32600),
        ({"meta": False}, -32600),
        ({"meta": "session", "session_id": 5}, -32600),
        ({"meta": "set_session"}, -32600),
        ({"meta": "set_session", "target_id": 5}, -32600),
        ({"meta": "drain_events", "session_id": ["x"]}, -32600),
        ({"method": 5}, -32600),
        ({"method": ["Page.enable"]}, -32600),
        ({"method": ""}, -32600),
        ({"method": "no method"}, -32601),
        ({"method": "Page.noSuchThing"}, -32601),
        ({"method": "Target.noSuchThing"}, -32601),
        ({"method": "\ud800"}, None),
        ({"method": "Page.navigate"}, -32602),
        ({"method": "Page.navigate", "params": {"url": 5}}, -32602),
        ({"method": "Page.navigate", "params": [1]}, -32600),
        ({"method": "Page.navigate", "params": "url"}, -32600),
        ({"method": "Target.closeTarget"}, -32602),
        ({"method": "Target.closeTarget", "params": {"targetId": 5}}, -32602),
        ({"method": "Target.closeTarget", "params": {"targetId": "none"}}, -32602),
        ({**EVALUATE, "session_id": 5}, -32600),
        ({**EVALUATE, "session_id": {}}, -32600),
        ({**EVALUATE, "timeout": "1"}, -32600),
        ({**EVALUATE, "timeout": -1}, -32600),
        ({**EVALUATE, "timeout": True}, -32600),
        ({**EVALUATE, "timeout": [1]}, -32600),
        ({"meta": "snapshot", "timeout": "1"}, -32600),
    ],
    ids=lambda value: ascii(value) if isinstance(value, dict) else "",
)
def test_an_invalid_request_is_an_error(any_tab: Client, message: Reply, code: int | None) -> None:
    error = error_of(any_tab.request(message), "CDPError")
    if code is not None:
        assert error["data"]["code"] == code
    assert_serves(any_tab)
    with connected() as other:
        assert_serves(other)


def test_optional_keys_of_a_request_may_be_null(any_tab: Client) -> None:
    for more in ({"session_id": None}, {"timeout": None}, {"session_id": ""}, {"timeout": 60}):
        assert value(any_tab.request({**EVALUATE, **more})) == 42
    assert any_tab.request({"method": "Page.enable", "params": None, "meta": None})["result"] == {}


def test_very_long_timeouts_are_accepted(any_tab: Client) -> None:
    # 10**400 does not fit in a float.
    for timeout in (1e9, 1e308, 10**400):
        assert value(any_tab.request({**EVALUATE, "timeout": timeout})) == 42


@pytest.mark.parametrize("more", [{"session_id": "no such session"}, {"meta": "set_session", "target_id": "no such tab"}])
def test_closing_an_unknown_tab(any_tab: Client, more: Reply) -> None:
    error_of(any_tab.request({**EVALUATE, **more}), "TabClosed")
    assert_serves(any_tab)


def test_requests_to_the_browser_have_no_session(client: Client, page: str) -> None:
    for session in (None, "browser"):
        reply = ask(client, "Target.getTargets", session)
        assert reply["session_id"] is None
        assert page in [info["targetId"] for info in reply["result"]["targetInfos"]]
        assert "gpu" in ask(client, "SystemInfo.getInfo", session)["result"]
    assert "product" in ask(client, "Browser.getVersion", "browser")["result"]


def test_a_request_that_names_a_session_goes_to_that_session(client: Client, page: str) -> None:
    session = client.request({"meta": "session"})["session_id"]
    assert ask(client, "Target.getTargets", "no such session")["error"]["type"] == "TabClosed"
    assert "only supported on the browser" in ask(client, "SystemInfo.getInfo", session)["error"]["message"]
    of_browser = ask(client, "Target.attachToBrowserTarget")["result"]["sessionId"]
    assert "gpu" in ask(client, "SystemInfo.getInfo", of_browser)["result"]
    # In the session of a page, it does not pause the tabs that others open.
    attach: Reply = {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}
    assert "result" in ask(client, "Target.setAutoAttach", session, **attach)
    with connected() as other:
        new_tab(other)
        assert value(evaluate(other, "6 * 7")) == 42
    for refused in (ask(client, "Target.setAutoAttach", **attach), ask(client, "Target.setDiscoverTargets", discover=False)):
        assert "would change all tabs" in refused["error"]["message"]


# Several sessions.


def test_a_request_with_a_session_is_unaffected_by_switches(client: Client, page: str) -> None:
    mine = client.request({"meta": "session"})["session_id"]
    assert value(evaluate(client, "document.title = 'mine'", mine)) == "mine"
    with connected() as other:
        target, theirs = new_tab(other)
        assert value(evaluate(other, "document.title = 'theirs'")) == "theirs"
        # Requests without a session go to the session that was selected last.
        assert value(evaluate(client, "document.title")) == "theirs"
        reply = evaluate(client, "document.title", mine)
        assert (value(reply), reply["session_id"]) == ("mine", mine)
        assert client.request({"meta": "current_tab", "session_id": mine})["targetId"] == page
        other.request({"meta": "set_session", "session_id": mine})
        assert value(evaluate(other, "document.title")) == "mine"
        assert value(evaluate(other, "document.title", theirs)) == "theirs"
        assert other.request({"meta": "set_session", "target_id": target})["session_id"] == theirs


def test_two_clients_drive_two_tabs_at_once(client: Client) -> None:
    meeting = threading.Barrier(2)

    def drive(name: str) -> str:
        with connected() as daemon:
            _, session = new_tab(daemon)
            meeting.wait(PATIENCE)
            for number in range(1, 51):
                count = f"{COUNT}, new Promise(done => setTimeout(() => done('{name} ' + window.count), 1))"
                reply = evaluate(daemon, count, session)
                assert (value(reply), reply["session_id"]) == (f"{name} {number}", session)
            return session

    with in_thread(drive, "one") as one, in_thread(drive, "two") as two:
        assert one.result(PATIENCE) != two.result(PATIENCE)
    assert_serves(client)


def test_a_slow_request_blocks_nobody(client: Client) -> None:
    mine = client.request({"meta": "session"})["session_id"]
    with in_flight(mine, expression="new Promise(done => window.done = done)") as job:
        assert value(evaluate(client, "1 + 1", mine)) == 2
        with connected() as other:
            new_tab(other)
            assert_serves(other)
        assert not job.done()
        evaluate(client, "window.done('at last')", mine)
        assert value(job.result(PATIENCE)) == "at last"


# Events.


def logged(reply: Reply) -> list[Any]:
    """Return what the pages wrote to their consoles, in order."""
    events = [event for event in reply["events"] if event["method"] == "Runtime.consoleAPICalled"]
    return [event["params"]["args"][0]["value"] for event in events]


def test_events_are_kept_for_each_session_until_they_are_drained(client: Client) -> None:
    one = client.request({"meta": "session"})["session_id"]
    _, two = new_tab(client)
    client.request({"meta": "drain_events"})
    for number in range(0, 20, 2):
        evaluate(client, f"console.log({number})", one)
        evaluate(client, f"console.log({number + 1})", two)
    reply = client.request({"meta": "drain_events", "session_id": one})
    assert logged(reply) == list(range(0, 20, 2))
    assert {event["session_id"] for event in reply["events"]} == {one}
    assert logged(client.request({"meta": "drain_events", "session_id": one})) == []
    evaluate(client, "console.log(20)", one)
    # Without a session: all events, in the order of their arrival.
    assert logged(client.request({"meta": "drain_events"})) == [*range(1, 20, 2), 20]
    assert logged(client.request({"meta": "drain_events"})) == []
    assert logged(client.request({"meta": "drain_events", "session_id": two})) == []
    assert_serves(client)


def test_the_last_500_events_are_kept(client: Client) -> None:
    one = client.request({"meta": "session"})["session_id"]
    _, two = new_tab(client)
    loud = "for (let i = 0; i < 700; i++) console.log(i)"
    evaluate(client, loud, one)
    reply = client.request({"meta": "drain_events", "session_id": one})
    assert len(reply["events"]) == 500
    assert logged(reply) == list(range(200, 700))
    evaluate(client, loud, one)
    evaluate(client, "for (let i = 1000; i < 1400; i++) console.log(i)", two)
    reply = client.request({"meta": "drain_events"})
    assert len(reply["events"]) == 500
    assert logged(reply) == [*range(600, 700), *range(1000, 1400)]
    assert client.request({"meta": "drain_events", "session_id": one}) == {"events": []}
    assert_serves(client)


def bind(daemon: Client, session: str) -> None:
    """Define `tell(text)` in the page. It sends an event that the daemon does not truncate."""
    ask(daemon, "Runtime.addBinding", session, name="tell")


def payloads(reply: Reply) -> list[str]:
    """Return the first three characters of each text passed to `tell`."""
    return [event["params"]["payload"][:3] for event in reply["events"] if event["method"] == "Runtime.bindingCalled"]


def test_the_last_16_mebibytes_of_events_are_kept(client: Client) -> None:
    one = client.request({"meta": "session"})["session_id"]
    _, two = new_tab(client)
    for session, sign in (one, "a"), (two, "b"):
        bind(client, session)
        value(evaluate(client, f"for (let i = 10; i < 17; i++) tell('{sign}' + i + 'x'.repeat(3e6))", session))
    # All together exceed the size of one reply: the rest stays for the next drain.
    drained = [payloads(client.request({"meta": "drain_events"})) for _ in range(3)]
    assert drained == [[f"a{number}" for number in range(12, 17)], [f"b{number}" for number in range(12, 17)], []]
    value(evaluate(client, "for (let i = 10; i < 17; i++) tell('c' + i + 'x'.repeat(3e6))", one))
    assert payloads(client.request({"meta": "drain_events", "session_id": one})) == [f"c{number}" for number in range(12, 17)]
    assert_serves(client)


def test_a_noisy_page_takes_little_memory(own: Client) -> None:
    loud = own.request({"meta": "session"})["session_id"]
    _, other = new_tab(own)
    daemon = psutil.Process(own.pid)
    before = daemon.memory_info().rss
    lines, length = 16, 2_000_000
    line = f"console.log('x'.repeat({length}) + i); await new Promise(done => setTimeout(done))"
    with in_flight(loud, expression=f"(async () => {{ for (let i = 10; i < {lines + 10}; i++) {{ {line} }} }})()") as job:
        answers = 0
        while not job.done():
            # The other session is served meanwhile.
            assert value(evaluate(own, "6 * 7", other)) == 42
            answers += 1
        assert "result" in job.result()
    assert answers > 0
    assert daemon.memory_info().rss - before < lines * length / 2
    events = logged(own.request({"meta": "drain_events", "session_id": loud}))
    assert events == [f"{'x' * 16_384}… ({length + 2 - 16_384} more characters were left out)"] * lines
    assert_serves(own)


def test_events_of_the_browser_belong_to_no_session(client: Client) -> None:
    client.request({"meta": "drain_events"})
    target, _ = new_tab(client)
    ask(client, "Target.closeTarget", targetId=target)
    mine = [
        event["method"]
        for event in client.request({"meta": "drain_events"})["events"]
        if event["session_id"] is None and target in json.dumps(event["params"])
    ]
    assert mine[0] == "Target.targetCreated"
    assert mine[-1] == "Target.targetDestroyed"


# Sessions that have ended.


def test_the_default_session_is_attached_again_to_the_same_tab(client: Client, page: str) -> None:
    first = client.request({"meta": "session"})["session_id"]
    assert value(evaluate(client, COUNT)) == 1
    ask(client, "Target.detachFromTarget", sessionId=first)
    reply = evaluate(client, COUNT)
    assert value(reply) == 2
    assert reply["session_id"] != first
    assert client.request({"meta": "session"}) == {"session_id": reply["session_id"], "target_id": page}
    assert value(evaluate(client, "window.count")) == 2
    assert_serves(client)


def test_a_named_session_that_has_ended_leads_to_its_successor(client: Client, page: str) -> None:
    names = [client.request({"meta": "session"})["session_id"]]
    # The default session is in another tab.
    new_tab(client)
    for number in range(1, 4):
        ask(client, "Target.detachFromTarget", sessionId=names[-1])
        reply = evaluate(client, COUNT, names[-1])
        assert value(reply) == number
        names.append(reply["session_id"])
    assert len(set(names)) == 4
    for name in names:
        reply = evaluate(client, "window.count", name)
        assert (value(reply), reply["session_id"]) == (3, names[-1])
        assert client.request({"meta": "current_tab", "session_id": name})["targetId"] == page
        assert client.request({"meta": "session", "session_id": name})["session_id"] == names[-1]
    # Events are reported as before.
    client.request({"meta": "drain_events"})
    evaluate(client, "console.log('heard')", names[0])
    assert logged(client.request({"meta": "drain_events", "session_id": names[0]})) == ["heard"]
    assert_serves(client)


@pytest.mark.parametrize("named", [True, False])
def test_requests_with_the_same_ended_session_attach_once(client: Client, page: str, named: bool) -> None:
    session = client.request({"meta": "session"})["session_id"]
    ask(client, "Target.detachFromTarget", sessionId=session)
    replies = at_once(16, lambda daemon: evaluate(daemon, COUNT, session if named else None))
    assert sorted(map(value, replies)) == list(range(1, 17))
    (successor,) = {reply["session_id"] for reply in replies}
    assert successor != session
    assert the_log("browser").count(f"attaching to tab {page} again") == 1
    assert_serves(client)


def test_a_request_never_runs_twice_if_sessions_end(client: Client) -> None:
    session = client.request({"meta": "session"})["session_id"]
    done = threading.Event()

    def run() -> list[Reply]:
        with connected() as daemon:
            return [evaluate(daemon, COUNT, session) for _ in range(200)]

    def detach() -> int:
        number = 0
        with connected() as daemon:
            while not done.is_set():
                now = daemon.request({"meta": "session", "session_id": session})["session_id"]
                number += "result" in ask(daemon, "Target.detachFromTarget", sessionId=now)
        return number

    with in_thread(run) as one, in_thread(run) as two, in_thread(detach) as detaching:
        try:
            replies = [*one.result(PATIENCE), *two.result(PATIENCE)]
        finally:
            done.set()
        assert detaching.result(PATIENCE) > 0
    ran = [value(reply) for reply in replies if "error" not in reply]
    for reply in replies:
        if "error" in reply:
            assert "may have run" in error_of(reply, "CDPError")["message"]
    assert len(ran) == len(set(ran)) > 0
    count = value(evaluate(client, "window.count", session))
    assert len(ran) <= count <= len(replies)
    assert_serves(client)


def test_the_session_of_a_closed_tab_is_never_another_tab(client: Client) -> None:
    _, other = new_tab(client)
    target, session = new_tab(client)
    assert ask(client, "Target.closeTarget", targetId=target)["result"] == {"success": True}
    verbs = ("current_tab", "pending_dialog", "drain_events", "session", "set_session")
    messages: list[Reply] = [EVALUATE, *({"meta": verb} for verb in verbs)]
    for message in messages:
        error = error_of(client.request({**message, "session_id": session}), "TabClosed")
        assert "list_tabs()" in error["message"]
    error_of(client.request({"meta": "set_session", "target_id": target}), "TabClosed")
    # Other sessions are unaffected, and the default session is in another page.
    assert value(evaluate(client, COUNT, other)) == 1
    reply = evaluate(client, "6 * 7")
    assert (value(reply), reply["session_id"] == session) == (42, False)
    assert client.request({"meta": "session"})["target_id"] != target
    assert_serves(client)


def test_closing_returns_when_the_tab_is_closed(client: Client) -> None:
    for _ in range(5):
        target, _ = new_tab(client)
        assert ask(client, "Target.closeTarget", targetId=target)["result"] == {"success": True}
        targets = ask(client, "Target.getTargets")["result"]["targetInfos"]
        assert target not in [info["targetId"] for info in targets]
    assert_serves(client)


# Requests in flight.


def test_requests_in_flight_end_with_their_tab(client: Client) -> None:
    target, session = new_tab(client)
    with in_flight(session) as job:
        ask(client, "Target.closeTarget", targetId=target)
        assert "may have run" in error_of(job.result(PATIENCE), "CDPError")["message"]
    assert_serves(client)


def test_a_request_ends_after_its_timeout_and_the_page_goes_on(client: Client) -> None:
    error = error_of(evaluate(client, f"{COUNT}, new Promise(() => {{}})", timeout=0.25), "BrowserTimeout")
    assert "Runtime.evaluate within 0.25 s" in error["message"]
    assert "may still run" in error["message"]
    assert value(evaluate(client, "window.count", timeout=PATIENCE)) == 1
    # The same for requests to the browser itself.
    for asked in ({"method": "Target.getTargets"}, {"meta": "snapshot"}):
        error_of(client.request({**asked, "timeout": 0}), "BrowserTimeout")
    assert_serves(client)


def test_a_dialog_is_reported_until_it_is_answered(client: Client) -> None:
    session = client.request({"meta": "session"})["session_id"]
    assert client.request({"meta": "pending_dialog"})["dialog"] is None
    # The request that opened the dialog has run; later ones have not.
    opened = error_of(evaluate(client, f"{COUNT}, window.said = confirm('Sure?')"), "DialogOpen")["data"]
    assert opened["ran"] is True
    assert (opened["dialog"]["type"], opened["dialog"]["message"]) == ("confirm", "Sure?")
    refused = error_of(evaluate(client, COUNT), "DialogOpen")["data"]
    assert refused["ran"] is False
    assert client.request({"meta": "pending_dialog"}) == {"dialog": opened["dialog"], "session_id": session}
    # Another session of the tab is blocked as well, another tab is not.
    other = ask(client, "Target.attachToTarget", targetId=client.request({"meta": "session"})["target_id"], flatten=True)
    held = other["result"]["sessionId"]
    assert error_of(evaluate(client, COUNT, held), "DialogOpen")["data"]["ran"] is False
    assert client.request({"meta": "pending_dialog", "session_id": held})["dialog"] == opened["dialog"]
    _, free = new_tab(client)
    assert client.request({"meta": "pending_dialog"}) == {"dialog": None, "session_id": free}
    assert_serves(client)
    assert ask(client, "Page.handleJavaScriptDialog", session, accept=True)["result"] == {}
    wait_until(lambda: client.request({"meta": "pending_dialog", "session_id": session})["dialog"] is None)
    assert value(evaluate(client, "[window.said, window.count].join()", session)) == "true,1"
    assert error_of(ask(client, "Page.handleJavaScriptDialog", session, accept=True), "CDPError")["data"]["code"] == -32602


def test_a_crashed_page_raises_at_once_and_can_be_reloaded(client: Client, site: Site) -> None:
    _, session = new_tab(client)
    with in_flight(session) as job:
        ask(client, "Page.crash", session)
        assert "has crashed" in error_of(job.result(PATIENCE), "CDPError")["message"]
    assert "goto_url()" in error_of(evaluate(client, "6 * 7", session), "CDPError")["message"]
    ask(client, "Page.navigate", session, url=f"{site.url}/")
    wait_until(lambda: evaluate(client, "document.title", session).get("result", {}).get("result", {}).get("value") == "Home")
    assert_serves(client)


# Health.


@needs_posix
def test_health_asks_the_browser(own: Client) -> None:
    assert_serves(own)
    pid = own.request({"meta": "connection_status"})["pid"]
    with suspended(pid):
        status = daemon_status("browser", timeout=PATIENCE)
        assert (status.state, status.pid, status.problem) == ("running", own.pid, None)
        assert status.health is not None
        error_of(status.health, "BrowserTimeout")
        found = own.request({"meta": "connection_status"})
        assert (found["connected"], found["pid"], found["own"]) == (False, pid, True)
        assert "has not answered" in found["problem"]
        error_of(own.request({**EVALUATE, "timeout": 0.25}), "BrowserTimeout")
        assert own.request({"meta": "ping"})["pid"] == own.pid
    assert_serves(own)
    assert own.request({"meta": "connection_status"})["pid"] == pid


# The browser ends.


def test_a_killed_browser_is_replaced_by_the_next_request(own: Client) -> None:
    starts = started()
    old = own.request({"meta": "session"})["session_id"]
    first = own.request({"meta": "connection_status"})["pid"]
    with in_flight(old) as job:
        kill(first)
        assert "may have run" in error_of(job.result(PATIENCE), "BrowserLost")["message"]
    # A health check does not restart the browser.
    status = daemon_status("browser", timeout=PATIENCE)
    assert status.state == "running"
    assert status.health is not None
    error_of(status.health, "BrowserLost")
    # The process exists until its last thread has ended.
    wait_until(lambda: own.request({"meta": "connection_status"})["pid"] is None)
    found = own.request({"meta": "connection_status"})
    assert (found["connected"], found["own"], found["tab"]) == (False, True, None)
    assert "lost" in found["problem"]
    # Concurrent requests start one browser, and nothing of the old one is reused.
    replies = at_once(8, lambda daemon: evaluate(daemon, COUNT))
    assert sorted(map(value, replies)) == list(range(1, 9))
    second = own.request({"meta": "connection_status"})
    assert (second["connected"], second["own"], second["problem"]) == (True, True, None)
    assert second["pid"] not in (None, first)
    assert started() == starts + 1
    error_of(evaluate(own, COUNT, old), "TabClosed")
    assert value(evaluate(own, "window.count")) == 8
    assert_serves(own)


WAITS: list[Reply] = [
    {"meta": "wait_for_element", "selector": "#never"},
    {"meta": "wait_for_url", "pattern": "/never"},
    {"meta": "wait_for_network_idle", "idle": PATIENCE},
]


def test_a_wait_ends_with_its_browser(own: Client) -> None:
    session = own.request({"meta": "session"})["session_id"]
    browser = own.request({"meta": "connection_status"})["pid"]
    with ThreadPoolExecutor(len(WAITS)) as pool:
        waits = [pool.submit(own.request, {**wait, "session_id": session, "timeout": PATIENCE}) for wait in WAITS]
        assert value(evaluate(own, "6 * 7", session)) == 42
        kill(browser)
        # BrowserLost, or TabClosed for a wait that began after the browser's end.
        kinds = {wait.result(PATIENCE)["error"]["type"] for wait in waits}
    assert kinds <= {"BrowserLost", "TabClosed"}
    assert_serves(own)


LEAVES = """
from harness_ipc import connect_daemon
with connect_daemon("browser") as daemon:
    daemon.request({"meta": "wait_for_element", "selector": "#never", "timeout": 3600}, timeout=3600)
"""


def test_a_wait_ends_with_its_client(client: Client) -> None:
    def is_idle() -> bool:
        return bool(client.request({"meta": "ping"})["idle"] > 0)

    # The helpers' connection has a request in flight as long as they are in a tab.
    helpers.disconnect()
    wait_until(is_idle)
    with subprocess.Popen([sys.executable, "-W", "error", "-c", LEAVES]) as waiting:
        try:
            wait_until(lambda: not is_idle())
        finally:
            waiting.kill()
    wait_until(is_idle)
    assert_serves(client)


def test_helpers_raise_once_for_a_lost_tab(own: Client) -> None:
    assert helpers.js(COUNT) == 1
    kill(own.request({"meta": "connection_status"})["pid"])
    errors: list[type[Exception]] = []
    while len(errors) < 3:
        try:
            assert helpers.js(COUNT) == 1
        except (BrowserLost, TabClosed) as error:
            errors.append(type(error))
        else:
            break
    # BrowserLost only if the daemon had not noticed the end yet; TabClosed, since no request goes to another tab silently.
    assert errors in ([TabClosed], [BrowserLost, TabClosed])
    assert_serves(own)


def test_requests_survive_repeated_kills_of_the_browser(own: Client, killable: Pair) -> None:
    starts = started()
    done = threading.Event()

    def run() -> list[str]:
        errors = []
        with connected() as daemon:
            while not done.is_set():
                reply = evaluate(daemon, "6 * 7")
                if "error" in reply:
                    errors.append(error_of(reply, "BrowserLost")["type"])
                else:
                    assert value(reply) == 42
        return errors

    killed: set[int] = set()
    with in_thread(run) as one, in_thread(run) as two, in_thread(run) as three:
        try:
            while len(killed) < 3:
                pid = own.request({"meta": "connection_status"})["pid"]
                if pid is not None and pid not in killed and value(evaluate(own, "6 * 7")) == 42:
                    kill(pid)
                    killed.add(pid)
        finally:
            done.set()
        assert [error for job in (one, two, three) for error in job.result(PATIENCE)] != []
    # A request before the daemon has noticed the last loss would be answered with it.
    wait_until(lambda: own.request({"meta": "connection_status"})["pid"] not in killed)
    assert_serves(own)
    last = own.request({"meta": "connection_status"})["pid"]
    assert last not in killed
    wait_until(lambda: main_processes(killable.base) == {last})
    assert started() == starts + 3


@needs_posix
def test_stopping_during_a_restart_of_the_browser_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fresh / "program"
    program.write_text(f'#!/bin/sh\ntest -e "$0.used" && sleep 3600\ntouch "$0.used"; exec {find_binary()} "$@"\n')
    program.chmod(0o700)
    monkeypatch.setenv("HARNESS_CHROME", str(program))
    helpers.connect()
    with connected() as daemon:
        kill(daemon.request({"meta": "connection_status"})["pid"])
        wait_until(lambda: not daemon.request({"meta": "connection_status"})["connected"])
        with in_thread(daemon.request, EVALUATE) as job:
            wait_until(lambda: started() == 2)
            assert stop_daemon("browser", timeout=PATIENCE)
            with contextlib.suppress(ConnectionLost):
                assert "error" in job.result(PATIENCE)
    wait_until(lambda: not processes_of(fresh))
    assert not (fresh / "profile" / "harness-browser.json").exists()
    monkeypatch.delenv("HARNESS_CHROME")
    helpers.disconnect()
    helpers.connect()
    with connected() as daemon:
        assert_serves(daemon)


def test_a_browser_that_was_asked_to_close_is_replaced_as_well(own: Client) -> None:
    first = own.request({"meta": "connection_status"})["pid"]
    own.request({"method": "Browser.close"})
    wait_until(lambda: not own.request({"meta": "connection_status"})["connected"])
    assert_serves(own)
    assert own.request({"meta": "connection_status"})["pid"] not in (None, first)


def test_the_browser_of_others_that_is_gone_for_good_is_lost(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as there:
        relay = there.enter_context(relaying(other.port))
        monkeypatch.setenv("BU_CDP_WS", f"ws://127.0.0.1:{relay.port}{other.path}")
        helpers.connect()
        with connected() as daemon:
            session = daemon.request({"meta": "session"})["session_id"]
            with in_flight(session) as job:
                there.close()
                error_of(job.result(PATIENCE), "BrowserLost")
            # The daemon refuses clients and ends; the next one looks for the browser again.
            wait_until(lambda: daemon_status("browser", timeout=PATIENCE).state == "absent")
            with pytest.raises(DaemonNotRunning):
                daemon.request(EVALUATE)
    helpers.disconnect()
    with pytest.raises(StartFailed, match="BU_CDP_WS") as failed:
        helpers.page_info()
    assert other.path.rpartition("/")[2] not in str(failed.value) + the_log("browser")


@needs_posix
def test_a_browser_whose_port_another_program_has_is_lost_once(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as there, contextlib.ExitStack() as instead:
        relay = there.enter_context(relaying(other.port))
        monkeypatch.setenv("BU_CDP_WS", f"ws://127.0.0.1:{relay.port}{other.path}")
        # Enter a tab, which is lost with the browser.
        helpers.page_info()
        pid = daemon_status("browser", timeout=PATIENCE).pid
        assert pid is not None
        with suspended(pid):
            there.close()
            instead.enter_context(answering(http("404 Not Found"), port=relay.port))
        wait_until(lambda: not helpers.connect().request({"meta": "connection_status"})["connected"])
        with pytest.raises(BrowserLost, match="answered 404"):
            helpers.page_info()
        wait_until(lambda: daemon_status("browser", timeout=PATIENCE).state == "absent")
        with pytest.raises(StartFailed, match="answered 404"):
            helpers.page_info()
        # Without the variable, another browser is used.
        monkeypatch.delenv("BU_CDP_WS")
        monkeypatch.setenv("HARNESS_CHROME_OWN", "1")
        with pytest.raises(TabClosed):
            helpers.page_info()
        assert helpers.page_info()["url"] == "about:blank"


def test_the_browser_of_others_that_comes_back_is_used_again(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with relaying(other.port) as relay:
        monkeypatch.setenv("BU_CDP_URL", f"http://127.0.0.1:{relay.port}")
        session = helpers.connect().request({"meta": "session"})["session_id"]
    wait_until(lambda: daemon_status("browser", timeout=PATIENCE).state == "absent")
    helpers.disconnect()
    with other_browser(fresh, port=relay.port) as successor:
        assert successor.path != other.path
        daemon = helpers.connect()
        assert_serves(daemon)
        error_of(evaluate(daemon, "6 * 7", session), "TabClosed")
        entered = daemon.request({"meta": "session"})
        assert entered["target_id"] in successor.tabs()
        with in_flight(entered["session_id"]) as job:
            kill_browser(successor.process)
            error_of(job.result(PATIENCE), "BrowserLost")


def test_after_a_cut_connection_each_session_finds_its_tab(
    fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with relaying(other.port) as relay:
        monkeypatch.setenv("BU_CDP_WS", f"ws://127.0.0.1:{relay.port}{other.path}")
        helpers.connect()
        with connected() as daemon:
            tabs = [new_tab(daemon) for _ in range(3)]
            for number, (_, session) in enumerate(tabs):
                evaluate(daemon, f"window.number = {number}", session)
            _, default = tabs[-1]
            with in_flight(default) as job:
                relay.cut()
                error_of(job.result(PATIENCE), "BrowserLost")
            replies = at_once(8, lambda client: [evaluate(client, "window.number", session) for _, session in tabs])
            for answers in replies:
                assert [value(answer) for answer in answers] == [0, 1, 2]
            successors = {tuple(answer["session_id"] for answer in answers) for answers in replies}
            assert len(successors) == 1
            assert not set(*successors) & {session for _, session in tabs}
            # The default session is in the same tab as before.
            assert value(evaluate(daemon, "[window.number, window.count].join()")) == "2,1"
            assert_serves(daemon)


# The daemon ends.


def test_a_killed_daemon_leaves_its_browser_to_the_next_one(own: Client, killable: Pair, site: Site) -> None:
    adoption = "the browser of an earlier daemon is still there"
    adoptions = the_log("browser").count(adoption)
    helpers.goto_url(f"{site.url}/")
    wait_until(lambda: helpers.current_tab()["title"] == "Home")
    tab = helpers.current_tab()
    daemon, browser = own.pid, own.request({"meta": "connection_status"})["pid"]
    with in_thread(helpers.js, f"{COUNT}, new Promise(() => {{}})") as job:
        wait_until(lambda: value(evaluate(own, "window.count || 0")) == 1)
        kill_daemon(daemon)
        assert isinstance(job.exception(PATIENCE), ConnectionLost)
    # The next daemon has the same browser. The request was not repeated.
    assert helpers.current_tab() == tab
    assert helpers.js("window.count") == 1
    found = helpers.connect().request({"meta": "connection_status"})
    assert (found["own"], found["pid"]) == (True, browser)
    assert helpers.connect().pid != daemon
    assert the_log("browser").count(adoption) == adoptions + 1
    # The browser belongs to this daemon now, and ends with it.
    helpers.disconnect()
    assert stop_daemon("browser")
    wait_until(lambda: browser not in main_processes(killable.base))
    helpers.connect()
    with connected() as successor:
        assert_serves(successor)


def test_a_helper_restarts_a_killed_daemon(own: Client) -> None:
    assert helpers.js(COUNT) == 1
    kill_daemon(own.pid)
    # In the same tab as before.
    assert helpers.js(COUNT) == 2
    with connected() as successor:
        assert_serves(successor)


def test_a_browser_is_adopted_after_a_kill_during_its_start(fresh: Path) -> None:
    note = fresh / "profile" / "harness-browser.json"
    with in_thread(helpers.connect) as starting:
        wait_until(note.exists)
        starting_pid = daemon_status("browser").pid
        assert starting_pid is not None
        kill(starting_pid)
        # The start may also have succeeded just before.
        with contextlib.suppress(StartFailed, DaemonNotRunning, ConnectionLost):
            starting.result(PATIENCE)
    helpers.disconnect()
    helpers.connect()
    with connected() as daemon:
        assert_serves(daemon)
        only = daemon.request({"meta": "connection_status"})["pid"]
    assert main_processes(fresh) == {only}


def test_an_orphaned_browser_can_be_ended(own: Client, killable: Pair) -> None:
    browser = ManagedBrowser("browser")
    pid = own.request({"meta": "connection_status"})["pid"]
    kill_daemon(own.pid)
    assert browser.pid() == pid
    assert main_processes(killable.base) == {pid}
    assert browser.end() is True
    wait_until(lambda: not processes_of(killable.base))
    assert browser.end() is False
    assert browser.pid() is None
    helpers.disconnect()
    helpers.connect()
    with connected() as daemon:
        assert_serves(daemon)


@pytest.mark.parametrize("kind", ["another time", "no time", "torn", "empty", "another shape", "a dead one"])
def test_a_foreign_note_signals_nobody(kind: str, fresh: Path) -> None:
    profile = fresh / "profile"
    profile.mkdir(mode=0o700)
    stranger = psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        identity: Any = process_identity(stranger.pid)
        match kind:
            case "another time":
                earlier = {**identity, "create_time": identity["create_time"] - 60}
                if "start_ticks" in identity:
                    earlier["start_ticks"] -= 1
                note = json.dumps({"browser": earlier, "daemon": earlier})
            case "no time":
                note = json.dumps({"browser": {"pid": stranger.pid}, "daemon": {"pid": stranger.pid}})
            case "torn":
                note = json.dumps({"browser": identity, "daemon": identity})[:-1]
            case "another shape":
                note = json.dumps([identity, identity])
            case "a dead one":
                dead = {**identity, "pid": 2**22 + 1}
                note = json.dumps({"browser": dead, "daemon": dead})
            case _:
                note = ""
        place = profile / "harness-browser.json"
        place.write_text(note)
        place.chmod(0o600)
        assert ManagedBrowser("browser").pid() is None
        # A daemon does the same check at its start: one case is enough.
        if kind == "another time":
            helpers.connect()
            with connected() as daemon:
                assert_serves(daemon)
                assert daemon.request({"meta": "connection_status"})["pid"] != stranger.pid
            helpers.disconnect()
            assert stop_daemon("browser")
        assert ManagedBrowser("browser").end() is False
        assert stranger.poll() is None
        assert stranger.status() != psutil.STATUS_STOPPED
    finally:
        stranger.kill()
        stranger.communicate(timeout=PATIENCE)


def test_an_idle_daemon_ends_with_its_browser(fresh: Path, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_BROWSER_IDLE_TIMEOUT", "0.5")
    assert helpers.js("6 * 7") == 42
    helpers.disconnect()
    wait_until(lambda: daemon_status("browser").state == "absent" and not processes_of(fresh))
    assert "idle for 0.5 s" in the_log("browser")
    monkeypatch.setenv("HARNESS_BROWSER_IDLE_TIMEOUT", "soon")
    with pytest.raises(StartFailed, match="HARNESS_BROWSER_IDLE_TIMEOUT='soon' is not a number of seconds"):
        helpers.connect()
    monkeypatch.delenv("HARNESS_BROWSER_IDLE_TIMEOUT")
    monkeypatch.setenv("BU_CDP_WS", other.websocket)
    helpers.connect()
    with connected() as daemon:
        assert_serves(daemon)
