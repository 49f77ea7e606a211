"""Where an application's daemons are: names, and the directories of records and logs. It looks, and creates nothing."""

from __future__ import annotations

import os

from .. import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_APP = "harness-ipc"


class Namespace:
    """The directories of one application's daemons: a value, whose `runtime_dir` and `log_dir` are absolute paths.

    Every function that takes a daemon's name takes one as `namespace`; None is `Namespace()`. Two applications with different
    namespaces never meet each other's daemons. An argument wins over ``HARNESS_IPC_RUNTIME_DIR`` and ``HARNESS_IPC_LOG_DIR``,
    which win over the platform's directories. An argument is used as it is; below the variables' directories, and below the
    platform's runtime directory, each `app` but the default one has a directory of its own.

    Raises `InvalidName` if `app` is not 1 to 64 of ``A-Z a-z 0-9 _ -``.
    """

    __slots__ = ("_app", "_log_dir", "_runtime_dir")

    def __init__(
        self,
        app: str = DEFAULT_APP,
        *,
        runtime_dir: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._app = paths.check_name(app, "an application's name")
        if runtime_dir is None:
            runtime_dir = self._below(paths.runtime_location()[0])
        if log_dir is None and (override := os.environ.get("HARNESS_IPC_LOG_DIR")):
            log_dir = self._below(override)
        self._runtime_dir = _absolute(os.fspath(runtime_dir))
        self._log_dir = None if log_dir is None else _absolute(os.fspath(log_dir))

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
            # Only when it is asked for: a client needs no log.
            import platformdirs

            self._log_dir = os.path.abspath(platformdirs.user_log_dir(self._app, appauthor=False))
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
    apps = set()
    if paths.check_private_dir(default.runtime_dir):
        for entry in os.scandir(default.runtime_dir):
            if entry.is_dir(follow_symlinks=False) and paths.is_name(entry.name):
                apps.add(entry.name)
    return [default, *map(Namespace, sorted(apps - {DEFAULT_APP}))]


def runtime_dir(*, namespace: Namespace | None = None) -> Path:
    """Return the directory of the endpoint records and sockets of this user. It need not exist yet.

    Raises `UnsafeDirectory` if it exists and is not private to this user.
    """
    from pathlib import Path

    directory = (namespace or Namespace()).runtime_dir
    paths.check_private_dir(directory)
    return Path(directory)


def runtime_path(name: str, ext: str, *, namespace: Namespace | None = None) -> Path:
    """Return the path of the file ``<name>.<ext>`` in `runtime_dir`. Raises `InvalidName` and `UnsafeDirectory`."""
    paths.check_name(name)
    return runtime_dir(namespace=namespace) / f"{name}.{ext}"


def log_path(name: str, *, namespace: Namespace | None = None) -> Path:
    """Return the path of the log of the daemon `name`. Raises `InvalidName`."""
    from pathlib import Path

    return Path((namespace or Namespace()).log_dir, f"{paths.check_name(name)}.log")


def private_path(name: str, ext: str, namespace: Namespace | None = None) -> str:
    """Return what `runtime_path` does, as a string, which costs less."""
    paths.check_name(name)
    directory = (namespace or Namespace()).runtime_dir
    paths.check_private_dir(directory)
    return f"{directory}{os.sep}{name}.{ext}"


def _absolute(path: str) -> str:
    return path if os.path.isabs(path) else os.path.abspath(path)
