"""Reference documents that are generated from code: settings, metrics, errors, protocol."""
