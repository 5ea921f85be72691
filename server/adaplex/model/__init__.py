"""The model: everything with tensors, behind the engine's Runner protocol."""

from adaplex.model.onednn_limit import keep_rows_invariant

keep_rows_invariant()
