"""Programs: adapters lowered to primitives for each module of the base."""
