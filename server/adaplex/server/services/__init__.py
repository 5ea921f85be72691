"""The RPC handlers, a file for each gRPC service."""
