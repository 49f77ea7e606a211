"""Benchmarks: `python -m tests.benchmarks`. They measure and print; no test asserts on what they find."""
