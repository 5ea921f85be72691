"""Adapter formats: each reads the checkpoints of one family and lowers them to primitives."""

from adaplex.adapters.formats.families import FORMATS, NEEDS, identity, kind_of, lower

__all__ = ["FORMATS", "NEEDS", "identity", "kind_of", "lower"]
