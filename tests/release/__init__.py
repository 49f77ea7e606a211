"""What a release must be: see `tests.release.__main__`."""
