"""The registry of adapters: names, intake, imports, and lowered programs."""
