"""Namespaces: names, and the directories of an application's records and logs. Creates nothing."""

from __future__ import annotations

import os
import stat
import sys

from ..errors import InvalidName, StartFailed, UnsafeDirectory
from . import trust
from .files import check_private_dir, list_private_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_APP = "harness-ipc"
_RUNTIME_VARIABLE, _LOG_VARIABLE = "HARNESS_IPC_RUNTIME_DIR", "HARNESS_IPC_LOG_DIR"
_MAX_NAME = 64
_NAME_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"


def is_name(name: object) -> bool:
    """Return whether `name` may name a daemon or an application."""
    return isinstance(name, str) and 0 < len(name) <= _MAX_NAME and not name.strip(_NAME_CHARACTERS)


def check_name(name: str, what: str = "a daemon name") -> str:
    """Return `name` if it may name a daemon or an application, else raise `InvalidName`."""
    if not is_name(name):
        shown = ascii(name)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
        raise InvalidName(f"{shown} is not {what}: use 1 to {_MAX_NAME} of A-Z a-z 0-9 _ -")
    return name


class Namespace:
    """The directories of one application's daemons. Immutable and hashable; `runtime_dir` and `log_dir` are absolute paths.

    Every function that takes a daemon's name also takes a `namespace`; None means `Namespace()`. Applications with different
    namespaces never see each other's daemons. Arguments override ``HARNESS_IPC_RUNTIME_DIR`` and ``HARNESS_IPC_LOG_DIR``, which
    override the platform's directories. Arguments are used unchanged. Below the directories of the variables, and below the
    platform's runtime directory, each `app` except the default has its own subdirectory.

    Raises `InvalidName` if `app` is not 1 to 64 of ``A-Z a-z 0-9 _ -``, and `UnsafeDirectory` if a directory is relative and
    the current directory was removed. (`log_dir` raises it for a relative ``HARNESS_IPC_LOG_DIR``.)
    """

    __slots__ = ("_app", "_log_dir", "_runtime_dir")

    def __init__(
        self,
        app: str = DEFAULT_APP,
        *,
        runtime_dir: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._app = check_name(app, "an application's name")
        runtime_dir = self._below(runtime_root()[0]) if runtime_dir is None else os.fspath(runtime_dir)
        self._runtime_dir = _absolute(runtime_dir, _RUNTIME_VARIABLE)
        self._log_dir = None if log_dir is None else _absolute(os.fspath(log_dir), _LOG_VARIABLE)

    @property
    def app(self) -> str:
        return self._app

    @property
    def runtime_dir(self) -> str:
        """The directory of records, locks and sockets. It need not exist yet."""
        return self._runtime_dir

    @property
    def log_dir(self) -> str:
        """The directory of logs. It need not exist yet."""
        if self._log_dir is None:
            # Resolved on first access: a client needs no log.
            if override := os.environ.get(_LOG_VARIABLE):
                self._log_dir = _absolute(self._below(override), _LOG_VARIABLE)
            else:
                self._log_dir = _platform_log_dir(self._app) or os.path.join(self._runtime_dir, ".log")
        return self._log_dir

    def _below(self, directory: str) -> str:
        return directory if self._app == DEFAULT_APP else os.path.join(directory, self._app)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Namespace) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def __repr__(self) -> str:
        return f"Namespace({self._app!r}, runtime_dir={self._runtime_dir!r}, log_dir={self.log_dir!r})"

    def _value(self) -> tuple[str, str, str]:
        return self._app, self._runtime_dir, self.log_dir


def all_namespaces() -> list[Namespace]:
    """Return the default application's namespace and those of all others that have a runtime directory, by name.

    Raises `UnsafeDirectory`.
    """
    default = Namespace()
    apps = [
        name
        for name in list_private_dir(default.runtime_dir)
        if is_name(name) and stat.S_ISDIR(os.lstat(os.path.join(default.runtime_dir, name)).st_mode)
    ]
    return [default, *(Namespace(app) for app in sorted(apps) if app != DEFAULT_APP)]


def runtime_dir(*, namespace: Namespace | None = None) -> Path:
    """Return the directory of this user's records and sockets. It need not exist yet.

    Raises `UnsafeDirectory` if it exists and is not private to this user.
    """
    from pathlib import Path

    directory = (namespace or Namespace()).runtime_dir
    check_private_dir(directory)
    return Path(directory)


def runtime_path(name: str, ext: str, *, namespace: Namespace | None = None) -> Path:
    """Return the path of the file ``<name>.<ext>`` in `runtime_dir`. Raises `InvalidName` and `UnsafeDirectory`."""
    from pathlib import Path

    return Path(private_path(name, ext, namespace))


