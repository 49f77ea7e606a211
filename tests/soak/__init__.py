"""Mixed clients against one daemon, with faults: ``python -m tests.soak SECONDS``."""
