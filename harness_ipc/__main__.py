"""`python -m harness_ipc` is the command `harness-ipc`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
