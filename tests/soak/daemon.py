"""The daemon of the soak: a reply has the tag of its request, and a text of the requested length made of that tag."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from harness_ipc import run_daemon


def text_of(tag: str, size: int) -> str:
    return (tag * (size // len(tag) + 1))[:size]


async def handle(message: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(message.get("seconds", 0))
    if message["text"] != text_of(message["tag"], len(message["text"])):
        return {"tag": "another's text"}
    return {"tag": message["tag"], "text": text_of(message["tag"], message["size"])}


if __name__ == "__main__":
    run_daemon(handle, sys.argv[1], handshake_timeout=2.0, grace_period=2.0)
