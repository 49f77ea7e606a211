"""The errors: one root, and each leaf is also the builtin that a caller would already catch.

HarnessIPCError
├── InvalidName            ValueError              a daemon name that no path may be built from
├── UnsafeDirectory        PermissionError         a directory or file that others could read, replace or plant
├── DaemonNotRunning       ConnectionRefusedError  no record, or nobody behind it
├── AlreadyRunning         RuntimeError            another process has this name
├── StartFailed            RuntimeError            a daemon could not start
├── IncompatibleDaemon     RuntimeError            a daemon whose record has another schema
├── AuthenticationFailed   PermissionError         the peer has another key, or is another user
├── Busy                   RuntimeError            the daemon is full; the text names the limit
├── DaemonTimeout          TimeoutError            the deadline of a call passed
├── ConnectionLost         ConnectionError         the peer went away in the middle
├── ClientClosed           RuntimeError            this client was closed
├── ResourceExhausted      OSError                 this process is out of descriptors, memory or threads
├── MessageTooLarge        ValueError              a message above the limit of one of the two sides
├── ProtocolError          ValueError              something that is not a message: not JSON, not an object
└── RemoteError            RuntimeError            the daemon's own handler answered with an error
    ├── MethodNotFound     LookupError             the service has no such method
    ├── InvalidParams      TypeError               parameters that the method does not take
    └── ExpectedMore       TypeError               a stream that was called as if it had one reply

All of them survive pickling and copying with their attributes.
"""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What this process, or the whole system, has run out of: descriptors, memory, buffers.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class HarnessIPCError(Exception):
    """The root: `except HarnessIPCError` catches every error of this package.

    `maybe_executed` says whether the request may have run. It is True once the operating system has taken the last byte of the
    request, unless the daemon has said that it did not run. If it is False, the request can safely be sent again.
    """

    maybe_executed = False

    def __init__(self, message: str = "", *, maybe_executed: bool | None = None) -> None:
        super().__init__(message)
        # Only where it differs from the class: an attribute of the instance is pickled and copied.
        if maybe_executed is not None:
            self.maybe_executed = maybe_executed


class InvalidName(HarnessIPCError, ValueError):
    """A daemon name that does not match ``[A-Za-z0-9_-]{1,64}``."""


class UnsafeDirectory(HarnessIPCError, PermissionError):
    """A directory or a file in it is not private to this user. `remedy` is the command that mends it."""

    def __init__(self, message: str, *, path: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.remedy = remedy


class DaemonNotRunning(HarnessIPCError, ConnectionRefusedError):
    """Nobody answers for this name: no record, or the leavings of a daemon that died."""


class AlreadyRunning(HarnessIPCError, RuntimeError):
    """Another process is this daemon. `pid` is its process id, or None while it has not published one."""

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StartFailed(HarnessIPCError, RuntimeError):
    """A daemon could not start. `log_tail` has the last lines of its log.

    `type` is the name of the exception, or of the signal, that ended the start, `reason` its text. What is not known is an
    empty string.
    """

    def __init__(self, message: str, *, log_tail: str = "", type: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail
        self.type = type
        self.reason = reason


class IncompatibleDaemon(HarnessIPCError, RuntimeError):
    """The daemon is of a version with another record: it can be pinged and stopped, and takes no request from this version."""


class AuthenticationFailed(HarnessIPCError, PermissionError):
    """The peer could not prove that it has the key, refused our proof, or belongs to another user."""


class Busy(HarnessIPCError, RuntimeError):
    """The daemon is full; the text names the limit. The request did not run: it may be sent again later."""


class DaemonTimeout(HarnessIPCError, TimeoutError):
    """The deadline passed. If `maybe_executed` is True, the request may have run, or may still be running."""


class ConnectionLost(HarnessIPCError, ConnectionError):
    """The peer went away. If `maybe_executed` is True, the request may have run: nothing is repeated silently."""


class ClientClosed(HarnessIPCError, RuntimeError):
    """This client was closed, perhaps during the request: connect again."""


class ResourceExhausted(HarnessIPCError, OSError):
    """This process, not the daemon, is out of file descriptors, memory or threads."""


class MessageTooLarge(HarnessIPCError, ValueError):
    """A message above `limit` bytes. `size` is its length in bytes, or None where only the peer knows it."""

    def __init__(self, message: str, *, size: int | None = None, limit: int = 0, maybe_executed: bool | None = None) -> None:
        super().__init__(message, maybe_executed=maybe_executed)
        self.size = size
        self.limit = limit


class ProtocolError(HarnessIPCError, ValueError):
    """Something that can't be a message: not UTF-8, not JSON (NaN is not), or not an object."""


class RemoteError(HarnessIPCError, RuntimeError):
    """The daemon answered with an error. A handler raises one for an error that its caller should expect.

    `message` is its text, `type` the name of the exception in the daemon (by default that of the class), and `data` any JSON
    that goes with it, or None. The error that the client raises has the same three. `str()` is "type: message".
    """

    maybe_executed = True

    def __init__(self, message: str = "", *, type: str = "", data: Any = None, maybe_executed: bool | None = None) -> None:
        super().__init__(message, maybe_executed=maybe_executed)
        self.message = message
        self.type = type or self.__class__.__name__
        self.data = data

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class MethodNotFound(RemoteError, LookupError):
    """The service has no method of that name; the text names similar ones. Nothing ran."""

    maybe_executed = False


class InvalidParams(RemoteError, TypeError):
    """The method does not take these parameters; the text has its signature. It did not run."""

    maybe_executed = False


class ExpectedMore(RemoteError, TypeError):
    """The method answers with a stream and was called without `stream`. It did not run."""

    maybe_executed = False
