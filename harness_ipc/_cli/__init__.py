"""Commands of `harness-ipc`, and their output."""
