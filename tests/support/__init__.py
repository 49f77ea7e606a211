"""Helpers of the suites: marks, processes, daemons, peers on the wire."""
