"""The process between a starter and its daemon: resets inherited settings, and passes the daemon's exit status on.

Run by path, ``python -I -S _launcher.py FD PROGRAM [ARGUMENT ...]``, as the leader of a new session; FD is the ready pipe. It
imports nothing of the package, to start in a few milliseconds. It exits at EOF on standard input: the starter has released it.
The daemon is not the session leader, so it can't acquire a controlling terminal.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any

if sys.platform != "win32":
    import _thread
    import os

    if not TYPE_CHECKING:
        import _signal as signal  # without the enums of `signal`, which take longer to create than all the rest

    def main(pipe: int, argv: list[str]) -> None:
        """Run `argv`, and end with its exit status or signal, or when the starter releases this process."""
        # Signals stay pending until there is a child to forward them to.
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        clean_slate()
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.execvp(argv[0], argv)  # noqa: S606
            except OSError as error:
                os.write(pipe, b'{"state": "refused", "errno": %d}\n' % (error.errno or 0))
            finally:
                os._exit(127)
        # The pipe is at EOF when the program closes its copies.
        os.close(pipe)
        os.chdir("/")
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        # The thread inherits the mask, so signals interrupt the wait below.
        _thread.start_new_thread(wait_for_starter, ())
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            end_by_signal(os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status))

    def clean_slate() -> None:
        """Reset inherited settings that the starter may have changed: signal dispositions, umask and nice level."""
        for number in signal.valid_signals():
            attempt(signal.signal, number, signal.SIG_DFL)
        os.umask(os.umask(0o077) | 0o022)
        attempt(os.setpriority, os.PRIO_PROCESS, 0, 0)

    def attempt(function: "Callable[..., Any]", *arguments: object) -> None:
        """Call `function`, and ignore an error."""
        try:  # noqa: SIM105 - without the import of contextlib
            function(*arguments)
        except (OSError, ValueError):
            pass

    def wait_for_starter() -> None:
        """End this process when the starter closes its end of the pipe."""
        os.read(0, 1)
        os._exit(0)

    def end_by_signal(number: int) -> None:
        """End this process by the signal that ended the program."""
        import resource

        # Dump no core: the program has dumped its own.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        attempt(signal.signal, number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if __name__ == "__main__":
        main(int(sys.argv[1]), sys.argv[2:])
