"""Limits of bytes, characters, types and connections; order and concurrency."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from harness_ipc import (
    Busy,
    Client,
    ClientClosed,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    connect_daemon,
    identify,
    log_path,
    ping,
    request,
    runtime_dir,
)
from harness_ipc._calls import result_of
from harness_ipc._registry import records
from tests.support.processes import PATIENCE, DaemonProcess, spawn_daemon, wait_until
from tests.support.wire import dial_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
LIMIT = 64 * MIB
# Seconds: longer than any test.
NEVER = 3600.0
# Bytes of a reply to "fill" besides the text.
ENVELOPE = len(b'{"result":""}')


@contextlib.contextmanager
def one_connection() -> Iterator[Client]:
    """Yield a connected client that cannot reconnect, since it finds no record. Its connection must survive."""
    with connect_daemon("test", request_timeout=PATIENCE) as client, pytest.MonkeyPatch.context() as patched:
        # Removing the record would end the daemon.
        patched.setenv("HARNESS_IPC_RUNTIME_DIR", f"{runtime_dir()}-elsewhere")
        yield client
        assert client.call("echo", after="all") == {"after": "all"}


def test_forty_megabytes_pass_both_ways(daemon: DaemonProcess) -> None:
    with one_connection() as client:
        text = "0123456789" * 4_000_000
        assert client.call("fill", size=len(text)) == "x" * len(text)
        assert client.call("echo", text=text) == {"text": text}


def test_a_request_above_the_limit_is_not_sent(daemon: DaemonProcess) -> None:
    with one_connection() as client:
        with pytest.raises(MessageTooLarge, match=rf"\d+ bytes is above the limit of {LIMIT} bytes") as caught:
            client.call("echo", text="x" * (65 * MIB))
        assert caught.value.limit == LIMIT
        assert caught.value.size is not None
        assert 65 * MIB < caught.value.size < 65 * MIB + 100


def test_a_reply_above_the_limit_is_an_error(daemon: DaemonProcess) -> None:
    with one_connection() as client:
        with pytest.raises(RemoteError, match=f"of {65 * MIB + ENVELOPE} bytes is above the limit of {LIMIT} bytes") as caught:
            client.call("fill", size=65 * MIB)
        assert caught.value.type == "MessageTooLarge"


def test_the_limit_is_exact() -> None:
    with spawn_daemon("test", max_message=1000), one_connection() as client:
        assert client.call("fill", size=1000 - ENVELOPE) == "x" * (1000 - ENVELOPE)
        with pytest.raises(RemoteError, match="of 1001 bytes is above the limit of 1000 bytes"):
            client.call("fill", size=1001 - ENVELOPE)
        message: dict[str, Any] = {"method": "log", "params": {"text": ""}}
        padding = 1000 - len(json.dumps(message, separators=(",", ":")))
        message["params"]["text"] = "x" * padding
        assert client.request(message) == {"result": []}
        # The limit is in the record: the request is not sent.
        with pytest.raises(MessageTooLarge, match="of 1001 bytes is above the limit of 1000 bytes"):
            client.request({"method": "log", "params": {"text": "x" * (padding + 1)}})


def test_a_client_refuses_a_reply_above_its_limit(daemon: DaemonProcess) -> None:
    with connect_daemon("test", max_message=1000) as client:
        with pytest.raises(MessageTooLarge, match="of 2013 bytes is above the limit of 1000 bytes"):
            client.call("fill", size=2000)
        with pytest.raises(MessageTooLarge):
            client.call("echo", text="x" * 1000)
        assert client.call("echo", n=1) == {"n": 1}


def test_a_larger_limit_on_both_sides_lets_more_pass() -> None:
    with spawn_daemon("test", max_message=100 * MIB):
        message = {"method": "fill", "params": {"size": 65 * MIB}}
        assert len(request("test", message, timeout=PATIENCE, max_message=100 * MIB)["result"]) == 65 * MIB


def test_a_limit_below_the_channels_replies_hangs_nobody() -> None:
    """The error for an oversized reply is oversized too."""
    with spawn_daemon("test", max_message=100):
        for _ in range(2):
            with pytest.raises((RemoteError, ConnectionError)), connect_daemon("test") as client:
                client.call("fill", size=100, timeout=5.0)
        assert ping("test")


TEXTS = ["\ud800", "\udfff lone", "\U0001f600\U0010ffff", "a\0b\0", "\u2028\u2029\x7f\x85\x1b", "\\u0000", "e\u0301", ""]
VALUES: list[Any] = [0, -0.0, 2**64 + 1, -(2**63), 1e308, 5e-324, 0.1, True, None, [], {}, [[[{"a": [None, False]}]]]]


def test_every_json_value_survives_a_round_trip(daemon: DaemonProcess) -> None:
    with one_connection() as client:
        params = {**{text: text for text in TEXTS}, "values": VALUES}
        # repr: True == 1, and -0.0 == 0.
        assert repr(client.call("echo", params=params)) == repr({"params": params})


NOT_JSON = {
    "NaN": (float("nan"), "float"),
    "set": ({1}, "set"),
    "complex": (1j, "complex"),
    "digits": (10**5000, "4300 digits"),
}


@pytest.mark.parametrize(("value", "named"), NOT_JSON.values(), ids=NOT_JSON)
def test_unsendable_values_are_not_sent(daemon: DaemonProcess, value: Any, named: str) -> None:
    with one_connection() as client, pytest.raises(ProtocolError, match=rf"can't be sent as JSON: .*\b{named}\b"):
        client.call("echo", value=value)


def test_a_cycle_is_not_sent(daemon: DaemonProcess) -> None:
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    with one_connection() as client, pytest.raises(ProtocolError):
        client.request(cycle)


@pytest.mark.parametrize(
    ("what", "kind", "named"),
    [("set", "ProtocolError", "set"), ("nan", "ProtocolError", "float"), ("list", "TypeError", "list")],
)
def test_the_error_for_an_unsendable_reply_names_the_type(daemon: DaemonProcess, what: str, kind: str, named: str) -> None:
    with one_connection() as client:
        with pytest.raises(RemoteError, match=rf"\b{named}\b") as caught:
            client.call("return", what=what)
        assert caught.value.type == kind


@pytest.mark.parametrize("text", ["as told", "", "\ud800 and \0", "two\nlines"], ids=ascii)
def test_a_handlers_exception_is_an_error_and_is_logged(text: str) -> None:
    with spawn_daemon("test"), one_connection() as client:
        with pytest.raises(RemoteError) as caught:
            client.call("raise", text=text)
        assert (caught.value.type, caught.value.message) == ("ValueError", text)
    log = log_path("test").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log
    assert "raise ValueError(params" in log


def test_an_exception_without_a_readable_text_is_an_error_too(daemon: DaemonProcess) -> None:
    with one_connection() as client:
        with pytest.raises(RemoteError) as caught:
            client.call("raise unprintable", timeout=5.0)
        assert caught.value.type == "UnprintableError"


def test_a_reply_that_cannot_be_read_is_an_error_too(daemon: DaemonProcess) -> None:
    with one_connection() as client, pytest.raises(RemoteError):
        client.call("return unreadable", timeout=5.0)


def test_an_exception_text_above_the_limit_is_an_error() -> None:
    above = pytest.raises(RemoteError, match="above the limit of 1000 bytes")
    with spawn_daemon("test", max_message=1000), one_connection() as client, above:
        result_of(client.request({"method": "raise", "params": {"text": "\n" * 480}}), {})  # 998 bytes, 1004 in the reply


def is_served() -> bool:
    try:
        return request("test", {"method": "echo", "params": {"n": 1}}) == {"result": {"n": 1}}
    except Busy:
        return False


def test_requests_above_max_connections_are_busy() -> None:
    with spawn_daemon("test", max_connections=2) as daemon, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(connect_daemon("test")) for _ in range(2))
        for client in (first, second):
            assert client.call("echo", n=1) == {"n": 1}
        with connect_daemon("test") as third:
            for _ in range(3):
                with pytest.raises(Busy):
                    third.call("sleep", seconds=0, tag="must not run")
            assert ping("test")
            assert identify("test") == records.load("test").pid
            # Connected clients are unaffected, and another one is admitted once there is room.
            assert second.call("log") == []
            first.close()
            wait_until(is_served)
            assert third.call("echo", n=3) == {"n": 3}
        wait_until(is_served)
        assert first.name == "test"

        with connect_daemon("test") as fourth:
            assert fourth.call("echo", n=4) == {"n": 4}
            assert not is_served()
            assert request("test", {"meta": "shutdown"}) == {"shutdown": True}
            assert daemon.wait() == 0


def test_requests_on_one_connection_are_answered_in_order(daemon: DaemonProcess) -> None:
    def frame(method: str, **params: Any) -> bytes:
        return json.dumps({"method": method, "params": params}).encode()

    with dial_daemon("test") as connection:
        connection.send_bytes(frame("sleep", seconds=0.2, tag="first"))
        for number in range(100):
            connection.send_bytes(frame("echo", n=number))
        connection.send_bytes(frame("log"))
        replies = [json.loads(connection.recv_bytes(MIB))["result"] for _ in range(102)]
    assert replies == ["first", *({"n": number} for number in range(100)), [["begin", "first"], ["end", "first"]]]


def test_requests_on_two_connections_run_at_once(daemon: DaemonProcess) -> None:
    def meet(tag: str) -> Any:
        return request("test", {"method": "meet", "params": {"tag": tag}}, timeout=PATIENCE)["result"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(meet, "ab")) == ["a", "b"]


def test_a_long_request_delays_no_short_one(daemon: DaemonProcess) -> None:
    with connect_daemon("test") as client, ThreadPoolExecutor(1) as pool:
        job = pool.submit(client.call, "sleep", seconds=NEVER, tag="long", timeout=NEVER)
        wait_until(lambda: request("test", {"method": "log"})["result"] == [["begin", "long"]])
        with one_connection() as other:
            for number in range(100):
                assert other.call("echo", n=number) == {"n": number}
        assert not job.done()
        client.close()
        assert isinstance(job.exception(PATIENCE), ClientClosed)
