"""Fuzzing of functions that process bytes from outside, with a corpus."""
