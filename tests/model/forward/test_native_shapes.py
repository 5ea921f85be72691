"""Shapes of decoders that run in one C call: how parts are read, and which ones tests reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from adaplex.adapters.program.primitives import Activation
from adaplex.model.forward.decoder_shape import OtherShape
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.forward.read_parts import read_activation, read_norm
from adaplex.model.kernels.native import structs
from adaplex.model.weights import site_table
from rig import ModelRig, prompt
from tiny import ARCHITECTURES, save_tiny
from two_forwards import forward_of

Change = Callable[[structs.Model], None]


def model(field: str, value: Any) -> Change:
    """Returns a function that sets a field of the decoder."""
    return lambda m: setattr(m, field, value)


def layers(field: str, value: Any) -> Change:
    """Returns a function that sets a field of every layer."""

    def change(m: structs.Model) -> None:
        for i in range(m.layers):
            setattr(m.layer[i], field, value)

    return change


def other_rotations(m: structs.Model) -> None:
    """Gives the layers with a window the rotations of the layer without one."""
    for i in (0, 2):
        m.layer[i].cosines, m.layer[i].sines = m.layer[1].cosines, m.layer[1].sines


def mean_of_zero(m: structs.Model) -> None:
    m.final_norm.centered = 0


def no_shift(m: structs.Model) -> None:
    m.final_norm.bias = None


PARTS: dict[str, dict[str, Change]] = {
    "gemma2": {
        "cap of logits": model("logit_softcap", 0.0),
        "cap of scores": layers("softcap", 0.0),
        "window": layers("window", 0),
        "scale of embeddings": model("embedding_scale", 1.0),
        "norm after attention": layers("attention_out_norm", structs.Norm()),
        "norm after the MLP": layers("mlp_out_norm", structs.Norm()),
        "activation": model("activation", site_table.ACTIVATIONS.index(Activation.SILU)),
    },
    "gemma3_text": {
        "rotations by layer": other_rotations,
        "window": layers("window", 0),
        "scale of queries": layers("scale", 0.25),
        "norm of queries": layers("q_norm", structs.Norm()),
    },
    "phi3": {"window": layers("window", 0), "partial rotations": model("rotary_dim", 8)},
    "gpt2": {
        "positions": model("position_embedding", None),
        "mean of a norm": mean_of_zero,
        "bias of a norm": no_shift,
    },
}


@pytest.mark.parametrize(
    ("architecture", "part"), [(name, part) for name, parts in PARTS.items() for part in parts]
)
def test_a_prompt_of_the_tests_reaches_every_part(
    architecture: str, part: str, tiny_model: Callable[[str], Path]
) -> None:
    rig = ModelRig(tiny_model(architecture))
    forward: Any = rig.runner._forward
    before = rig.prefill(rig.sequence(prompt(130)))
    PARTS[architecture][part](forward._model)
    assert (rig.prefill(rig.sequence(prompt(130))) - before).abs().max() > 1e-2


def filled(norm: nn.Module) -> nn.Module:
    for i, parameter in enumerate(norm.parameters()):
        parameter.data = torch.linspace(-1, 3, parameter.numel()) + i
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "centered", "offset"),
    [
        (filled(LlamaRMSNorm(48)), False, 0.0),
        (filled(nn.RMSNorm(48, eps=1e-5)), False, 0.0),
        (filled(Gemma3RMSNorm(48)), False, 1.0),
        (filled(nn.LayerNorm(48)), True, 0.0),
    ],
    ids=["llama", "torch", "gemma", "layer-norm"],
)
def test_norms_are_read_by_what_they_compute(
    norm: nn.Module, centered: bool, offset: float, dtype: torch.dtype
) -> None:
    norm = norm.to(dtype)
    found = read_norm("norm", norm, 48)
    assert (found.centered, found.offset) == (centered, offset)
    weight: Tensor = norm.get_parameter("weight")
    assert torch.equal(found.weight, weight.float() + offset)
    assert (found.bias is None) == (getattr(norm, "bias", None) is None)


class Doubled(LlamaRMSNorm):  # type: ignore[misc, no-untyped-call]
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "norm",
    [filled(Doubled(48)), filled(LlamaRMSNorm(49)), nn.LayerNorm(48, elementwise_affine=False)],
)
def test_other_norms_are_refused(norm: nn.Module) -> None:
    with pytest.raises(OtherShape, match=r"^a\.norm: "):
        read_norm("a.norm", norm, 48)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", Activation.SILU),
        ("gelu", Activation.GELU),
        ("gelu_new", Activation.GELU_TANH),
        ("gelu_pytorch_tanh", Activation.GELU_TANH),
        ("relu", Activation.RELU),
    ],
)
def test_activations_are_read_by_what_they_compute(name: str, activation: Activation) -> None:
    assert site_table.ACTIVATIONS[read_activation(ACT2FN[name])] is activation


@pytest.mark.parametrize("name", ["quick_gelu", "relu2", "mish"])
def test_other_activations_are_refused(name: str) -> None:
    with pytest.raises(OtherShape, match=r"^activation "):
        read_activation(ACT2FN[name])


def test_parts_of_several_shapes_combine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """starcoder2: q, k and v with biases, rotations, LayerNorms, and an MLP that is not gated."""
    monkeypatch.setitem(ARCHITECTURES, "starcoder2", {"sliding_window": 24})
    directory = save_tiny("starcoder2", tmp_path / "model")
    fast, slow = (ModelRig(directory, native=native) for native in (True, False))
    assert forward_of(fast) is NativeForward
    one, other = (rig.prefill(rig.sequence(prompt(130))) for rig in (fast, slow))
    assert (one - other).abs().max() < 1e-4
