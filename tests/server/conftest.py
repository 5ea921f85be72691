from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the settings of the shell that runs the tests."""
    for name in [name for name in os.environ if name.startswith("ADAPLEX_")]:
        monkeypatch.delenv(name)
