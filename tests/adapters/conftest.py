"""A registry for fp32 that must be well, and have nothing staged, at the end of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adaplex.adapters.registry import AdapterRegistry
from adapters.handmade import make_registry, staged


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[AdapterRegistry]:
    made = make_registry(tmp_path / "store")
    yield made
    made.check_integrity()
    assert made.garbage.orphans() == frozenset()
    assert staged(tmp_path / "store") == []
    made.close()
