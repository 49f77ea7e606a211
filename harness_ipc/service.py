"""Services: a base class for handlers with methods, which have typed parameters."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, overload

from ._convert import Fields, Mismatch, converter, did_you_mean, resolve
from ._descriptors import end_child
from ._protocol import messages
from ._server.requests import Dispatcher, outliving_caller
from ._workers import Workers
from .errors import InvalidParams, MethodNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ._protocol.messages import Message

    F = TypeVar("F", bound=Callable[..., Any])

# Threads for blocking methods; further calls queue in order.
_MAX_THREADS = 32
_MARK = "_harness_ipc_method"
# Methods of an app that `run_daemon` calls.
_RESERVED = ("start", "stop", "health")


@overload
def method(function: F, /) -> F: ...
@overload
def method(*, cancel_on_disconnect: bool = True) -> Callable[[F], F]: ...
def method(function: Callable[..., Any] | None = None, /, *, cancel_on_disconnect: bool = True) -> Any:
    """Decorator: make a function of a `Service` callable by clients.

    The function is a coroutine function, an async generator function, which answers with a stream, or a plain function, which
    runs in a thread. With `cancel_on_disconnect=False` it is not cancelled when its caller disconnects.

    Raises `TypeError` for anything else, and for a positional-only or ``*args`` parameter.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        name = getattr(function, "__qualname__", repr(function))
        if not inspect.isfunction(function):
            raise TypeError(f"{name} is not a function: write @method directly above `async def` or `def`")
        if inspect.isgeneratorfunction(function):
            raise TypeError(f"{name} is a generator: write `async def` for a method that answers with a stream")
        kinds = {parameter.kind for parameter in inspect.signature(function, **_AS_TEXT).parameters.values()}
        if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
            raise TypeError(f"{name} has a parameter without a name that clients could use: leave out `/` and `*` before it")
        setattr(function, _MARK, cancel_on_disconnect)
        return function

    return mark if function is None else mark(function)


class _Method(NamedTuple):
    """A method: how to call it, and its description."""

    fields: Fields
    is_async: bool
    signature: str
    doc: str
    is_stream: bool


class Service(Dispatcher):
    """The base class of services, to be passed to `run_daemon`.

    ```python
    class Words(Service):
        @method
        async def count(self, text: str) -> int:
            return len(text.split())

    run_daemon(Words(), "words")
    ```

    Parameters are validated and converted by their annotations: see *Services* in the documentation. A subclass may have
    ``async def start(self)``, called before clients can find the daemon, ``stop``, called after the last request, and
    ``health``, which returns a dict.

    Creating an instance raises `TypeError` for an annotation that can't be resolved, and for a method with a reserved name:
    ``start``, ``stop``, ``health``, or an attribute of this class.
    """

    _methods: ClassVar[dict[str, _Method]] = {}
    uninterrupted: frozenset[str] = frozenset()

    if not TYPE_CHECKING:  # type checkers should see only the __init__ of the subclass

        def __new__(cls, *arguments, **keywords):
            if "_methods" not in cls.__dict__:
                cls._methods, cls.uninterrupted = _find_methods(cls)
            if cls.__init__ is object.__init__ and (arguments or keywords):
                raise TypeError(f"{cls.__name__}() takes no arguments")
            self = super().__new__(cls)
            self.__slots = asyncio.Semaphore(_MAX_THREADS)
            self.__workers = Workers("harness-ipc-method")
            weakref.finalize(self, self.__workers.close)
            return self

    def encode_result(self, value: Any) -> Any:
        """Convert `value`, a part of a result that is not JSON. Override this to support more types.

        Bytes become base64, a dataclass an object of its fields, a path its text, and a datetime ISO 8601. Raises `TypeError`
        for other types.
        """
        return messages.to_json(value)

    def describe_methods(self) -> list[Message]:
        """Return the name, signature and first docstring line of each method, and whether it answers with a stream."""
        return [
            {"name": name, "signature": found.signature, "doc": found.doc, "stream": found.is_stream or _returns_stream(found)}
            for name, found in self._methods.items()
        ]

    def __call__(self, message: Message) -> Awaitable[Message] | AsyncIterator[Any]:
        """Answer ``{"method": ..., "params": {...}}``. Raises `MethodNotFound` and `InvalidParams` before anything runs."""
        name = message.get("method")
        found = self._methods.get(name) if isinstance(name, str) else None
        if found is None:
            similar = did_you_mean(name, self._methods) if isinstance(name, str) else ""
            what = f"there is no method {name!r:.100}" if "method" in message else 'the message has no "method"'
            raise MethodNotFound(f"{what}{similar or f': there are {_enumerate(self._methods)}'}")
        assert isinstance(name, str)
        params = message.get("params")
        try:
            arguments = found.fields.convert({} if params is None else params)
        except (Mismatch, RecursionError) as error:
            raise InvalidParams(f"{found.signature}: {error}") from None
        function = getattr(self, name)
        if found.is_stream:
            stream: AsyncIterator[Any] = function(**arguments)
            return stream
        if found.is_async:
            return _reply(function(**arguments))
        return _reply(self._run_in_thread(partial(function, **arguments)))

    async def _run_in_thread(self, function: Callable[[], Any]) -> Any:
        slots: asyncio.Semaphore = self.__slots  # type: ignore[attr-defined]
        workers: Workers = self.__workers  # type: ignore[attr-defined]
        async with slots:
            with outliving_caller():  # a thread can't be cancelled
                failure, result = await workers.run(partial(contextvars.copy_context().run, _catch, function))
        try:
            if failure is not None:
                raise failure
            return result
        finally:
            del failure  # its traceback has this frame


