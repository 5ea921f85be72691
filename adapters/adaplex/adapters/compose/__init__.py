"""Several adapters together: a weighted mix in one request, and merges into a new one."""
