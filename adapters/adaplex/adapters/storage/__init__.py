"""Where names, versions and the files of adapters are kept."""