def _catch(function: Callable[[], Any]) -> tuple[BaseException | None, Any]:
    pid, failure, result = os.getpid(), None, None
    # Returned, not raised: a future does not accept StopIteration.
    try:
        result = function()
    except BaseException as error:
        failure = error
    if os.getpid() != pid:
        end_child(failure)
    return failure, result


async def _reply(result: Awaitable[Any]) -> Any:
    value = await result
    return value if hasattr(value, "__anext__") else {"result": value}


def _find_methods(service: type[Service]) -> tuple[dict[str, _Method], frozenset[str]]:
    methods, uninterrupted = {}, set()
    for name in dir(service):
        function = inspect.getattr_static(service, name)
        cancel_on_disconnect = getattr(function, _MARK, None)
        if cancel_on_disconnect is None or not inspect.isfunction(function):
            continue
        if name in _RESERVED or hasattr(Service, name):
            raise TypeError(f"{service.__name__}.{name}: the name is reserved by Service: rename the method")
        methods[name] = _describe(function, name)
        if not cancel_on_disconnect:
            uninterrupted.add(name)
    return methods, frozenset(uninterrupted)


def _describe(function: Callable[..., Any], name: str) -> _Method:
    where = function.__qualname__
    signature = inspect.signature(function, **_AS_FOUND)
    parameters = list(signature.parameters.values())[1:]  # without self
    # Without the annotation of the result, which may be importable only by a type checker.
    annotations = {found.name: found.annotation for found in parameters if found.annotation is not found.empty}
    hints = resolve(annotations, inspect.unwrap(function).__globals__, where)
    fields = Fields()
    for parameter in parameters:
        convert = converter(hints.get(parameter.name, Any))
        if parameter.kind is parameter.VAR_KEYWORD:
            fields.add_others(convert)
        else:
            fields.add(parameter.name, convert, required=parameter.default is parameter.empty)
    return _Method(
        fields,
        is_async=inspect.iscoroutinefunction(function),
        signature=name + _show_signature(function),
        doc=(inspect.getdoc(function) or "").partition("\n")[0],
        is_stream=inspect.isasyncgenfunction(function),
    )


# Since Python 3.14, annotations are evaluated on access, which may fail.
_AS_FOUND: dict[str, Any] = {}
_AS_TEXT: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    import annotationlib

    _AS_FOUND = {"annotation_format": annotationlib.Format.FORWARDREF}
    _AS_TEXT = {"annotation_format": annotationlib.Format.STRING}


class _Text(str):
    """An annotation written as a string, shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _show_signature(function: Callable[..., Any]) -> str:
    def show(annotation: Any) -> Any:
        return _Text(annotation) if isinstance(annotation, str) else annotation

    signature = inspect.signature(function, **_AS_TEXT)
    parameters = [found.replace(annotation=show(found.annotation)) for found in list(signature.parameters.values())[1:]]
    return str(signature.replace(parameters=parameters, return_annotation=show(signature.return_annotation)))


def _returns_stream(method: _Method) -> bool:
    """Return whether a method that is not a generator has the return annotation of a stream."""
    returned = method.signature.rpartition(" -> ")[2].partition("[")[0]
    return returned.rpartition(".")[2] in ("AsyncIterator", "AsyncIterable", "AsyncGenerator")


def _enumerate(names: dict[str, _Method]) -> str:
    return ", ".join(map(repr, names)) or "none"
