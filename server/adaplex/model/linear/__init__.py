"""Linear backends: how each format of a frozen weight is stored and multiplied."""
