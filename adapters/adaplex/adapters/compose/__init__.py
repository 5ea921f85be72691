"""Composition of adapters: a weighted mix in one request, and merges into a new adapter."""
