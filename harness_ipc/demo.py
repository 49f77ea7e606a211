"""The tour: a daemon, client processes, and two clients without the key.

It uses temporary directories, which it removes, and does not affect running daemons.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, answer_challenge
from typing import TYPE_CHECKING, Any

from . import client
from ._protocol import messages
from ._protocol.handshake import MAX_FRAME, role_key
from ._registry import records
from .errors import HarnessIPCError, StartFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NAME = "demo"
_PROCESSES = 4
_KEPT_REQUESTS = 500
_ONE_SHOT_REQUESTS = 250
# The timeout of each wait in seconds, far above the usual time.
_TIMEOUT = 60.0


async def handle(message: dict[str, Any]) -> dict[str, Any]:
    """Echo the message: the demo's application."""
    return {"result": message.get("params")}


def run(*, as_json: bool = False) -> int:
    """Run the tour and return the exit status: 0 if everything worked, else 1."""
    printer = _Printer(sys.stderr if as_json else sys.stdout)
    directory = tempfile.mkdtemp(prefix="harness-ipc-")
    saved = {key: os.environ.get(key) for key in ("HARNESS_IPC_RUNTIME_DIR", "HARNESS_IPC_LOG_DIR")}
    os.environ["HARNESS_IPC_RUNTIME_DIR"] = os.path.join(directory, "run")
    os.environ["HARNESS_IPC_LOG_DIR"] = os.path.join(directory, "log")
    try:
        with contextlib.ExitStack() as processes:
            report = _tour(processes, directory, printer)
    finally:
        for key, value in saved.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        shutil.rmtree(directory, ignore_errors=True)
    report["left_behind"] = [directory] if os.path.exists(directory) else []
    printer.line("left", ", ".join(report["left_behind"]) or "nothing: no process, no file")
    report["ok"] = (
        not report["left_behind"]
        and report["wrong_replies"] == 0
        and report["intruder"]["refused"]
        and report["silent"]["refused"]
        and report["exit_status"] == 0
    )
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _print_table(report)
    return 0 if report["ok"] else 1


def _tour(processes: contextlib.ExitStack, directory: str, printer: _Printer) -> dict[str, Any]:
    start = time.perf_counter()
    errors = processes.enter_context(open(os.path.join(directory, "stderr"), "w+b"))  # noqa: SIM115 - the stack closes it
    serve = ["-P", "-m", "harness_ipc", "serve", "harness_ipc.demo:handle", "--name", _NAME, "--json"]
    daemon = processes.enter_context(_spawned(serve, errors))
    lines = _lines(daemon)
    ready = next(lines, None)
    if ready is None:
        errors.seek(0)
        raise StartFailed("the demo's daemon did not start", log_tail=errors.read().decode("utf-8", "replace"))
    printer.line("daemon", f"pid {ready['pid']} ready in {(time.perf_counter() - start) * 1000:.0f} ms at {ready['address']}")

    silent = _ClientProcess(processes, "silent", errors)
    intruder = _ClientProcess(processes, "intruder", errors)
    honest = [_ClientProcess(processes, "client", errors) for _ in range(_PROCESSES)]
    total = _PROCESSES * (_KEPT_REQUESTS + _ONE_SHOT_REQUESTS)
    while any(process.thread.is_alive() for process in honest):
        printer.progress("clients", sum(process.done for process in honest), total)
        next(process for process in [*honest, silent] if process.thread.is_alive()).thread.join(0.1)
    results = [process.result() for process in honest]
    printer.line("clients", f"{total} requests from {_PROCESSES} processes answered, each with its own reply")

    refused = intruder.result()
    printer.line("intruder", f"with a wrong key: {refused['verdict']}")
    printer.progress("silent", 0, 1)
    dropped = silent.result()
    printer.line("silent", f"client without a proof: {dropped['verdict']}")

    start = time.perf_counter()
    pid = client.identify(_NAME)
    printer.line("daemon", f"pid {pid} still serves: answered in {(time.perf_counter() - start) * 1000:.1f} ms")
    client.request(_NAME, {"meta": messages.SHUTDOWN})
    daemon.wait(_TIMEOUT)
    return {
        "requests": total,
        "processes": _PROCESSES,
        "kept": _percentiles([latency for result in results for latency in result["kept"]]),
        "one_shot": _percentiles([latency for result in results for latency in result["one_shot"]]),
        "wrong_replies": sum(result["wrong"] for result in results),
        "transport": ready["family"],
        "authentication": "mutual challenge, HMAC-SHA256 under role keys",
        "intruder": refused,
        "silent": dropped,
        "exit_status": daemon.returncode,
    }


