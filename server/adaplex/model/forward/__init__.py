"""Forwards: by the modules of transformers, by replayed decoding steps, and in C; and sampling."""
