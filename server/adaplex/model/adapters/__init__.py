"""Adapters in memory: packing, the arena, folding, prefixes, and what they do to rows."""
