"""The servers that the benchmarks measure: `python -m tests.benchmarks.servers KIND ADDRESS` prints "ready" and serves."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from harness_ipc import run_daemon

LINE_SERVER = "line"
OWN_SERVER = "own"


async def _handle(message: dict[str, Any]) -> dict[str, Any]:
    return {"pong": True}


async def _serve_lines(path: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:
            writer.write(json.dumps(await _handle(json.loads(line))).encode() + b"\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path, backlog=128)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    kind, address = sys.argv[1:]
    if kind == LINE_SERVER:
        asyncio.run(_serve_lines(address))
    else:
        run_daemon(_handle, address, on_ready=lambda _: print("ready", flush=True))
