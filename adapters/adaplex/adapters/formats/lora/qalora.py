"""QA-LoRA: `lora_A` [rank, in / group] reads one value for each group of inputs.

The authors' code averages a group. PEFT's multiplies the averages by the number of groups as well,
and marks its configs with `use_qalora`. Sources: https://arxiv.org/abs/2309.14717 and
`peft.tuners.lora.variants.QALoraLinearVariant`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule

PEFTS, AUTHORS = "qalora_group_size", "group_size"


@dataclass(frozen=True)
class Pooling:
    """How inputs are pooled: `group` of them, whose sum is taken `factor` times."""

    group: int
    factor: float

    def expanded(self, a: Tensor) -> Tensor:
        """a [rank, in / group] -> [rank, in]."""
        return a.repeat_interleave(self.group, dim=1)


def pooling(context: LoweringContext, module: BaseModule, a: Tensor) -> Pooling | None:
    """How the module's `a` wants its inputs pooled; None where it is that of plain LoRA, or fits
    no group of the config's.
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


def note(context: LoweringContext, pooled: Pooling) -> str:
    """Whose scaling it was read by."""
    if context.config.get("use_qalora"):
        return f"QA-LoRA by PEFT: averages over {pooled.group} inputs, times the number of groups"
    return f"QA-LoRA by its authors: averages over {pooled.group} inputs"
