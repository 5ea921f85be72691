"""Commands that need the server's packages: `serve`, and offline commands for adapters."""
