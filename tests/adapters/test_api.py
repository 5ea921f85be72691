from __future__ import annotations

import subprocess
import sys

import pytest

from adaplex.adapters import api

WITHOUT_TENSORS = [
    "adaplex.adapters",
    "adaplex.adapters.errors",
    "adaplex.adapters.limits",
    "adaplex.adapters.program.traits",
    "adaplex.adapters.storage.adapter_record",
    "adaplex.engine.engine",
    "adaplex.client.cli",
]


def test_every_name_of_the_surface_is_there() -> None:
    assert all(hasattr(api, name) for name in api.__all__)
    assert len(set(api.__all__)) == len(api.__all__)


@pytest.mark.parametrize("module", WITHOUT_TENSORS)
def test_modules_without_tensors_do_not_import_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
