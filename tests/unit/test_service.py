"""Services without a server: methods, binding and conversion of parameters, descriptions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, NewType, Optional

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness_ipc import InvalidParams, MethodNotFound, Service, method
from harness_ipc._convert import Mismatch, converter
from harness_ipc._protocol import messages

Tag = NewType("Tag", int)


@dataclass
class Entry:
    path: Path
    when: datetime | None = None
    children: list[Entry] = field(default_factory=list)


@dataclass
class Positive:
    n: int

    def __post_init__(self) -> None:
        if self.n <= 0:
            raise ValueError("n is not positive")


class Kinds(Service):
    """One method for each kind of annotation, and an instance that counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def take(self, value: Any) -> Any:
        self.calls += 1
        return value

    @method
    async def integer(self, v: int) -> Any:
        return self.take(v)

    @method
    async def real(self, v: float) -> Any:
        return self.take(v)

    @method
    async def text(self, v: str) -> Any:
        return self.take(v)

    @method
    async def flag(self, v: bool) -> Any:
        return self.take(v)

    @method
    async def numbers(self, v: list[float]) -> Any:
        return self.take(v)

    @method
    async def items(self, v: list) -> Any:  # type: ignore[type-arg]
        return self.take(v)

    @method
    async def table(self, v: dict[str, list[Path]]) -> Any:
        return self.take(v)

    @method
    async def optional(self, v: Optional[int] = None) -> Any:  # noqa: UP045
        return self.take(v)

    @method
    async def either(self, v: float | int | datetime) -> Any:
        return self.take(v)

    @method
    async def choice(self, v: Literal["a", 1, None]) -> Any:
        return self.take(v)

    @method
    async def entry(self, v: Entry) -> Any:
        return self.take(v)

    @method
    async def maybe_entry(self, v: Entry | None) -> Any:
        return self.take(v)

    @method
    async def positive(self, v: Positive) -> Any:
        return self.take(v)

    @method
    async def path(self, v: Path) -> Any:
        return self.take(v)

    @method
    async def when(self, v: datetime) -> Any:
        return self.take(v)

    @method
    async def data(self, v: bytes) -> Any:
        return self.take(v)

    @method
    async def tag(self, v: Tag) -> Any:
        return self.take(v)

    @method
    async def pair(self, v: tuple[int, int]) -> Any:
        return self.take(v)

    @method
    async def anything(self, v) -> Any:  # type: ignore[no-untyped-def]
        return self.take(v)

    @method
    async def others(self, a: int = 1, **v: float) -> Any:
        return self.take(v)


