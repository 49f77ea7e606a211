"""The commands of `harness-ipc` that have a module of their own, and what they print with."""
