"""LoKr as HF PEFT 0.21 writes it: y += kron(w1, w2) x * alpha / r, each factor decomposed or not.

kron(b1 a1, b2 a2) = kron(b1, b2) kron(a1, a2), so the pair's rank is the product of the factors'
ranks; a factor that is not decomposed has the rank of its smaller side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.peft import lycoris
from adaplex.adapters.formats.peft.lycoris import USED, lower_pairs, rank_and_scale, trivial_pair
from adaplex.adapters.formats.peft_modules import ExpandedSize, Roles, check_linear
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

FACTORS = ("lokr_w1", "lokr_w2")
ROLES = tuple(f"{factor}{part}" for factor in FACTORS for part in ("", "_a", "_b"))
HARMLESS = lycoris.HARMLESS | frozenset(
    ["decompose_both", "decompose_factor", "rank_dropout_scale"]
)
"""Config fields that do not change the answer: the tensors' shapes imply the decomposition."""

Pair = tuple[Tensor, Tensor]
"""b [out, rank], a [rank, in]."""


class Lokr:
    """Format of LoKr; see the module's docstring."""

    family = "lokr"
    semantic_fields = USED
    about = FormatRow("LoKr", ("low-rank", "replaced weight"), "convolutions")

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        return lower_pairs(
            context, "LoKr", ROLES, _lower, harmless=HARMLESS, convolution=".lokr_t2"
        )


def _lower(
    context: LoweringContext, expanded: ExpandedSize, module: BaseModule, roles: Roles
) -> ModuleProgram | None:
    if not check_linear(context, module, "LoKr"):
        return None
    rank, scale = rank_and_scale(context, module.name)
    first, second = (_factor(context, module, roles, factor, rank) for factor in FACTORS)
    if first is None or second is None:
        return None
    (b1, a1), (b2, a2) = first, second
    out, inputs = b1.shape[0] * b2.shape[0], a1.shape[1] * a2.shape[1]
    if (out, inputs) != (module.out_features, module.in_features):
        context.refuse(
            f"{PREFIX}{module.name}.lokr_w1",
            f"and lokr_w2 form a weight of shape {[out, inputs]}, "
            f"expected {[module.out_features, module.in_features]}",
        )
        return None
    expanded.add(module, b1.shape[1] * b2.shape[1])
    low_rank = LowRank(torch.kron(a1, a2), torch.kron(b1, b2) * scale)
    return ModuleProgram(module.name, low_rank, scale=scale)


def _factor(
    context: LoweringContext, module: BaseModule, roles: Roles, factor: str, rank: int
) -> Pair | None:
    """Returns one factor as a pair; None, with refusals, if it is missing or does not fit."""
    key = f"{PREFIX}{module.name}.{factor}"
    whole, a, b = (roles.get(f"{factor}{part}") for part in ("", "_a", "_b"))
    if whole is not None and (a is not None or b is not None):
        context.refuse(key, "is given both whole and decomposed")
    elif whole is None and (a is None or b is None):
        context.refuse(key, "is missing, and its decomposition is incomplete")
    elif whole is not None:
        if _is_matrix(context, key, whole):
            return trivial_pair(whole.float())
    elif a is not None and b is not None:
        matrices = _is_matrix(context, f"{key}_a", a), _is_matrix(context, f"{key}_b", b)
        if all(matrices) and _has_rank(context, key, a, b, rank):
            a, b = a.float(), b.float()
            return (a, b) if rank < min(a.shape[0], b.shape[1]) else trivial_pair(a @ b)
    return None


def _is_matrix(context: LoweringContext, key: str, tensor: Tensor) -> bool:
    if tensor.dim() != 2:
        context.refuse(key, f"has shape {list(tensor.shape)}, expected a matrix")
    return tensor.dim() == 2


def _has_rank(context: LoweringContext, key: str, a: Tensor, b: Tensor, rank: int) -> bool:
    """Refuses a decomposition of another rank than the config's; True if it fits."""
    fits = (
        context.check_shape(f"{key}_a", a, a.shape[0], rank),
        context.check_shape(f"{key}_b", b, rank, b.shape[1]),
    )
    return all(fits)
