"""Mixed clients against one daemon for as long as one likes, with faults: ``python -m tests.soak SECONDS``."""
