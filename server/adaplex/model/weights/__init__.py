"""Weights as kernels read them, of the base and of adapters: data and arithmetic only."""
