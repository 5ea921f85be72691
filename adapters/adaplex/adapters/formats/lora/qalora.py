"""QA-LoRA: `lora_A` [rank, in / group] reads one pooled value for each group of inputs.

The authors' code averages a group. PEFT also multiplies the averages by the number of groups, and
marks its configs with `use_qalora`. Sources: https://arxiv.org/abs/2309.14717 and
`peft.tuners.lora.variants.QALoraLinearVariant`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule

PEFTS, AUTHORS = "qalora_group_size", "group_size"
"""Config fields with the group's size, in PEFT's format and in that of QA-LoRA's authors."""


@dataclass(frozen=True)
class Pooling:
    """Pooling of `group` neighbouring inputs to `factor` times their sum."""

    group: int
    factor: float

    def expanded(self, a: Tensor) -> Tensor:
        """Returns a [rank, in] from the stored a [rank, in / group]."""
        return a.repeat_interleave(self.group, dim=1)


def pooling_of(context: LoweringContext, module: BaseModule, a: Tensor) -> Pooling | None:
    """Returns the pooling that the shape of `a` implies; None for plain LoRA, or if the shape does
    not match the config's group size.
    """
    config = context.config
    group = config.get(PEFTS) if PEFTS in config else config.get(AUTHORS)
    if type(group) is not int or group < 2 or module.in_features % group:
        return None
    groups = module.in_features // group
    if a.dim() != 2 or a.shape[1] != groups or module.kind != "linear":
        return None
    if config.get("use_qalora"):
        return Pooling(group, groups / group)
    return None if "use_qalora" in config else Pooling(group, 1 / group)


def pooling_note(context: LoweringContext, pooled: Pooling) -> str:
    """Returns a note of whose scaling was applied."""
    if context.config.get("use_qalora"):
        return f"QA-LoRA by PEFT: averages over {pooled.group} inputs, times the number of groups"
    return f"QA-LoRA by its authors: averages over {pooled.group} inputs"
