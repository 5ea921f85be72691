"""Time limits of tests: they bound what never happens and allow for the slowest machine."""

from __future__ import annotations

WAIT_SECONDS = 600.0
"""Seconds that a test waits for an event, an answer or the end of a process before it fails."""
TEST_SECONDS = 3 * WAIT_SECONDS
"""Limit of a whole test that starts servers or loads the default model, for pytest-timeout."""
