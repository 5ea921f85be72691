"""Plain LoRA on the handmade base, lowered or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from adapters.handmade import BASE, PREFIX, QUERY, checkpoint, tensors

LIMITS = AdapterLimits()
A_QUERY, B_QUERY = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"


def lower(weights: Mapping[str, Tensor] | None = None, /, **fields: Any) -> AdapterProgram:
    return formats.lower(checkpoint(weights, **fields), BASE, LIMITS)


def refusals(weights: Mapping[str, Tensor] | None = None, /, **fields: Any) -> dict[str, str]:
    """Where -> why."""
    with pytest.raises(AdapterInvalid) as caught:
        lower(weights, **fields)
    assert caught.value.field == caught.value.refusals[0].where
    for refusal in caught.value.refusals:
        assert refusal.where
        assert refusal.reason
        assert str(refusal) in str(caught.value)
    return {refusal.where: refusal.reason for refusal in caught.value.refusals}


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors().items() if key not in keys}
