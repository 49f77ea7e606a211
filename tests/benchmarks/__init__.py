"""Benchmarks: `python -m tests.benchmarks`. No test asserts on their results."""
