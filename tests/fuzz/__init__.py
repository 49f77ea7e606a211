"""Fuzzing: the functions that meet bytes from outside, and a corpus of bytes that were interesting."""