def call(service: Service, name: Any, params: Any) -> Any:
    async def run() -> Any:
        answer: Any = service({"method": name, "params": params})
        return (await answer)["result"]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "sent", "received"),
    [
        ("integer", 2**70, 2**70),
        ("real", 1.5, 1.5),
        ("real", 2, 2.0),
        ("text", "x", "x"),
        ("flag", True, True),
        ("numbers", [1, 2.5], [1.0, 2.5]),
        ("items", [1, "a", None], [1, "a", None]),
        ("table", {"a": ["x", "y"]}, {"a": [Path("x"), Path("y")]}),
        ("optional", None, None),
        ("optional", 3, 3),
        ("either", 1, 1),
        ("either", "2024-01-01", datetime(2024, 1, 1)),
        ("choice", "a", "a"),
        ("choice", 1, 1),
        ("choice", None, None),
        (
            "entry",
            {"path": "a", "children": [{"path": "b", "when": "2024-01-01T00:00:00Z"}]},
            Entry(Path("a"), None, [Entry(Path("b"), datetime(2024, 1, 1, tzinfo=UTC))]),
        ),
        ("maybe_entry", {"path": "a"}, Entry(Path("a"))),
        ("positive", {"n": 1}, Positive(1)),
        ("path", "a/b", Path("a/b")),
        ("when", "2024-02-29T12:00:00+02:00", datetime.fromisoformat("2024-02-29T10:00:00+00:00")),
        ("data", base64.b64encode(bytes(range(256))).decode(), bytes(range(256))),
        ("tag", 1, 1),
        ("pair", ["left", "alone"], ["left", "alone"]),
        ("anything", {"left": ["alone"]}, {"left": ["alone"]}),
    ],
)
def test_values_are_converted_by_their_annotation(name: str, sent: Any, received: Any) -> None:
    result = call(Kinds(), name, {"v": sent})
    assert result == received
    assert type(result) is type(received)


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("integer", {"v": "1"}, "v: expected int, got str '1'"),
        ("integer", {"v": True}, "v: expected int, got bool True"),
        ("integer", {"v": 1.0}, "v: expected int, got float 1.0"),
        ("integer", {"v": None}, "v: expected int, got None"),
        ("real", {"v": "1"}, "v: expected float, got str '1'"),
        ("real", {"v": False}, "v: expected float, got bool False"),
        ("real", {"v": 10**400}, "v: expected float, got int"),
        ("text", {"v": 1}, "v: expected str, got int 1"),
        ("flag", {"v": 0}, "v: expected bool, got int 0"),
        ("numbers", {"v": [1, [2]]}, "v[1]: expected float, got list"),
        ("items", {"v": {}}, "v: expected list, got dict"),
        ("table", {"v": {"a b": [1]}}, "v['a b'][0]: expected a path, got int 1"),
        ("table", {"v": []}, "v: expected dict, got list"),
        ("optional", {"v": "1"}, "v: expected Optional[int], got str '1'"),
        ("either", {"v": "never"}, "v: expected float | int | datetime.datetime, got str 'never'"),
        ("choice", {"v": True}, "v: expected 'a' or 1 or None, got bool True"),
        ("entry", {"v": {}}, "v: 'path' is missing"),
        ("entry", {"v": {"path": "a", "chidlren": []}}, "v: there is no 'chidlren', did you mean 'children'?"),
        ("entry", {"v": {"path": "a", "children": [{"path": "b", "when": 3}]}}, "v.children[0].when: expected"),
        ("maybe_entry", {"v": {"path": 1}}, "v.path: expected a path, got int 1"),
        ("maybe_entry", {"v": 1}, "v: expected test_service.Entry | None, got int 1"),
        ("positive", {"v": {"n": 0}}, "v: Positive: n is not positive"),
        ("when", {"v": "yesterday"}, "v: expected a datetime in ISO 8601, got str 'yesterday'"),
        ("data", {"v": "!"}, "v: expected base64, got str '!'"),
        ("integer", {}, "'v' is missing"),
        ("integer", None, "'v' is missing"),
        ("integer", {"v": 1, "w": 2}, "there is no 'w'"),
        ("integer", [1], "expected an object, got list"),
        ("others", {"b": 1, "c": "x"}, "c: expected float, got str 'x'"),
        ("integer", {"v": "x" * 10**6}, "v: expected int, got str 'xxxx"),
        ("integer", {"v" * 10**6: 1}, "there is no 'vvvv"),
    ],
)
def test_an_invalid_parameter_is_an_error_with_path_and_signature(name: str, params: Any, text: str) -> None:
    service = Kinds()
    with pytest.raises(InvalidParams) as caught:
        call(service, name, params)
    assert text in caught.value.message.replace("tests.unit.", "")
    assert caught.value.message.startswith(f"{name}(")
    assert len(caught.value.message) < 300
    assert service.calls == 0


def test_parameters_may_be_left_out_or_have_any_name() -> None:
    assert call(Kinds(), "optional", {}) is None
    assert call(Kinds(), "others", {"b": 1}) == {"b": 1.0}


def test_a_nesting_that_is_too_deep_is_refused() -> None:
    entry: dict[str, Any] = {"path": "a"}
    for _ in range(20_000):
        entry = {"path": "a", "children": [entry]}
    with pytest.raises(InvalidParams):
        call(Kinds(), "entry", {"v": entry})
    while entry:  # otherwise the interpreter recurses when it frees it
        entry = entry.pop("children", [{}])[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flga", "'flga', did you mean 'flag'?"),
        ("take", "'take'"),
        ("__init__", "'__init__'"),
        ("xyz", "there are 'anything', 'choice', 'data'"),
        (None, "there is no method None: there are"),
        ("x" * 10**6, "there is no method 'xxxx"),
        (["integer"], "there is no method ['integer']"),
    ],
)
def test_an_unknown_method_is_an_error_that_names_similar_ones(name: Any, text: str) -> None:
    with pytest.raises(MethodNotFound, match="there is no method") as caught:
        call(Kinds(), name, {})
    assert text in caught.value.message


def test_a_message_without_a_method_is_method_not_found() -> None:
    with pytest.raises(MethodNotFound, match="the message has no \"method\": there are 'anything', "):
        Kinds()({"meta": "session"})


# Which functions may be methods.


def test_methods_must_accept_keywords() -> None:
    def positional(self: Any, a: int, /) -> None: ...
    def variadic(self: Any, *a: int) -> None: ...
    def generator(self: Any) -> Any:
        yield 1

    for function in (positional, variadic):
        with pytest.raises(TypeError, match="without a name"):
            method(function)
    with pytest.raises(TypeError, match="generator: write `async def`"):
        method(generator)
    for other in (staticmethod(generator), property(generator), 3):
        with pytest.raises(TypeError, match="is not a function"):
            method(other)  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["start", "stop", "health", "encode_result", "describe_methods"])
