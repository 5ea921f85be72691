"""A base that runs a step in one call into C, and the same base by transformers' modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from adaplex.engine.request import AdapterRef
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.forward.torch_forward import TorchForward
from rig import ModelRig, prompt

BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "nf4": 5e-2, "int4-group": 5e-2}
"""Quantization -> largest difference of logits; a share of the largest logit, but for fp32."""
STEPS = 3


def forward_of(rig: ModelRig) -> type[Any]:
    return type(rig.runner._forward)


def close(got: Tensor, expected: Tensor, quantization: str) -> bool:
    scale = 1.0 if quantization == "fp32" else float(expected.abs().max())
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
