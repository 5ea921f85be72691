"""The model: everything with tensors, behind the engine's Runner protocol."""
