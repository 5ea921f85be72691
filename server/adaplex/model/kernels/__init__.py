"""Kernels: `reference` is slow and right; faster ones are tested against it."""
