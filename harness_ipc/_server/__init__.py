"""The server: admission of clients, requests, and I/O of the connections."""
