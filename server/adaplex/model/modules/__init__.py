"""Modules of transformers, replaced or hooked so that adapters apply to them."""
