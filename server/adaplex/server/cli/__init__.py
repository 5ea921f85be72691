"""Commands that need the server: serve, and what works on adapters without one."""
