"""Sources: where adapters come from. One file a scheme, one line each in Sources."""

from adaplex.adapters.sources.sources import Fetched, Sources

__all__ = ["Fetched", "Sources"]
