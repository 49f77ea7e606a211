"""Any bytes from outside give a value or a typed error, in bounded memory. `tests.fuzz` searches longer."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.configuration
import pytest
from hypothesis import strategies as st

from harness_ipc._protocol import messages
from harness_ipc.errors import HarnessIPCError, ProtocolError
from tests.fuzz import targets

# Keep the files of hypothesis out of the checkout.
_HOME = tempfile.mkdtemp(prefix="hi-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
hypothesis.configuration.set_hypothesis_home_dir(_HOME)

MIB = 1024 * 1024


def examples(number: int) -> Callable[[Any], Any]:
    """Return a decorator: `number` examples, the same each time, without a deadline."""
    return hypothesis.settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )


# The corpus, and earlier bugs.


def corpus() -> Iterator[Any]:
    for target in targets.TARGETS:
        for file, data in targets.corpus(target).items():
            yield pytest.param(target, data, id=f"{target}/{file}")


def test_every_target_has_a_corpus() -> None:
    assert all(targets.corpus(target) for target in targets.TARGETS)
    assert {path.name for path in targets.CORPUS.iterdir()} == set(targets.TARGETS)


@pytest.mark.parametrize(("target", "data"), list(corpus()))
def test_regressions(target: str, data: bytes) -> None:
    targets.TARGETS[target](data)


# Frames and challenges: nearly valid streams.

HEADERS = st.one_of(
    st.integers(-(2**31), 2**31 - 1).map(lambda size: struct.pack("!i", size)),
    st.integers(0, 2**64 - 1).map(lambda size: struct.pack("!iQ", -1, size)),
    st.integers(0, 8).map(lambda size: struct.pack("!iQ", -1, size)),
)
FRAMES = st.binary(max_size=40).map(targets.frame)


def stream(*parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(st.one_of(*parts), max_size=8).map(b"".join)


@examples(100)
@hypothesis.given(how=st.binary(min_size=1, max_size=1), data=stream(FRAMES, FRAMES, HEADERS, st.binary(max_size=20)))
def test_any_stream_is_its_frames_and_then_one_typed_error(how: bytes, data: bytes) -> None:
    targets.frames(how + data)


DIGESTS = st.sampled_from(
    [b"", b"{md5}", b"{sha1}", b"{sha256}", b"{sha384}", b"{sha512}", b"{}", b"{", b"{MD5}", b"{shake_128}"]
)
PROOFS = st.tuples(DIGESTS, st.sampled_from([0, 1, 16, 20, 32, 40, 48, 64, 200])).map(lambda proof: proof[0] + bytes(proof[1]))
STEPS = st.tuples(st.integers(0, 4), st.one_of(PROOFS, st.binary(max_size=255))).map(
    lambda step: bytes([step[0], len(step[1])]) + step[1]
)


@examples(100)
@hypothesis.given(role=st.integers(0, 2), script=stream(STEPS))
def test_peers_without_the_key_learn_nothing(role: int, script: bytes) -> None:
    targets.challenge(bytes([role]) + script)


# JSON, and nearly valid JSON.


def texts(characters: str, max_size: int) -> st.SearchStrategy[str]:
    """Return texts as `st.text` does, without its table of all characters: to make that takes longer than the examples."""
    return st.lists(st.sampled_from(characters), max_size=max_size).map("".join)


TEXTS = texts('abc é😀\ud800\udcff\u2028\0\x1b\x9b\n\r"\\{}[]', 20)
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1.5, 1e308, True, False])
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=10,
)


def objects(*keys: str) -> st.SearchStrategy[bytes]:
    """Return objects with any values for any of these keys, some truncated or damaged."""
    whole = st.dictionaries(st.one_of(st.sampled_from(keys), TEXTS), VALUES, max_size=6).map(lambda o: json.dumps(o).encode())
    return st.one_of(whole, whole, st.builds(spoil, whole, st.integers(0, 400), st.binary(max_size=3)), st.binary(max_size=60))


def spoil(data: bytes, place: int, other: bytes) -> bytes:
    place %= len(data)
    return data[:place] + other + data[place + len(other) :] if other else data[:place]


@examples(40)
@hypothesis.given(objects("result", "error", "meta", "type", "message"))
def test_any_frame_is_a_message_or_one_typed_error(data: bytes) -> None:
    targets.message(data)


FIELDS = [
    "schema",
    "name",
    "generation",
    "address",
    "authkey",
    "pid",
    "create_time",
    "started_at",
    "argv",
    "max_message",
    "state",
]


@examples(40)
@hypothesis.given(objects(*FIELDS, "app_version", "start_ticks", "boot_id"))
def test_any_record_is_loaded_or_refused(data: bytes) -> None:
    targets.record(data)


@examples(100)
@hypothesis.given(st.one_of(st.binary(max_size=70), texts("aZ9_-./\\\n \0é\uff11", 70).map(str.encode)))
def test_any_name_is_a_file_of_the_directory_or_refused(data: bytes) -> None:
    targets.name(data)


WORDS = st.sampled_from(
    [b"", b"-", b"--", b"--help", b"-1", b"nan", b"1e999", b"9" * 30, b"9" * 5000, b"1_0", b"\xff", b"\x1b[2J"]
)


@examples(30)
@hypothesis.given(how=st.integers(0, 5), word=st.one_of(WORDS, objects("method", "meta")))
def test_any_argument_gives_one_line_and_a_status(how: int, word: bytes) -> None:
    targets.command(bytes([how]) + word)


# Memory.


def peak_of(action: Callable[[], object]) -> int:
    """Return the peak memory in bytes of `action`, which raises a typed error."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(HarnessIPCError):
            action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":' * MIB,
        b'{"a":' + b"[" * 5 * MIB,
        b'{"a":' + b"9" * 10 * MIB + b"}",
        b'{"a":-' + b"9" * 10 * MIB + b"}",
        b"\xff" * MIB,
    ],
    ids=["deep objects", "deep lists", "digits", "negative digits", "no text"],
)
def test_an_invalid_frame_takes_little_memory(data: bytes) -> None:
    def decode() -> None:
        with pytest.raises(ProtocolError) as caught:
            messages.decode(data)
        targets.check_text(caught.value)
        raise caught.value

    # The text, and the digits of a number again. CPython 3.14 and later take five times the length of invalid UTF-8.
    most = 5 if sys.version_info >= (3, 14) and data[0] == 0xFF else 2
    assert peak_of(decode) < most * len(data) + MIB
