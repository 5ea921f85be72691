from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaplex.client.bench.checkpoint import perturb_weights, write_checkpoint
from adaplex.client.types import AdaptableModule

MODULES = (
    AdaptableModule("model.layers.0.self_attn.q_proj", "linear", 24, 16, is_head=False),
    AdaptableModule("model.layers.0.mlp.down_proj", "linear", 40, 24, is_head=False),
    AdaptableModule("model.norm", "norm", 24, 24, is_head=False),
    AdaptableModule("lm_head", "linear", 24, 100, is_head=True),
)
KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"


def read(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_a_checkpoint_is_finite_bf16_of_the_shapes_of_all_linears(tmp_path: Path) -> None:
    tensors = read(write_checkpoint(tmp_path / "a", MODULES, rank=4, seed=0))
    assert len(tensors) == 4
    a, b = tensors[KEY.format("A")], tensors[KEY.format("B")]
    assert (a.shape, b.shape, a.dtype) == ((4, 40), (24, 4), torch.bfloat16)
    for tensor in tensors.values():
        assert tensor.abs().min() >= 2**-7
        assert tensor.abs().max() < 2**-5
        assert (tensor > 0).any()
        assert (tensor < 0).any()


def test_checkpoints_of_other_seeds_differ(tmp_path: Path) -> None:
    one, same, other = (
        (write_checkpoint(tmp_path / str(i), MODULES, 2, seed) / "adapter_model.safetensors")
        for i, seed in enumerate((1, 1, 2))
    )
    assert one.read_bytes() == same.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_perturbed_weights_differ_and_stay_finite(tmp_path: Path) -> None:
    directory, rng = write_checkpoint(tmp_path, MODULES, 2, 0), random.Random(0)
    contents = set()
    for _ in range(20):
        perturb_weights(directory, rng)
        tensors = read(directory)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        contents.add((directory / "adapter_model.safetensors").read_bytes())
    assert len(contents) == 20


def test_a_server_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no linear"):
        write_checkpoint(tmp_path, (), 2, 0)
