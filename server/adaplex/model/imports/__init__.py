"""Imports of torch and transformers at a start: without the parts that serving does not need."""
