"""The sans-I/O protocol of a connection: bytes in, events and bytes out."""