class _Printer:
    """Prints what happens. On a terminal, progress is updated in place."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pending = False

    def line(self, who: str, what: str) -> None:
        self._stream.write(f"{self._clear()}  {who:9} {what}\n")
        self._stream.flush()

    def progress(self, who: str, done: int, total: int) -> None:
        if self._stream.isatty():
            bar = "#" * (30 * done // total)
            self._stream.write(f"{self._clear()}  {who:9} [{bar:30}] {done}/{total}")
            self._stream.flush()
            self._pending = True
        elif done:
            self.line(who, f"{done}/{total}")

    def _clear(self) -> str:
        pending, self._pending = self._pending, False
        return "\r" + " " * 78 + "\r" if pending else ""


class _ClientProcess:
    """A process with one of the demo's clients, and the thread that reads its output. `kind`: client, intruder or silent."""

    def __init__(self, processes: contextlib.ExitStack, kind: str, errors: Any) -> None:
        self.kind = kind
        self.done = 0
        self._result: dict[str, Any] | None = None
        self._process = processes.enter_context(_spawned(["-P", "-m", "harness_ipc.demo", kind], errors))
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def result(self) -> dict[str, Any]:
        """Wait for the process and return its result."""
        self.thread.join(_TIMEOUT)
        if self._result is None:
            raise HarnessIPCError(f"the demo's {self.kind} process failed: its exit status is {self._process.poll()}")
        return self._result

    def _follow(self) -> None:
        for line in _lines(self._process):
            if "done" in line:
                self.done = line["done"]
            else:
                self._result = line


@contextlib.contextmanager
def _spawned(arguments: Sequence[str], errors: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    return map(json.loads, process.stdout)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{p}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1000, 3) for p in (50, 99)}


def _print_table(report: dict[str, Any]) -> None:
    print(f"\n  {'':16}{'requests':>9}{'processes':>11}{'p50':>11}{'p99':>11}")
    for label, key, each in (("kept connection", "kept", _KEPT_REQUESTS), ("one shot", "one_shot", _ONE_SHOT_REQUESTS)):
        p50, p99 = (f"{report[key][percentile]:.3f} ms" for percentile in ("p50_ms", "p99_ms"))
        print(f"  {label:16}{each * report['processes']:>9}{report['processes']:>11}{p50:>11}{p99:>11}")
    print(f"  transport       {report['transport']}")
    print(f"  authentication  {report['authentication']}")


# The clients: `python -m harness_ipc.demo KIND`.


def _run_client() -> dict[str, Any]:
    wrong = 0
    kept, one_shot = [], []
    with client.connect_daemon(_NAME) as daemon:
        for number in range(_KEPT_REQUESTS):
            start = time.perf_counter()
            wrong += daemon.call("echo", number=number, pid=os.getpid()) != {"number": number, "pid": os.getpid()}
            kept.append(time.perf_counter() - start)
            if number % 50 == 0:
                _print_json({"done": number})
    for number in range(_ONE_SHOT_REQUESTS):
        start = time.perf_counter()
        wrong += client.request(_NAME, {"method": "echo", "params": number}) != {"result": number}
        one_shot.append(time.perf_counter() - start)
        if number % 50 == 0:
            _print_json({"done": _KEPT_REQUESTS + number})
    return {"wrong": wrong, "kept": kept, "one_shot": one_shot}


def _run_intruder() -> dict[str, Any]:
    """Ignore the daemon's proof, and answer its challenge with another key."""
    record = records.load(_NAME)
    with Client(record.address) as connection:
        connection.send_bytes(b"#CHALLENGE#" + os.urandom(20))
        connection.recv_bytes(MAX_FRAME)
        connection.send_bytes(b"#WELCOME#")
        try:
            answer_challenge(connection, role_key(os.urandom(32), "client", record.address))
        except (AuthenticationError, EOFError, OSError) as error:
            return {"refused": True, "verdict": f"refused ({error or type(error).__name__})"}
        return {"refused": False, "verdict": "let in"}


def _run_silent() -> dict[str, Any]:
    start = time.monotonic()
    record = records.load(_NAME)
    with Client(record.address) as connection:
        try:
            if connection.poll(_TIMEOUT):
                connection.recv_bytes(MAX_FRAME)
        except EOFError:
            return {"refused": True, "verdict": f"dropped after {time.monotonic() - start:.1f} s"}
        return {"refused": False, "verdict": "was answered"}


def _print_json(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    _print_json({"client": _run_client, "intruder": _run_intruder, "silent": _run_silent}[sys.argv[1]]())
