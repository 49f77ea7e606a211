"""The suites on Windows CPython, under Wine: ``python -m tests.windows``."""
