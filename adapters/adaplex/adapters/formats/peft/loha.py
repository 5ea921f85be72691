"""LoHa as HF PEFT 0.21 writes it: y += ((w1_a w1_b) * (w2_a w2_b)) x * alpha / r.

The elementwise product of two matrices of rank r has rank r^2: with i and j over their ranks,
B[:, ij] = w1_a[:, i] * w2_a[:, j] and A[ij] = w1_b[i] * w2_b[j]. If r^2 is not below the smaller
side of the weight, the pair is the product itself and an identity. The rank limit applies to r.
"""

from __future__ import annotations

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.peft.lycoris import (
    HARMLESS,
    USED,
    lower_pairs,
    rank_and_scale,
    trivial_pair,
)
from adaplex.adapters.formats.peft_modules import ExpandedSize, Roles, check_linear, check_present
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class Loha:
    """Format of LoHa; see the module's docstring."""

    family = "loha"
    semantic_fields = USED
    about = FormatRow("LoHa", ("low-rank", "replaced weight"), "convolutions")

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        return lower_pairs(context, "LoHa", ROLES, _lower, harmless=HARMLESS, convolution=".hada_t")


def _lower(
    context: LoweringContext, expanded: ExpandedSize, module: BaseModule, roles: Roles
) -> ModuleProgram | None:
    if not check_linear(context, module, "LoHa") or not check_present(
        context, module, roles, *ROLES
    ):
        return None
    rank, scale = rank_and_scale(context, module.name)
    shapes = {"a": (module.out_features, rank), "b": (rank, module.in_features)}
    fits = [
        context.check_shape(f"{PREFIX}{module.name}.{role}", roles[role], *shapes[role[-1]])
        for role in ROLES
    ]
    if not all(fits):
        return None
    smaller = min(module.in_features, module.out_features)
    expanded.add(module, min(rank * rank, smaller))
    w1_a, w1_b, w2_a, w2_b = (roles[role].float() for role in ROLES)
    if rank * rank < smaller:
        b, a = _columns(w1_a, w2_a), _columns(w1_b.T, w2_b.T).T.contiguous()
    else:
        b, a = trivial_pair((w1_a @ w1_b) * (w2_a @ w2_b))
    return ModuleProgram(module.name, LowRank(a, b * scale), scale=scale)


def _columns(left: Tensor, right: Tensor) -> Tensor:
    """Returns each column of `left` [n, r] times each of `right` [n, s]: [n, r * s]."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)
