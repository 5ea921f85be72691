from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the shell that runs the tests do not count."""
    for name in [name for name in os.environ if name.startswith("ADAPLEX_")]:
        monkeypatch.delenv(name)
