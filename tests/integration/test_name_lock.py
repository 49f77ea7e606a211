"""Two processes never have one name at once, although the cleaners of old files remove the lock file at any time."""

from __future__ import annotations

from harness_ipc import runtime_dir
from tests.support.marks import needs_posix
from tests.support.processes import run_python

SECONDS = 1.5
# Three processes acquire a name in turn, and every fifth time end as if killed, while the lock file is removed at random.
SWEPT = """
import os, random, sys, time
from harness_ipc import AlreadyRunning
from harness_ipc._registry import lifetime
path, over = sys.argv[1], time.monotonic() + float(sys.argv[2])

def note(kind):
    os.write(1, f"{time.monotonic()} {kind} {os.getpid()}\\n".encode())

def hold():
    while time.monotonic() < over:
        try:
            held = lifetime.Registration("d", generation=os.urandom(16).hex(), address="none", family="none")
        except AlreadyRunning:
            time.sleep(random.random() * 0.01)
            continue
        note("begin")
        held.publish(app_version=None, max_message=1)
        end, kept = time.monotonic() + random.random() * 0.04, True
        while time.monotonic() < end and kept:
            time.sleep(0.005)
            kept = held.look()
        note("end" if kept else "lost")
        if random.random() < 0.2:
            os._exit(0)
        held.release()

children = set()
while time.monotonic() < over:
    while len(children) < 3:
        if (pid := os.fork()) == 0:
            random.seed()
            try:
                hold()
            except BaseException as error:
                note(repr(error).replace(" ", "_"))
            os._exit(0)
        children.add(pid)
    time.sleep(random.random() * 0.01)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    children.discard(os.waitpid(-1, os.WNOHANG)[0])
for pid in children:
    os.waitpid(pid, 0)
"""


@needs_posix
def test_removing_the_lock_does_not_allow_two_daemons() -> None:
    runtime_dir().mkdir(mode=0o700)
    done = run_python("-W", "ignore", "-c", SWEPT, str(runtime_dir() / "d.lock"), str(SECONDS))
    assert (done.returncode, done.stderr) == (0, "")
    events = sorted(line.split() for line in done.stdout.splitlines())
    assert events
    assert [kind for _, kind, _ in events] == ["begin", "end"] * (len(events) // 2)
    assert all(first[2] == last[2] for first, last in zip(events[::2], events[1::2], strict=True))
