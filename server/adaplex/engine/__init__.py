"""The engine: policy in plain Python. What runs, when, with which memory; no tensors, no wire."""
