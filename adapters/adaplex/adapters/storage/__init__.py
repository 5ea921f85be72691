"""Storage: names and versions in catalogs, the files of adapters in content stores."""
