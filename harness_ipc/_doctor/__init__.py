"""Checks of `harness_ipc.doctor`."""