def test_names_of_service_attributes_are_reserved(name: str) -> None:
    async def function(self: Any) -> None: ...

    kind = type("Taken", (Service,), {name: method(function)})
    with pytest.raises(TypeError, match=rf"Taken\.{name}: the name is reserved by Service"):
        kind()


def test_unresolved_annotation_fails_at_construction() -> None:
    class Local: ...

    class Odd(Service):
        @method
        async def odd(self, thing: Local) -> None: ...

    with pytest.raises(TypeError, match=r"annotation of .*Odd\.odd can't be resolved \(name 'Local' is not defined\)"):
        Odd()

    class Result(Service):
        @method
        async def fine(self) -> Local:
            return Local()

    assert Result().describe_methods()[0]["signature"] == "fine() -> Local"


def test_a_subclass_inherits_and_overrides_methods() -> None:
    class Base(Service):
        @method
        async def kept(self) -> str:
            return "base"

        @method
        async def overridden(self) -> str:
            return "base"

        @method
        async def hidden(self) -> None: ...

    class Derived(Base):
        @method
        async def overridden(self) -> str:
            return "derived " + await super().overridden()

        async def hidden(self) -> None: ...

    assert [found["name"] for found in Base().describe_methods()] == ["hidden", "kept", "overridden"]
    assert [found["name"] for found in Derived().describe_methods()] == ["kept", "overridden"]
    assert call(Derived(), "overridden", {}) == "derived base"


def test_a_service_takes_the_arguments_of_its_own_init() -> None:
    class Named(Service):
        def __init__(self, name: str) -> None:
            self.name = name

    class Bare(Service): ...

    assert Named("n").name == "n"
    with pytest.raises(TypeError, match=r"Bare\(\) takes no arguments"):
        Bare(1)  # type: ignore[call-arg]


def test_the_description_of_methods() -> None:
    class Described(Service):
        @method
        async def count(self, text: str, *, scale: float = 1.0, mode: Literal["a"] = "a") -> int:
            """Count the words.

            All of them.
            """
            return 1

        @method(cancel_on_disconnect=False)
        async def items(self, n: int) -> AsyncIterator[int]:
            yield n

    count, items = Described().describe_methods()
    signature = "count(text: str, *, scale: float = 1.0, mode: Literal['a'] = 'a') -> int"
    assert count == {"name": "count", "signature": signature, "doc": "Count the words.", "stream": False}
    assert items == {"name": "items", "signature": "items(n: int) -> AsyncIterator[int]", "doc": "", "stream": True}


def test_parameter_types_are_valid_results() -> None:
    entry = Entry(Path("a"), datetime(2024, 1, 1), [Entry(Path("b"))])
    sent = messages.decode(messages.encode({"v": entry, "b": b"\xff"}))
    assert sent["b"] == "/w=="
    assert call(Kinds(), "entry", {"v": sent["v"]}) == entry


# All characters but surrogates, as by default in `st.text`, without its tables: to make those takes longer than the tests.
TEXTS = st.text(st.integers(0, 0x10F7FF).map(lambda code: chr(code if code < 0xD800 else code + 0x800)))
PLAIN: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (str, TEXTS),
    (bool, st.booleans()),
    (bytes, st.binary()),
    (datetime, st.datetimes(timezones=st.sampled_from([None, UTC]))),
    (Path, st.lists(st.sampled_from("ab/.é")).map("".join).map(Path)),
    (Literal["a", 2], st.sampled_from(["a", 2])),
]


def containers(kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        kinds.map(lambda kind: (GenericAlias(list, (kind[0],)), st.lists(kind[1], max_size=3))),
        kinds.map(lambda kind: (GenericAlias(dict, (str, kind[0])), st.dictionaries(TEXTS, kind[1], max_size=3))),
        kinds.map(lambda kind: (kind[0] | None, st.none() | kind[1])),
    )


KINDS = st.recursive(st.sampled_from(PLAIN), containers, max_leaves=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda items: st.lists(items, max_size=3) | st.dictionaries(TEXTS, items, max_size=3),
    max_leaves=6,
)
# Generating values is slow on a loaded machine.
SLOWLY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOWLY
@given(st.data(), KINDS)
def test_default_conversions_match_annotations(data: st.DataObject, kind: tuple[Any, Any]) -> None:
    value = data.draw(kind[1])
    convert = converter(kind[0])
    assert convert is not None
    received = convert(messages.decode(messages.encode({"v": value}))["v"])
    assert received == value
    assert type(received) is type(value)


@SLOWLY
@given(KINDS, JSON)
def test_any_json_is_converted_or_refused(kind: tuple[Any, Any], value: Any) -> None:
    convert = converter(kind[0] | Entry)
    assert convert is not None
    with contextlib.suppress(Mismatch):
        convert(value)
