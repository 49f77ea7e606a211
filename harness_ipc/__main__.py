"""Run the command `harness-ipc` by `python -m harness_ipc`."""

import contextlib
import os
import sys

from .cli import main

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `python -m` puts the current directory first; the command's later imports must not find modules there.
        with contextlib.suppress(OSError):
            if sys.path[0] in ("", os.getcwd()):
                del sys.path[0]
    sys.exit(main())
