"""What the suites share: marks of needs, processes, daemons, peers on the wire."""
