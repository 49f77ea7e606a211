"""Local ports of another, real user, and servers of this user that redirect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness_ipc import daemon_status, stop_daemon
from harness_ipc.browser import discovery, helpers, local, version
from harness_ipc.browser.addresses import is_local
from harness_ipc.browser.connection import Connection, ConnectionFailed
from harness_ipc.browser.doctor import examine
from harness_ipc.browser.errors import BrowserNotFound
from tests.browser.conftest import harness_browser
from tests.browser.others import OtherBrowser, answering, http, kill_browser, other_browser
from tests.browser.test_discovery import start, status
from tests.browser.test_discovery import why_not as why_not_started
from tests.browser.users import SQUATTER, VICTIM, find_as_victim, squatting
from tests.support.managed import the_log
from tests.support.marks import needs_chromium, needs_linux, needs_root
from tests.support.processes import PATIENCE, wait_until

pytestmark = pytest.mark.usefixtures("active_port")

ADDRESSES = ["127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"]


@pytest.fixture
def no_program(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CHROME", str(fresh / "nothing"))


@pytest.fixture
def home(fresh: Path) -> Path:
    fresh.chmod(0o711)
    (fresh / "victim").mkdir(mode=0o700)
    return fresh / "victim"


def why_not() -> str:
    """Look for a browser in this process, and return the error."""
    with pytest.raises(BrowserNotFound) as caught:
        asyncio.run(discovery.find("browser", lambda *_: None))
    return str(caught.value)


def doctor() -> str:
    return harness_browser("--doctor").stdout


# Another user.


@needs_linux
@needs_root
@pytest.mark.parametrize("accepts", [True, False], ids=["accepts", "accepts late"])
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("way", ["port", "profile"])
@pytest.mark.usefixtures("no_program")
def test_a_squatter_is_sent_nothing(
    way: str, address: str, accepts: bool, active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with squatting(address, accepts=accepts) as squat:
        if way == "port":
            monkeypatch.setattr(discovery, "PORTS", (squat.port,))
        else:
            active_port.write_text(f"{squat.port}\n/devtools/browser/secret")
        reason = why_not()
        assert f"127.0.0.1:{squat.port} belongs to another user, uid {SQUATTER}" in reason
        assert "Allow" not in reason
        assert set(squat.received()) == {""}


@needs_linux
@needs_root
@needs_chromium
def test_a_browser_of_a_squatter_is_not_used(other: OtherBrowser, active_port: Path) -> None:
    with squatting(target=other.port) as squat:
        active_port.write_text(f"{squat.port}\n{other.path}")
        problem = f"127.0.0.1:{squat.port} belongs to another user, uid {SQUATTER}"
        assert f"WARNING  browser: {active_port} is stale: {problem}, and was sent nothing" in doctor()
        start(f"discovery.PORTS = ({squat.port},)")
        assert status()["own"]
        assert helpers.js("6 * 7") == 42
        assert f"not usable, port {squat.port}: {problem}, and was sent nothing" in the_log("browser")
        stale = f"a stale DevToolsActivePort ({problem}, and was sent nothing"
        assert f"not usable, DevToolsActivePort of {active_port.parent}, port {squat.port}: {stale}" in the_log("browser")
        assert list(other.tabs().values()) == ["about:blank"]
        assert set(squat.received()) == {""}


@needs_linux
@needs_root
@needs_chromium
@pytest.mark.parametrize("way", ["port", "profile"])
def test_a_squatter_takes_the_port_of_a_browser_in_use(
    way: str, fresh: Path, active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_browser(fresh) as theirs:
        if way == "profile":
            active_port.write_text(theirs.active_port.read_text())
        first = "" if way == "profile" else f"discovery.PORTS = ({theirs.port},)"
        start(first)
        assert not status()["own"]
        kill_browser(theirs.process)
    wait_until(lambda: daemon_status("browser", timeout=PATIENCE).state == "absent")
    helpers.disconnect()
    monkeypatch.setenv("HARNESS_CHROME", str(fresh / "nothing"))
    with squatting(port=theirs.port) as squat:
        assert f"127.0.0.1:{theirs.port} belongs to another user, uid {SQUATTER}" in why_not_started(first)
        assert set(squat.received()) == {""}


@needs_linux
@needs_root
@needs_chromium
@pytest.mark.parametrize("uid", [VICTIM, 0], ids=["ours", "root's"])
def test_ports_of_the_user_and_of_root_are_used(uid: int, home: Path, other: OtherBrowser) -> None:
    with squatting(uid=uid, target=other.port) as port:
        found = find_as_victim(home, port.port)
        assert found["how"] == f"port {port.port}", found
        assert found["findings"] == [f"ok: the next command uses port {port.port}"]


@needs_linux
@needs_root
@needs_chromium
def test_a_user_finds_its_browser_beside_a_squatter_on_ipv6(fresh: Path, home: Path) -> None:
    profile = fresh / "victims profile"
    profile.mkdir(mode=0o700)
    os.chown(profile, VICTIM, VICTIM)
    places = {"HOME": str(profile), "TMPDIR": str(profile)}
    user: dict[str, Any] = {"user": VICTIM, "group": VICTIM, "extra_groups": [], "env": os.environ | places}
    with other_browser(fresh, profile=profile.name, **user) as browser:
        with squatting("::", browser.port, ipv6_only=True):
            found = find_as_victim(home, browser.port)
        assert found["how"] == f"port {browser.port}", found


@needs_linux
@needs_root
@needs_chromium
@pytest.mark.parametrize("accepts", [True, False], ids=["accepts", "accepts late"])
def test_a_user_does_not_find_a_port_of_another_user(accepts: bool, home: Path, other: OtherBrowser) -> None:
    with squatting(target=other.port, accepts=accepts) as squat:
        found = find_as_victim(home, squat.port)
        problem = f"127.0.0.1:{squat.port} belongs to another user, uid {SQUATTER}"
        assert found["error"].startswith("BrowserNotFound: ")
        assert found["log"] == [
            f"not usable, port {squat.port}: {problem}, and was sent nothing; if you trust it, name it in BU_CDP_URL"
        ]
        assert found["findings"][0].startswith(f"warning: port {squat.port} is not used: {problem}")
        # Both the command and the doctor connect, and send nothing.
        assert set(squat.received()) == {""}


@needs_linux
@needs_root
@pytest.mark.parametrize("way", ["port", "profile"])
@pytest.mark.usefixtures("no_program")
def test_a_squatter_that_accepts_nothing_is_skipped(way: str, active_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CONNECT_TIMEOUT", 0.25)
    with contextlib.ExitStack() as stack:
        squat = stack.enter_context(squatting(accepts=False, backlog=0))
        with contextlib.suppress(TimeoutError):
            while True:
                stack.enter_context(socket.create_connection(("127.0.0.1", squat.port), 0.25))
        if way == "port":
            monkeypatch.setattr(discovery, "PORTS", (squat.port,))
        else:
            active_port.write_text(f"{squat.port}\n/devtools/browser/secret")
        reason = why_not()
        assert f"127.0.0.1:{squat.port} can't be reached (timed out)" in reason
        assert "Allow" not in reason


@needs_linux
@pytest.mark.usefixtures("no_program")
def test_without_a_known_owner_only_a_named_browser_is_used(active_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []
    monkeypatch.setattr(local, "TABLES", (os.devnull,))
    with answering(http("403 Forbidden"), requests=received) as port:
        active_port.write_text(f"{port}\n/devtools/browser/secret")
        reason = why_not()
        assert f"port {port}: 127.0.0.1:{port} is not known to belong to you or to root, and was sent nothing" in reason
        assert "stale" not in reason
        source = f"DevToolsActivePort of {active_port.parent}, port {port}"
        line = f"{source} is not used: 127.0.0.1:{port} is not known to belong to you or to root"
        (finding,) = [one for one in examine("browser") if one.topic == "browser" and one.level == "warning"]
        assert finding.text.startswith(line)
        assert set(received) <= {b""}
        monkeypatch.setenv("BU_CDP_WS", f"ws://127.0.0.1:{port}/path")
        assert "answered 403" in why_not()
        assert received[-1].startswith(b"GET /path ")


# Addresses that the user named.


@needs_linux
@needs_root
@needs_chromium
@pytest.mark.parametrize("variable", ["BU_CDP_WS", "BU_CDP_URL"])
def test_a_named_browser_of_any_owner_is_used(variable: str, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    with squatting(target=other.port) as squat:
        scheme, path = ("ws", other.path) if variable == "BU_CDP_WS" else ("http", "")
        place = f"{scheme}://127.0.0.1:{squat.port}"
        monkeypatch.setenv(variable, place + path)
        line = f"the next command uses {variable}, {place}, which belongs to uid {SQUATTER}\n"
        assert f"WARNING  browser: {line}" in doctor()
        assert helpers.js("6 * 7") == 42
        assert not status()["own"]
        assert f"{variable}, {place}, belongs to uid {SQUATTER}" in the_log("browser")
        assert f" ms, which belongs to uid {SQUATTER}\n" in doctor()
        helpers.disconnect()
        assert stop_daemon("browser")
        assert any("Upgrade: websocket" in text for text in squat.received())


@needs_linux
@needs_root
@needs_chromium
@pytest.mark.parametrize("variable", ["BU_CDP_WS", "BU_CDP_URL"])
def test_our_own_uid_is_not_named(variable: str, other: OtherBrowser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, other.websocket if variable == "BU_CDP_WS" else other.url)
    assert helpers.js("6 * 7") == 42
    assert "belongs to" not in the_log("browser") + doctor()


@needs_linux
@needs_root
def test_a_port_that_only_the_server_named_is_sent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with squatting() as squat:
        address = json.dumps({"webSocketDebuggerUrl": f"ws://127.0.0.1:{squat.port}/secret"})
        with answering(http("200 OK", address)) as port:
            monkeypatch.setenv("BU_CDP_URL", f"http://127.0.0.1:{port}")
            assert f"127.0.0.1:{squat.port} belongs to another user, uid {SQUATTER}" in why_not()
        assert squat.received() == [""]


def test_a_remote_browser_has_no_local_owner() -> None:
    assert local.describe_users(frozenset({0, SQUATTER})) == f"uid 0 (root) and uid {SQUATTER}"


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:9222", True),
        ("ws://127.0.0.2:9222/x", True),
        ("ws://localhost:9222", True),
        ("ws://[::1]:9222/", True),
        ("ws://192.0.2.1:9222/", False),
        ("ws://localhost.example:9222/", False),
        ("127.0.0.1:9222", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_which_addresses_are_local(url: str, here: bool) -> None:
    assert is_local(url) is here


# Servers of this user that redirect.


def version_answer(url: str) -> bytes:
    return http("200 OK", json.dumps({"webSocketDebuggerUrl": url}))


@pytest.mark.parametrize(
    "url", ["ws://{other}/a/path?x=1#y", "ws://who:word@{other}/a/path?x=1", "wss://{other}/a/path?x=1", "/a/path?x=1"]
)
def test_only_the_path_of_a_local_servers_address_is_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []
    elsewhere: list[bytes] = []
    with answering(http("403 Forbidden"), requests=elsewhere) as other:
        answer = version_answer(url.format(other=f"127.0.0.1:{other}"))
        with answering(http("403 Forbidden"), version=answer, requests=received) as port:
            monkeypatch.setattr(discovery, "PORTS", (port,))
            assert f"the browser of port {port} refuses (403)" in why_not()
    _, handshake = (data.decode() for data in received)
    assert handshake.startswith("GET /a/path?x=1 HTTP/1.1\r\n")
    assert f"\r\nHost: 127.0.0.1:{port}\r\n" in handshake
    assert "Authorization" not in handshake
    assert elsewhere == []


@pytest.mark.parametrize("url", ["", "nonsense", "@127.0.0.1/path", "ws://127.0.0.1:1", "ws://[::1/path"])
@pytest.mark.usefixtures("no_program")
def test_a_local_server_without_a_path_is_skipped(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []
    with answering(version_answer(url), requests=received) as port:
        monkeypatch.setattr(discovery, "PORTS", (port,))
        assert f"also seen: port {port}: http://127.0.0.1:{port} is not a DevTools server" in why_not()
    assert len(received) == 1


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


@pytest.fixture
def elsewhere() -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server that must not be contacted, and the requests that it received."""
    received: list[bytes] = []
    with answering(version_answer("ws://127.0.0.1:1/path"), requests=received) as port:
        yield port, received
    assert received == []


