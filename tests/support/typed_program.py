"""A user's program for the type checker, which is never run: mypy finds each mistake here, or its `type: ignore` is unused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from harness_ipc import Client, Service, method, run_daemon


class Words(Service):
    @method
    async def count(self, text: str) -> int:
        return len(text)

    @method(cancel_on_disconnect=False)
    def blocking(self, text: str) -> int:
        return len(text)

    @method
    async def items(self, n: int) -> AsyncIterator[int]:
        yield n

    @method  # type: ignore[prop-decorator]
    @property
    def number(self) -> int:
        return 1

    @method(cancel_on_disconnect="no")  # type: ignore[call-overload, untyped-decorator]
    async def kept(self) -> None: ...

    wrong = method(3)  # type: ignore[call-overload]


class OnlyHandle:
    async def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        return message


class Streams:
    async def start(self) -> None: ...

    async def handle(self, message: dict[str, Any]) -> AsyncIterator[int]:
        yield 1


class NoHandle:
    async def start(self) -> None: ...


class SyncHandle:
    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        return message


async def handle(message: dict[str, Any]) -> dict[str, Any]:
    return message


async def generate(message: dict[str, Any]) -> AsyncIterator[int]:
    yield 1


def handle_sync(message: dict[str, Any]) -> dict[str, Any]:
    return message


async def no_reply(message: dict[str, Any]) -> int:
    return 1


async def serve(client: Client) -> None:
    run_daemon(Words(), "words")
    run_daemon(OnlyHandle(), "words")
    run_daemon(Streams(), "words")
    run_daemon(handle, "words")
    run_daemon(generate, "words")
    run_daemon(Words, "words")  # type: ignore[arg-type]
    run_daemon(NoHandle(), "words")  # type: ignore[arg-type]
    run_daemon(SyncHandle(), "words")  # type: ignore[arg-type]
    run_daemon(handle_sync, "words")  # type: ignore[arg-type]
    run_daemon(no_reply, "words")  # type: ignore[arg-type]
    run_daemon("words", "words")  # type: ignore[arg-type]
    # Decorated methods keep their types.
    count: int = await Words().count("text")
    count = Words().blocking(3)  # type: ignore[arg-type]
    print(count, [item async for item in Words().items(3)])
    Words(1)  # type: ignore[call-arg]
    client.call(1)  # type: ignore[arg-type]
    client.call(Words.count)  # type: ignore[arg-type]
    client.stream(b"items")  # type: ignore[arg-type]
