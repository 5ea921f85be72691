"""Linear layers: how each format of a frozen weight is kept and multiplied."""
