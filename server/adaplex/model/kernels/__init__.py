"""Kernels: `reference` is slow and right, and the measure of the others."""
