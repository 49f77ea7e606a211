"""Checks of a release: see `tests.release.__main__`."""
