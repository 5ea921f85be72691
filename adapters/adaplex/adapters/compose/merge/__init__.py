"""Merging: makes one stored adapter out of several, for good.

A weighted combination per request needs none of this: see combination.py.
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
