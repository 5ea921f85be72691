"""AdapterHub: the formats of its library `adapters` 1.3, one file for each method."""

from adaplex.adapters.formats.adapterhub.adapterhub import AdapterHub

__all__ = ["AdapterHub"]
