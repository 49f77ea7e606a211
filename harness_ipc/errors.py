"""The errors: one root, and each leaf is also the builtin that a caller would already catch.

HarnessIPCError
├── InvalidName            ValueError              a daemon name that no path may be built from
├── UnsafeDirectory        PermissionError         a directory or file that others could read, replace or plant
├── DaemonNotRunning       ConnectionRefusedError  no record, or nobody behind it
├── AlreadyRunning         RuntimeError            another process holds this name's lifetime lock
├── StartFailed            RuntimeError            a daemon could not start
├── IncompatibleDaemon     RuntimeError            a record of a schema that this version does not know
├── AuthenticationFailed   PermissionError         the peer has another key, or is another user
├── Busy                   RuntimeError            the daemon takes no request now: it is full, or stopping
├── DaemonTimeout          TimeoutError            the deadline of a call passed
├── ConnectionLost         ConnectionError         the peer went away in the middle
├── MessageTooLarge        ValueError              a message above the limit of one of the two sides
├── ProtocolError          ValueError              something that is not a message: not JSON, not an object
└── RemoteError            RuntimeError            the daemon's own handler answered with an error

All of them survive pickling with their attributes.
"""


class HarnessIPCError(Exception):
    """The root: `except HarnessIPCError` catches whatever this package raises."""


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
    """A daemon could not start. `log_tail` has the last lines of its log, where there are any."""

    def __init__(self, message: str, *, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class IncompatibleDaemon(HarnessIPCError, RuntimeError):
    """The record was written by a version of this package that this one does not understand."""


class AuthenticationFailed(HarnessIPCError, PermissionError):
    """The peer could not prove that it has the key, refused our proof, or belongs to another user."""


class Busy(HarnessIPCError, RuntimeError):
    """The daemon already has its maximum of connections. The request did not run: it may be repeated."""


class DaemonTimeout(HarnessIPCError, TimeoutError):
    """The deadline passed. If a request had been sent, it may have run, or may still be running."""


class ConnectionLost(HarnessIPCError, ConnectionError):
    """The peer went away. If a request had been sent, it may have run: nothing is retried silently."""


class MessageTooLarge(HarnessIPCError, ValueError):
    """A message above `limit` bytes. `size` is its length in bytes, or None where only the peer knows it."""

    def __init__(self, message: str, *, size: int | None = None, limit: int = 0) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class ProtocolError(HarnessIPCError, ValueError):
    """Something that can't be a message: not UTF-8, not JSON (NaN is not), or not an object."""


class RemoteError(HarnessIPCError, RuntimeError):
    """The daemon answered with an error. `type` is the name of the exception there."""

    def __init__(self, message: str, *, type: str = "") -> None:
        super().__init__(message)
        self.type = type
