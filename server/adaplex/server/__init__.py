"""The edge: gRPC and HTTP in front of the engine; settings, text, errors, metrics."""
