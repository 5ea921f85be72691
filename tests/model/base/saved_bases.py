"""Asserts that a restored base equals the base that was saved."""

from __future__ import annotations

import torch
from torch import nn

from adaplex.model.base import saved_base
from adaplex.model.base.loader import BaseModel


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, _, _, tensor in saved_base._state(model)}


def check_equal(restored: BaseModel, made: BaseModel) -> None:
    """Asserts that spec, backends and every tensor are equal."""
    assert restored.spec.modules == made.spec.modules
    assert (restored.spec.digest, restored.shapes) == (made.spec.digest, made.shapes)
    assert restored.weight_bytes == made.weight_bytes
    assert {name: type(each) for name, each in restored.backends.items()} == {
        name: type(each) for name, each in made.backends.items()
    }
    assert restored.spec.biases.keys() == made.spec.biases.keys()
    for name, bias in made.spec.biases.items():
        assert torch.equal(restored.spec.biases[name], bias)
    found, expected = state_of(restored.module), state_of(made.module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    for name, backend in made.backends.items():
        tensors = restored.backends[name].tensors()
        for part, tensor in backend.tensors().items():
            assert torch.equal(tensors[part], tensor), (name, part)
