"""Strict conversion of JSON to annotated types. An error says where in the value it is."""

from __future__ import annotations

import dataclasses
import typing
from base64 import b64decode
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

# Returns the converted value, or raises `Mismatch`. None means that values pass unchanged.
Convert = Callable[[Any], Any] | None


class Mismatch(Exception):
    """A value does not match its annotation. `path` locates it, as in "items[3].when"."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path = ""

    def __str__(self) -> str:
        return f"{self.path.removeprefix('.')}: {self.args[0]}" if self.path else str(self.args[0])

    def within(self, step: str) -> Mismatch:
        """Return this error with `step` put before its path."""
        self.path = step + self.path
        return self


class Fields:
    """Named values, each with a conversion: the parameters of a method or the fields of a dataclass."""

    def __init__(self) -> None:
        self._converters: dict[str, Convert] = {}
        self._required: set[str] = set()
        self._takes_others = False
        self._convert_other: Convert = None

    def add(self, name: str, convert: Convert, *, required: bool) -> None:
        """Accept values of this name."""
        self._converters[name] = convert
        if required:
            self._required.add(name)

    def add_others(self, convert: Convert) -> None:
        """Accept values of all other names."""
        self._takes_others, self._convert_other = True, convert

    def convert(self, values: Any) -> dict[str, Any]:
        """Return `values` converted. Raises `Mismatch`."""
        if type(values) is not dict:
            raise _expected("an object", values)
        converted = {}
        for name, value in values.items():
            if name not in self._converters and not self._takes_others:
                raise Mismatch(f"there is no {name!r:.100}{did_you_mean(name, self._converters)}")
            convert = self._converters.get(name, self._convert_other)
            try:
                converted[name] = value if convert is None else convert(value)
            except Mismatch as error:
                raise error.within(f".{name[:100]}") from None
        for name in self._converters:
            if name in self._required and name not in converted:
                raise Mismatch(f"{name!r} is missing")
        return converted


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Return ", did you mean ...?" with similar known names, or an empty string if there are none."""
    from difflib import get_close_matches

    similar = get_close_matches(name[:100], known)
    return f", did you mean {' or '.join(map(repr, similar))}?" if similar else ""


def resolve(annotations: dict[str, Any], namespace: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `annotations` with strings evaluated. Raises `TypeError`."""
    holder = type("_", (), {"__annotations__": annotations, "__module__": namespace.get("__name__")})
    try:
        return typing.get_type_hints(holder, namespace)
    except Exception as error:
        raise TypeError(
            f"an annotation of {where} can't be resolved ({error}): import or define the name at the top of its module, "
            "and not for the type checker alone"
        ) from error


def converter(hint: Any, known: dict[type, Convert] | None = None) -> Convert:
    """Return the conversion of JSON to `hint`. `known` has the dataclasses that enclose it. Raises `TypeError`.

    Supported are int, float, str, bool, None, list, dict, unions, Literal, dataclasses, Path, datetime and bytes. Values for
    any other annotation pass unchanged. An int is accepted as a float; a bool or a str is not accepted as an int.
    """
    known = {} if known is None else known
    hint = getattr(hint, "__supertype__", hint)  # NewType
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _literal(arguments)
    if origin in (typing.Union, UnionType):
        return _union(hint, [converter(argument, known) for argument in arguments])
    if origin is list:
        return _list(converter(arguments[0], known))
    if origin is dict:
        return _dict(*(converter(argument, known) for argument in arguments))
    if not isinstance(hint, type):
        return None
    if dataclasses.is_dataclass(hint):
        return known[hint] if hint in known else _dataclass(hint, known)
    return _PLAIN.get(hint)


def _expected(what: str, value: Any) -> Mismatch:
    shown = f" {value!r:.40}" if isinstance(value, (str, int, float)) else ""
    return Mismatch(f"expected {what}, got {'None' if value is None else type(value).__name__}{shown}")


def _exactly(kind: type) -> Convert:
    def convert(value: Any) -> Any:
        # type(): bool is a subclass of int.
        if type(value) is not kind:
            raise _expected(kind.__name__, value)
        return value

    return convert


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise _expected("float", value)
    try:
        return float(value)
    except OverflowError:
        raise _expected("float", value) from None


def _parsed(what: str, parse: Callable[[str], Any]) -> Convert:
    def convert(value: Any) -> Any:
        if type(value) is not str:
            raise _expected(what, value)
        try:
            return parse(value)
        except ValueError:
            raise _expected(what, value) from None

    return convert


_PLAIN: dict[type, Convert] = {
    **{kind: _exactly(kind) for kind in (int, str, bool, list, dict)},
    NoneType: _exactly(NoneType),
    float: _float,
    Path: _parsed("a path", Path),
    datetime: _parsed("a datetime in ISO 8601", datetime.fromisoformat),
    bytes: _parsed("base64", lambda text: b64decode(text, validate=True)),
}


def _literal(values: tuple[Any, ...]) -> Convert:
    def convert(value: Any) -> Any:
        for allowed in values:
            if type(value) is type(allowed) and value == allowed:
                return allowed
        raise _expected(" or ".join(map(repr, values)), value)

    return convert


def _union(hint: Any, members: list[Convert]) -> Convert:
    if None in members:
        return None

    def convert(value: Any) -> Any:
        converted, errors = [], []
        for member in members:
            assert member is not None
            try:
                converted.append(member(value))
            except Mismatch as error:
                errors.append(error)
        if not converted:
            # The member that failed deepest inside the value.
            nearest = max(errors, key=lambda error: len(error.path))
            raise nearest if nearest.path else _expected(str(hint).replace("typing.", ""), value)
        # A member that takes the value unchanged comes first: for float | int, 1 stays an int.
        return next((found for found in converted if found is value), converted[0])

    return convert


def _list(item: Convert) -> Convert:
    if item is None:
        return _PLAIN[list]

    def convert(value: Any) -> list[Any]:
        if type(value) is not list:
            raise _expected("list", value)
        converted = []
        for i, found in enumerate(value):
            try:
                converted.append(item(found))
            except Mismatch as error:
                raise error.within(f"[{i}]") from None
        return converted

    return convert


def _dict(key: Convert, item: Convert) -> Convert:
    def convert(value: Any) -> dict[Any, Any]:
        if type(value) is not dict:
            raise _expected("dict", value)
        converted = {}
        for name, found in value.items():
            try:
                converted[key(name) if key else name] = item(found) if item else found
            except Mismatch as error:
                raise error.within(f"[{name!r:.100}]") from None
        return converted

    return convert


def _dataclass(kind: Any, known: dict[type, Convert]) -> Convert:
    fields = Fields()

    def convert(value: Any) -> Any:
        arguments = fields.convert(value)
        try:
            return kind(**arguments)
        except (TypeError, ValueError) as error:  # of its __post_init__
            raise Mismatch(f"{kind.__name__}: {error}") from error

    # Before its fields: one of them may have this type.
    known[kind] = convert
    try:
        hints = typing.get_type_hints(kind)
    except Exception as error:
        raise TypeError(f"an annotation of the dataclass {kind.__name__} can't be resolved ({error})") from error
    for field in dataclasses.fields(kind):
        if field.init:
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            fields.add(field.name, converter(hints[field.name], known), required=not has_default)
    return convert
