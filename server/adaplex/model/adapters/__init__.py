"""Adapters in memory: packing, the arena, folded weights, prefixes, and the torch path."""
