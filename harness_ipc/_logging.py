"""The bounded log of a daemon. It includes standard output and error of a daemon that was started in the background.

Prints, native code and child processes append to the same file through other descriptors. So the file is never renamed: when
it is too long, it is copied to its predecessor and truncated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from ._registry import files
from ._text import escape_control
from .errors import HarnessIPCError

if TYPE_CHECKING:
    from collections.abc import Iterator

# The limit of the log, and of its one predecessor, in bytes.
LOG_BYTES = 5 * 1024 * 1024
# Seconds between checks of the size of a log that other writers append to.
_CHECK_INTERVAL = 0.25
_COPY_BYTES = 256 * 1024


class EntryFormatter(logging.Formatter):
    """Formats entries without control characters, and indents all lines but the first."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted entry."""
        lines = super().format(record).split("\n")
        return "\n    ".join(escape_control(line, allow="\t") for line in lines)


class BoundedLog(logging.Handler):
    """Appends entries to a private file, and keeps the file below `LOG_BYTES` even if others append to it.

    A failed write raises nothing: it is reported once on standard error. `error` is the error of the last write, or None.
    """

    def __init__(self, path: str) -> None:
        """Open the file. Raises `StartFailed` and `UnsafeDirectory`."""
        self._end = io.FileIO(files.open_private_log(path), "w")
        try:
            self._whole = io.FileIO(os.open(path, os.O_RDWR | files.NOFOLLOW_FLAGS), "r+")
        except OSError as error:
            self._end.close()
            raise files.log_failure(path, "opened", error) from error
        # After the files are open: logging closes each initialized handler at exit.
        super().__init__()
        self.setFormatter(EntryFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.error: OSError | None = None
        self._path = path
        self._pid = os.getpid()
        # Whether the current failure was reported.
        self._reported = True

    def check_writable(self) -> None:
        """Raise `StartFailed` if the last write failed. From now on, failures are reported on standard error."""
        if self.error is not None:
            raise files.log_failure(self._path, "written", self.error) from self.error
        self._reported = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append an entry."""
        try:
            entry = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
            self.limit_size(len(entry))
            while entry:
                entry = entry[self._end.write(entry) :]
            self.error = None
        except OSError as error:
            self.error = error
            if not self._reported:
                self._reported = True
                with contextlib.suppress(OSError):
                    print(files.log_failure(self._path, "written", error), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def receives_prints(self) -> bool:
        """Return whether standard output or error is redirected to the file."""
        return self.receives(1) or self.receives(2)

    def limit_size(self, added: int = 0) -> None:
        """Move the content to the predecessor if `added` more bytes would exceed the limit. Does nothing in a forked child.

        Called for each request: it takes a microsecond if there is nothing to do.
        """
        try:
            if os.fstat(self._end.fileno()).st_size + added <= LOG_BYTES or self._pid != os.getpid():
                return
            assert self.lock is not None
            with self.lock:
                # Another thread may have moved it.
                if (size := os.fstat(self._end.fileno()).st_size) and size + added > LOG_BYTES:
                    # Without room for a copy, the content is dropped.
                    with contextlib.suppress(OSError, HarnessIPCError):
                        self._copy(max(0, size - LOG_BYTES))
                    self._whole.truncate(0)
        except (OSError, ValueError):
            pass  # the program has closed it

    def _copy(self, start: int) -> None:
        predecessor = f"{self._path}.1"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(predecessor)
        with io.FileIO(files.open_private_log(predecessor), "w") as copy:
            self._whole.seek(start)
            left = LOG_BYTES
            while left and (data := self._whole.read(min(left, _COPY_BYTES))):
                left -= len(data)
                copy.write(data)

    def receives(self, descriptor: int) -> bool:
        """Return whether the output to `descriptor` goes to the file."""
        try:
            return os.path.sameopenfile(descriptor, self._end.fileno())
        except OSError:
            return False

    def watch(self, stop: threading.Event) -> None:
        """Limit the size until `stop` is set."""
        while not stop.wait(_CHECK_INTERVAL):
            self.limit_size()

    def close(self) -> None:
        """Close the file. Idempotent."""
        super().close()
        with contextlib.suppress(OSError):
            self._whole.close()
            self._end.close()


class _StandardStream(io.FileIO):
    """Standard output or error that ignores `OSError`: a closed terminal, a broken pipe, a full disk."""

    def write(self, data: Any, /) -> int:
        """Write `data` if possible."""
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


@contextlib.contextmanager
def _lossy_streams(log: BoundedLog) -> Iterator[None]:
    """Keep prints from raising `OSError`. Those that go to the log are in UTF-8 and line-buffered."""
    streams: Any = ((contextlib.redirect_stdout, sys.stdout, 1), (contextlib.redirect_stderr, sys.stderr, 2))
    with contextlib.ExitStack() as stack:
        for redirect, stream, number in streams:
            buffer = getattr(stream, "buffer", None)
            raw = getattr(buffer, "raw", buffer)
            # Not a replacement by a test or a notebook, nor the Windows console.
            if isinstance(raw, io.FileIO) and not raw.closed and raw.fileno() == number:
                with contextlib.suppress(OSError):
                    stream.flush()
                if log.receives(number):
                    stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
                writer = io.BufferedWriter(_StandardStream(number, "w", closefd=False))
                new = io.TextIOWrapper(writer, stream.encoding, stream.errors, line_buffering=True)
                stack.enter_context(redirect(new))
                stack.callback(new.flush)
        yield


def _suppress_traceback(error: BaseException) -> None:
    """Keep the interpreter from printing `error` to the log a second time if it is uncaught."""
    hook = sys.excepthook
    sys.excepthook = lambda kind, uncaught, trace: None if uncaught is error else hook(kind, uncaught, trace)


@contextlib.contextmanager
def logging_to(name: str, path: str) -> Iterator[BoundedLog]:
    """Send the root logger, warnings and uncaught exceptions to the log `path` of the daemon `name`.

    Raises `StartFailed` and `UnsafeDirectory`.
    """
    log = BoundedLog(path)
    stop = threading.Event()
    root = logging.getLogger()
    level = root.level
    root.addHandler(log)
    root.setLevel(min(level, logging.INFO))
    logging.captureWarnings(True)
    try:
        with _lossy_streams(log):
            if log.receives_prints():
                with contextlib.suppress(RuntimeError):  # no thread can be started
                    threading.Thread(target=log.watch, args=(stop,), name="harness-ipc-log", daemon=True).start()
            yield log
    except BaseException as error:
        logger = logging.getLogger(__name__)
        if isinstance(error, HarnessIPCError):
            logger.error("%s failed: %s", name, error, exc_info=error.__cause__)
        else:
            logger.critical("%s crashed", name, exc_info=True)
        if log.receives(2):
            _suppress_traceback(error)
        raise
    finally:
        stop.set()
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(log)
        log.close()


def wants_console(log: BoundedLog) -> bool:
    """Return whether standard error is a terminal and the program has no log handler besides `log`."""
    return sys.stderr is not None and sys.stderr.isatty() and logging.getLogger().handlers == [log]


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Log to standard error too."""
    console = logging.StreamHandler()
    console.setFormatter(EntryFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(console)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(console)
