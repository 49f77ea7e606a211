"""The exceptions. Each also derives from a fitting built-in exception.

HarnessIPCError
├── InvalidName            ValueError              a name that is not 1 to 64 of A-Z a-z 0-9 _ -
├── UnsafeDirectory        PermissionError         a directory or file that others could read or replace
├── DaemonNotRunning       ConnectionRefusedError  no record, or a stale one
├── AlreadyRunning         RuntimeError            another process has this name
├── StartFailed            RuntimeError            a daemon could not start
├── IncompatibleDaemon     RuntimeError            a daemon of another version, or with a record of another schema
├── AuthenticationFailed   PermissionError         the peer has another key, or is another user
├── Busy                   RuntimeError            the daemon is full; the text names the limit
├── DaemonTimeout          TimeoutError            a timeout expired
├── ConnectionLost         ConnectionError         the peer closed the connection
├── ClientClosed           RuntimeError            this client was closed
├── ResourceExhausted      OSError                 this process is out of descriptors, memory or threads
├── MessageTooLarge        ValueError              a message above the limit of one of the two sides
├── ProtocolError          ValueError              an invalid message: not a JSON object, or an unexpected reply
└── RemoteError            RuntimeError            the handler in the daemon raised an error
    ├── MethodNotFound     LookupError             the service has no such method
    ├── InvalidParams      TypeError               the method does not accept these parameters
    └── ExpectedMore       TypeError               a stream was called without `stream`

All can be pickled and copied, with their attributes.
"""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# This process, or the system, is out of descriptors, memory or buffers.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class HarnessIPCError(Exception):
    """The root: `except HarnessIPCError` catches every error of this package.

    `maybe_executed` says whether the request may have run. It is True once the operating system has taken the last byte of the
    request, unless the daemon has said that it did not run. If it is False, the request can safely be sent again.
    """

    maybe_executed = False

    def __init__(self, message: str = "", *, maybe_executed: bool | None = None) -> None:
        super().__init__(message)
        # Only if it differs from the class: instance attributes are pickled and copied.
        if maybe_executed is not None:
            self.maybe_executed = maybe_executed


class InvalidName(HarnessIPCError, ValueError):
    """A daemon name that does not match ``[A-Za-z0-9_-]{1,64}``."""


class UnsafeDirectory(HarnessIPCError, PermissionError):
    """A directory or a file in it is not private to this user. `remedy` is a shell command that fixes it."""

    def __init__(self, message: str, *, path: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.remedy = remedy


class DaemonNotRunning(HarnessIPCError, ConnectionRefusedError):
    """The daemon is not running: there is no record, or only a stale one."""


class AlreadyRunning(HarnessIPCError, RuntimeError):
    """Another process holds the name. `pid` is its process id, or None if unknown."""

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StartFailed(HarnessIPCError, RuntimeError):
    """A daemon could not start. `log_tail` has the last lines of its log.

    `type` is the name of the exception or signal that ended the start, and `reason` its text; each is empty if unknown.
    """

    def __init__(self, message: str, *, log_tail: str = "", type: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail
        self.type = type
        self.reason = reason


class IncompatibleDaemon(HarnessIPCError, RuntimeError):
    """The daemon has another `app_version` than required, or its record has another schema.

    A daemon with a record of another schema can be pinged and stopped, but takes no other requests.
    """


class AuthenticationFailed(HarnessIPCError, PermissionError):
    """The peer failed to authenticate itself, rejected our proof, or belongs to another user."""


class Busy(HarnessIPCError, RuntimeError):
    """The daemon is full; the text names the limit. The request did not run: it may be sent again later."""


class DaemonTimeout(HarnessIPCError, TimeoutError):
    """A timeout expired. If `maybe_executed` is True, the request may have run, or may still be running."""


class ConnectionLost(HarnessIPCError, ConnectionError):
    """The peer closed the connection. If `maybe_executed` is True, the request may have run; it is not resent."""


class ClientClosed(HarnessIPCError, RuntimeError):
    """This client was closed, perhaps during the request: connect again."""


class ResourceExhausted(HarnessIPCError, OSError):
    """This process, not the daemon, is out of file descriptors, memory or threads."""


class MessageTooLarge(HarnessIPCError, ValueError):
    """A message above `limit` bytes. `size` is its length in bytes, or None if only the peer knows it."""

    def __init__(self, message: str, *, size: int | None = None, limit: int = 0, maybe_executed: bool | None = None) -> None:
        super().__init__(message, maybe_executed=maybe_executed)
        self.size = size
        self.limit = limit


class ProtocolError(HarnessIPCError, ValueError):
    """An invalid message: not UTF-8, not JSON (NaN is not), not an object, or not a reply that the protocol allows."""


class RemoteError(HarnessIPCError, RuntimeError):
    """The daemon answered with an error. Handlers raise it for errors that callers should expect.

    `message` is its text, `type` the name of the exception (by default of the class), and `data` any JSON, or None. The client
    raises an error with the same three. `str()` is "type: message".
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
    """The service has no method of that name; the text suggests similar ones. Nothing ran."""

    maybe_executed = False


class InvalidParams(RemoteError, TypeError):
    """The method does not accept these parameters; the text has its signature. It did not run."""

    maybe_executed = False


class ExpectedMore(RemoteError, TypeError):
    """The method answers with a stream and was called without `stream`. It did not run."""

    maybe_executed = False
