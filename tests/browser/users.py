"""Other users of this machine. It requires root.

Run as a program with the words ``HOME PORT``, it looks for a browser there as the user `VICTIM`, with the helpers' code and the
doctor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import encodings.ascii
import encodings.idna  # noqa: F401 - before this process may have no access to them
import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.browser.squatter import become
from tests.support.processes import PATIENCE

VICTIM, SQUATTER = 54321, 54322


class Squat:
    """A port at which another user listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.port = int(process.stdout.readline())

    def received(self) -> list[str]:
        """End the squatter, and return the data of each connection once all are closed."""
        return [str(text) for text in json.loads(self._process.communicate(timeout=PATIENCE)[0])]


@contextlib.contextmanager
def squatting(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    uid: int = SQUATTER,
    target: int = 0,
    accepts: bool = True,
    ipv6_only: bool = False,
    backlog: int = 16,
) -> Iterator[Squat]:
    """Have the user `uid` listen at `host`. Without `accepts`, it accepts connections only in `received`."""
    words = [str(word) for word in (uid, host, port, target, int(accepts), int(ipv6_only), backlog)]
    with _running("squatter", *words) as process:
        yield Squat(process)


def find_as_victim(home: Path, port: int) -> dict[str, Any]:
    """Return the result for the user `VICTIM`: `how` or `error`, the `log`, and the doctor's `findings`."""
    os.chown(home, VICTIM, VICTIM)
    with _running("users", str(home), str(port)) as process:
        return dict(json.loads(process.communicate(timeout=PATIENCE)[0]))


@contextlib.contextmanager
def _running(module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", "-m", f"tests.browser.{module}", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            yield process
        finally:
            process.kill()


def find(home: str, port: str) -> None:
    # Import before the switch: that user may have no access to the interpreter's library.
    for module in ("harness_ipc.manager", "harness_ipc.browser.doctor", "pwd"):
        importlib.import_module(module)
    from harness_ipc.browser import discovery, doctor

    # It would read the library as well.
    importlib.metadata.version = lambda distribution_name: distribution_name
    become(VICTIM)
    os.environ |= {"HOME": home, "HARNESS_CHROME": "/nonexistent"}
    for variable in ("HARNESS_IPC_RUNTIME_DIR", "HARNESS_IPC_LOG_DIR", "XDG_DATA_HOME"):
        os.environ[variable] = os.path.join(home, variable)
    for variable in ("HARNESS_CHROME_OWN", "HARNESS_CHROME_PROFILE"):
        os.environ.pop(variable, None)
    discovery.PORTS = (int(port),)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("harness_ipc").addHandler(handler)
    logging.getLogger("harness_ipc").setLevel(logging.INFO)

    async def use() -> str:
        source, connection = await discovery.find("browser", lambda *_: None)
        assert "product" in await connection.call("Browser.getVersion")
        await connection.close()
        return source.how

    result: dict[str, Any] = {"how": None, "error": None}
    try:
        result["how"] = asyncio.run(use())
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    findings = [f"{finding.level}: {finding.text}" for finding in doctor.examine("browser") if finding.topic == "browser"]
    print(json.dumps(result | {"log": log, "findings": findings}), flush=True)


if __name__ == "__main__":
    find(*sys.argv[1:])