def log_path(name: str, *, namespace: Namespace | None = None) -> Path:
    """Return the path of the log of the daemon `name`. Raises `InvalidName` and, like `Namespace`, `UnsafeDirectory`."""
    from pathlib import Path

    return Path((namespace or Namespace()).log_dir, f"{check_name(name)}.log")


def private_path(name: str, ext: str, namespace: Namespace | None = None) -> str:
    """Return the path of `runtime_path` as a string, which is faster."""
    check_name(name)
    directory = (namespace or Namespace()).runtime_dir
    check_private_dir(directory)
    return f"{directory}{os.sep}{name}.{ext}"


def private_temporary_dir() -> str:
    """Return the fallback directory for a socket whose path is too long in the runtime directory. Raises `StartFailed`."""
    import tempfile

    try:
        user = os.environ.get("USERNAME", "user")
        if sys.platform != "win32":
            user = str(os.geteuid())
        return os.path.join(tempfile.gettempdir(), f"{DEFAULT_APP}-{user}")
    except FileNotFoundError as error:
        raise StartFailed("no temporary directory is writable: set TMPDIR to one that is") from error


def _absolute(path: str, variable: str) -> str:
    if os.path.isabs(path):
        return path
    try:
        # In the environment of a container or a systemd unit, no shell has expanded a "~".
        if not (found := os.path.abspath(os.path.expanduser(path))).startswith(os.path.abspath("~")):
            return found
        why = "HOME is not set"
    except FileNotFoundError:
        why = "the current directory was removed"
    text = f"{path} can't be resolved, since {why}: set {variable} to an absolute path"
    raise UnsafeDirectory(text, path=path, remedy=trust.relocation_remedy()) from None


def _platform_log_dir(app: str) -> str | None:
    """Return the platform's directory of logs, or None without a home directory."""
    # Not from passwd: another HOME means other logs. System users have "/" or "/nonexistent".
    home = os.environ.get("HOME", "")
    has_home = os.path.isabs(home) and home.strip("/") and os.path.isdir(home)
    if sys.platform != "win32" and not has_home and not os.path.isabs(os.environ.get("XDG_STATE_HOME", "")):
        return None
    import platformdirs

    try:
        path = platformdirs.user_log_dir(app, appauthor=False)
    except (RuntimeError, OSError):
        return None
    # An unexpanded "~" must not become a directory.
    return path if os.path.isabs(path) else None


def runtime_root() -> tuple[str, str]:
    """Return the runtime directory of the default application, and the reason for the choice as text.

    Raises `UnsafeDirectory`, which names the variable to set, if there is none.
    """
    if override := os.environ.get(_RUNTIME_VARIABLE):
        return override, f"{_RUNTIME_VARIABLE} is set"
    if sys.platform == "win32":
        # Not in AppData: Python from the Store sees a private copy of it, and other programs would not find its daemons.
        profile = os.path.expanduser("~")
        if not os.path.isabs(profile):
            text = f"there is no home directory for the records: set USERPROFILE or {_RUNTIME_VARIABLE}"
            raise UnsafeDirectory(text, path=profile, remedy=trust.relocation_remedy())
        import ctypes

        # Files of an elevated process belong to the administrators: the user's other processes can't read them.
        if ctypes.windll.shell32.IsUserAnAdmin():
            return os.path.join(profile, ".harness-ipc", "run-elevated"), "the directory of elevated processes"
        return os.path.join(profile, ".harness-ipc", "run"), "in your profile"
    # XDG_RUNTIME_DIR, TMPDIR and HOME of one user differ between login, cron, ssh, sudo and sandboxes, and two directories
    # would mean two daemons. So the choice depends on which directories exist. A directory stays in use once it exists: a later
    # login, which creates /run/user/<uid>, must not hide the running daemons.
    uid = os.geteuid()
    temporary = f"/tmp/{DEFAULT_APP}-runtime-{uid}"  # noqa: S108 - its owner is checked at each use
    if (squatter := _owner(temporary)) == uid:
        return temporary, "it exists already, from before this user's login directory did"
    home = trust.home()
    if home is not None and sys.platform == "darwin":
        return f"{home}/Library/Caches/TemporaryItems/{DEFAULT_APP}", "the platform's directory for the user"
    fallback = None if home is None else f"{home}/.local/state/{DEFAULT_APP}/run"
    if fallback is not None and _owner(fallback) == uid:
        return fallback, f"it exists already, from when another user had {temporary}"
    login = f"/run/user/{uid}"
    if _owner(login) == uid:
        return f"{login}/{DEFAULT_APP}", "the user's login directory exists"
    if fallback is not None and squatter is not None:
        return fallback, f"another user has {temporary}"
    return temporary, f"{login} does not exist"


def _owner(path: str) -> int | None:
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None
