"""The protocol of a connection, without I/O: bytes and frames in, decisions and frames out."""
