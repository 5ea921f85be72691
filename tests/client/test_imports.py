from __future__ import annotations

import subprocess
import sys

import pytest

import adaplex
import adaplex.client
from adaplex.client import adapter_types, types


@pytest.mark.parametrize("module", ["adaplex.client", "adaplex.client.cli"])
def test_the_client_needs_no_torch_and_no_server(module: str) -> None:
    heavy = ["torch", "transformers", "numpy", "pydantic", "adaplex.server", "adaplex.adapters"]
    code = f"import {module}, sys; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_package_is_a_namespace() -> None:
    assert not hasattr(adaplex, "__file__") or adaplex.__file__ is None


def test_every_public_name_exists_and_every_value_is_public() -> None:
    for name in adaplex.client.__all__:
        assert hasattr(adaplex.client, name)
    for module in (types, adapter_types):
        values = {n for n, kind in vars(module).items() if hasattr(kind, "__dataclass_fields__")}
        assert values <= set(adaplex.client.__all__)


def test_the_values_of_adapters_are_found_in_types_too() -> None:
    own = [
        name
        for name, kind in vars(adapter_types).items()
        if getattr(kind, "__module__", "") == adapter_types.__name__
    ]
    assert "Adapter" in own
    assert [getattr(types, name) for name in own] == [getattr(adapter_types, name) for name in own]


def test_sampling_keywords_are_the_fields_of_sampling_params() -> None:
    fields = types.SamplingParams.__dataclass_fields__
    assert list(types.SamplingFields.__annotations__) == list(fields)
