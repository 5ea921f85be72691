"""A base that runs a step in one call into C, and the same base by transformers' modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from adaplex.engine.request import AdapterRef
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.forward.torch_forward import TorchForward
from rig import ModelRig, prompt

SLOW = pytest.mark.slow
BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "nf4": 5e-2, "int4-group": 5e-2}
"""Quantization -> largest difference of logits; a share of the largest logit, but for fp32."""
STEPS = 3
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
OTHER_SHAPES = {"gemma2": "nf4", "gemma3_text": "bf16", "phi3": "int4-group", "gpt2": "nf4"}
"""Other architectures that run in one call -> a quantization that `make test` tries beside fp32."""
IN_TURN = {"mistral": "bf16", "qwen2": "fp32", "qwen3": "int4-group"} | OTHER_SHAPES
"""Architectures differ in norms, biases and windows, quantizations in products: so `make test`
takes one quantization of each of these."""


def each_shape(*llamas: str, exact: bool = True) -> pytest.MarkDecorator:
    """Parametrizes a test by architecture and quantization: all pairs of some llama-shaped ones and
    of the others. Beside those of llama itself most are slow; fp32 is not if `exact`.
    """
    quick = ("fp32",) if exact else ()
    pairs = [
        pytest.param(name, kind, marks=() if kind in (*quick, IN_TURN.get(name, kind)) else SLOW)
        for name in (*llamas, *OTHER_SHAPES)
        for kind in sorted(BOUNDS)
    ]
    return pytest.mark.parametrize(("architecture", "quantization"), pairs)


def forward_of(rig: ModelRig) -> type[Any]:
    return type(rig.runner._forward)


def close(got: Tensor, expected: Tensor, quantization: str, architecture: str = "") -> bool:
    """Whether logits are equal but for rounding, which Gemma's scaled embeddings make larger."""
    scale = 1.0
    if quantization != "fp32":
        scale = float(expected.abs().max()) * (2 if "gemma" in architecture else 1)
    return bool((got - expected).abs().max() <= BOUNDS[quantization] * scale)


def both(model: Path, quantization: str) -> tuple[ModelRig, ModelRig]:
    """Returns a rig that runs a step in one call, and one that runs transformers' modules."""
    fast, slow = (ModelRig(model, quantization, native=native) for native in (True, False))
    assert forward_of(fast) is NativeForward
    assert forward_of(slow) is TorchForward
    return fast, slow


def decode(
    rig: ModelRig, refs: list[AdapterRef | None], followed: list[Tensor] | None
) -> list[Tensor]:
    """Returns the logits of a prefill and of STEPS decoding steps, whose tokens are the argmax of
    `followed`, if given, else of these logits.
    """
    sequences = [rig.sequence(prompt(9 + 5 * i), ref) for i, ref in enumerate(refs)]
    logits = [rig.prefill(*sequences)]
    for step in range(STEPS):
        tops = (followed or logits)[step].argmax(-1).tolist()
        for sequence, token in zip(sequences, tops, strict=True):
            sequence.tokens.append(token)
        logits.append(rig.decode(*sequences))
    return logits
