"""AdapterHub: adapters as its library `adapters` 1.3 writes them; one file a method."""

from adaplex.adapters.formats.adapterhub.adapterhub import AdapterHub

__all__ = ["AdapterHub"]
