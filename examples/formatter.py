"""A warm formatter: `python formatter.py [--check] FILE.json ...`. Its daemon keeps slow imports loaded."""

import hashlib
import json
import signal
import sys
from pathlib import Path

from harness_ipc import Service, connect_daemon, current_request, method, run_daemon

VERSION = "1"
NAME = f"formatter-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"  # a daemon for each virtual environment


class Formatter(Service):
    @method
    def format(self, folder: Path, files: list[str], check: bool) -> dict[str, object]:
        """Format files, in a thread. Return the exit status, and what goes to stdout and stderr."""
        status, out, err = 0, "", ""
        for file in files:
            if current_request().cancelled:  # Ctrl-C
                break
            try:
                old = (folder / file).read_text(encoding="utf-8")
                if (new := json.dumps(json.loads(old), indent=4) + "\n") != old:
                    out += f"{'would reformat' if check else 'reformatted'} {file}\n"
                    status = max(status, int(check))
                    if not check:
                        (folder / file).write_text(new, encoding="utf-8")
            except (OSError, ValueError) as error:
                status, err = 2, f"{err}{file}: {error}\n"
        return {"status": status, "stdout": out, "stderr": err}


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    run_daemon(Formatter(), NAME, app_version=VERSION, idle_timeout=3600)
elif __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback: the end of this process cancels the work
    files, start = [each for each in sys.argv[1:] if each != "--check"], [sys.executable, __file__, "--serve"]
    with connect_daemon(NAME, start=start, version=VERSION, on_mismatch="restart", request_timeout=600) as daemon:
        done = daemon.call("format", folder=Path.cwd(), files=files, check="--check" in sys.argv)
    sys.stdout.write(done["stdout"])
    sys.stderr.write(done["stderr"])
    sys.exit(done["status"])
