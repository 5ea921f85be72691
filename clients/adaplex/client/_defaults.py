"""Defaults of a connection, which help of the command line shows without importing grpc."""

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 600.0
"""Seconds of a call."""
