"""Reads, checks, lowers, names and stores adapters.

Its surface for other packages is `api`, and `errors`. Imports neither grpc nor the engine.
"""
