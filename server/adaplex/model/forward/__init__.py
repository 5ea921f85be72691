"""The three ways to run a step, and sampling."""
