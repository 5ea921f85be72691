"""AdapterRegistry and what it is made of: names, intake, and lowered programs."""
