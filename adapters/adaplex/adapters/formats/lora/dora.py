"""DoRA: W' = g (W + B A scale) for each row, with g = m / |W + B A scale|.

Source: `peft.tuners.lora.dora`. The norm is that of the effective weight, dequantized if the base
is quantized. PEFT does not scale the base's bias.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram


def apply_magnitude(
    context: LoweringContext, module: BaseModule, program: ModuleProgram, magnitude: Tensor
) -> ModuleProgram | None:
    """Returns the program of a pair at a linear or the embedding, with magnitudes [out_features].

    None, with a refusal, if the base's weight is unknown. Raises AdapterTooLarge.
    """
    weight = context.base_weight(module, "DoRA")
    if weight is None:
        return None
    assert program.low_rank is not None
    low_rank = program.low_rank
    if low_rank.lookup:
        context.check_bytes(f"{module.name}.lora_magnitude_vector", 2 * weight.numel())
        return _table(weight, program, low_rank, magnitude)
    tuned = torch.addmm(weight, low_rank.b, low_rank.a.float())
    gain = magnitude.float() / torch.linalg.vector_norm(tuned, dim=1)
    bias = program.bias
    if module.name in context.base.biases:
        kept = (1 - gain) * context.base.biases[module.name]
        bias = kept if bias is None else bias + kept
    scaled = replace(low_rank, b=low_rank.b * gain[:, None])
    return replace(program, low_rank=scaled, output_scale=gain, bias=bias)


def _table(
    weight: Tensor, program: ModuleProgram, low_rank: LowRank, magnitude: Tensor
) -> ModuleProgram:
    """Returns the program of an embedding as a replaced weight [vocabulary, hidden].

    There, magnitudes belong to columns, which no smaller primitive can scale.
    """
    tuned = torch.addmm(weight, low_rank.a.float().T, low_rank.b.T)
    gain = magnitude.float() / torch.linalg.vector_norm(tuned, dim=0)
    return replace(program, low_rank=None, weight=tuned * gain)
