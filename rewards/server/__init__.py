"""Rewards behind HTTP: the wire format, the client, the server."""
