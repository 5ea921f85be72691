"""Sources that adapters are fetched from: one file per URI scheme, one line each in Sources."""
