"""Adapter formats: one file for each family, one entry in FORMATS."""

from adaplex.adapters.formats.families import FORMATS, NEEDS, identity, kind_of, lower

__all__ = ["FORMATS", "NEEDS", "identity", "kind_of", "lower"]
