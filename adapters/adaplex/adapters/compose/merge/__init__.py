"""Merging: makes one new stored adapter from several.

For weighted adapters in a single request see mix.py, which needs no merge.
"""

from adaplex.adapters.compose.merge.merge import merge_adapters, merge_checkpoints
from adaplex.adapters.compose.merge.plan import MAX_SOURCES, MergeMethod, MergePlan

__all__ = [
    "MAX_SOURCES",
    "MergeMethod",
    "MergePlan",
    "merge_adapters",
    "merge_checkpoints",
]
