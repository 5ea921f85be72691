"""The setting cpu_activations: where it applies, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex.model.base.loader import load_base
from adaplex.model.errors import UnsupportedModel


@pytest.mark.parametrize("quantization", ["nf4", "int4-group"])
def test_int8_applies_to_all_linears_but_the_output_layer(
    quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    model = str(tiny_model("llama"))
    bases = [
        load_base(model, quantization=quantization, device="cpu", cpu_activations=each)
        for each in ("float", "int8")
    ]
    x = torch.randn(3, 64, generator=torch.manual_seed(0)).bfloat16()
    for name, modules in bases[0].spec.modules.items():
        if modules.kind != "linear" or "down_proj" in name:
            continue
        exact, rounded = (base.backends[name](x) for base in bases)
        assert torch.equal(exact, rounded) == modules.is_head


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cpu_activations": "int4"}, "'int4' is not one of float, int8"),
        *(
            ({"quantization": each}, f"int8 does not fit quantization {each}: .*; set float")
            for each in ("bf16", "fp32", "int8")
        ),
        ({"quantization": "nf4", "dtype": "fp32"}, "int8 does not fit dtype fp32 with nf4"),
        (
            {"quantization": "int4-group", "group_size": 16},
            "int8 does not fit group_size 16: it needs at least 32",
        ),
        ({"native": False}, "int8 needs the C kernels, .*: install a C compiler or set float"),
    ],
)
def test_what_int8_does_not_fit_is_refused(
    settings: dict[str, Any], reason: str, tiny_model: Callable[[str], Path]
) -> None:
    given = {"cpu_activations": "int8", "device": "cpu", **settings}
    with pytest.raises(UnsupportedModel, match=f"^cpu_activations: {reason}"):
        load_base(str(tiny_model("llama")), **given)


def test_int8_is_refused_on_a_cuda_device(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UnsupportedModel, match=r"^cpu_activations: int8 does not fit device cuda"):
        load_base(str(tiny_model("llama")), device="cuda", cpu_activations="int8")