@pytest.mark.usefixtures("no_program")
def test_a_local_server_that_redirects_is_skipped(
    elsewhere: tuple[int, list[bytes]], active_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(redirect(f"http://127.0.0.1:{elsewhere[0]}/json/version")) as port:
        monkeypatch.setattr(discovery, "PORTS", (port,))
        assert f"also seen: port {port}: http://127.0.0.1:{port} answered 302 to /json/version" in why_not()
        monkeypatch.setattr(discovery, "PORTS", ())
        active_port.write_text(f"{port}\n/devtools/browser/secret")
        assert f"a stale DevToolsActivePort (http://127.0.0.1:{port} answered 302 to /json/version)" in why_not()


@pytest.mark.parametrize("target", ["http://127.0.0.1:{}/json/version", "//127.0.0.1:{}/"])
@pytest.mark.parametrize("has_socket", [True, False], ids=["local", "elsewhere"])
def test_a_redirect_of_a_named_server_is_not_followed(
    target: str, has_socket: bool, elsewhere: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with answering(redirect(target.format(elsewhere[0]))) as port:
        base = f"http://who:word@127.0.0.1:{port}"
        sock = socket.create_connection(("127.0.0.1", port)) if has_socket else None
        with pytest.raises(ConnectionFailed, match="answered 302") as caught:
            asyncio.run(version.ask_websocket_url(base, sock))
        assert caught.value.status == 302


@pytest.mark.parametrize("target", ["ws://127.0.0.1:{}/", "/same/server"])
@pytest.mark.parametrize("has_socket", [True, False], ids=["local", "elsewhere"])
def test_a_redirect_in_the_handshake_is_not_followed(target: str, has_socket: bool, elsewhere: tuple[int, list[bytes]]) -> None:
    received: list[bytes] = []
    with answering(redirect(target.format(elsewhere[0])), requests=received) as port:
        sock = socket.create_connection(("127.0.0.1", port)) if has_socket else None
        with pytest.raises(ConnectionFailed, match="answered 302") as caught:
            asyncio.run(Connection.open(f"ws://who:word@127.0.0.1:{port}/", lambda *_: None, sock))
        assert caught.value.status == 302
    assert len(received) == 1


# Endless answers.


@contextlib.contextmanager
def trickling(piece: bytes) -> Iterator[int]:
    """Yield the port of a server that sends `piece` again and again."""
    stop = threading.Event()

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client = listener.accept()[0]
            with client, contextlib.suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while not stop.wait(0.01):
                    client.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def test_an_answer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "TIMEOUT", 0.5)
    with trickling(b"x") as port:
        sock = local.connect_to_ours("127.0.0.1", port)
        with pytest.raises(ConnectionFailed, match=r"has not answered for 0\.5 s") as caught:
            asyncio.run(version.ask_websocket_url(f"http://127.0.0.1:{port}", sock))
        assert caught.value.waiting


def test_an_answer_that_is_too_long_is_given_up() -> None:
    with trickling(b"x" * 200_000) as port:
        sock = local.connect_to_ours("127.0.0.1", port)
        with pytest.raises(ConnectionFailed, match="answered more than 1048576 bytes"):
            asyncio.run(version.ask_websocket_url(f"http://127.0.0.1:{port}", sock))


@pytest.mark.usefixtures("no_program")
def test_a_deeply_nested_answer_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(http("200 OK", "[" * 100_000)) as port:
        monkeypatch.setattr(discovery, "PORTS", (port,))
        assert f"http://127.0.0.1:{port} is not a DevTools server (RecursionError)" in why_not()
