"""Sources that adapters are fetched from: one file per URI scheme, one line each in Sources."""

from adaplex.adapters.sources.sources import Fetched, Sources

__all__ = ["Fetched", "Sources"]
