"""Trainable tokens as HF PEFT 0.21 writes them: replaced rows of the embedding or the output layer.

PEFT saves the new rows themselves, not their difference. Source: `peft.tuners.trainable_tokens`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, PREFIX, LoweringContext
from adaplex.adapters.formats.modules_to_save import check_copy
from adaplex.adapters.formats.token_rows import lower_rows, token_rows
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import ModuleProgram

ROWS = re.compile(r"(?P<module>.+)\.trainable_tokens_delta(\.default)?")
COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")


class TrainableTokens:
    """Format of trainable tokens as an adapter of their own; in LoRA they are a config field."""

    family = "trainable-tokens"
    semantic_fields = frozenset(["peft_type", "target_modules", "token_indices"])
    about = FormatRow("Trainable tokens", ("replaced rows",))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields(
            "trainable tokens", self.semantic_fields, COMMON_FIELDS | {"init_weights"}
        )
        context.check_target_fields()
        ids: Any = context.config.get("token_indices")
        context.check_tokens("token_indices", ids)
        context.raise_refusals()
        programs: dict[str, ModuleProgram | None] = {}
        with context.collect_refusals():
            tensors = _sort_tensors(context)
            targets = dict.fromkeys(sorted(_targets(context)), ids)
            programs = lower_rows(context, token_rows(context, targets), tensors)
        context.raise_refusals()
        return Lowered(tuple(filter(None, programs.values())))


def _sort_tensors(context: LoweringContext) -> dict[str, tuple[str, Tensor]]:
    """Returns key and tensor of the rows by module name; refuses tensors of unknown keys."""
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in context.tensors.items():
        name = key.removeprefix(PREFIX)
        copy = COPY.fullmatch(name)
        if name == key:
            context.refuse(key, f"does not begin with {PREFIX}")
        elif rows := ROWS.fullmatch(name):
            if rows["module"] in found:
                context.refuse(key, "is given twice")
            found[rows["module"]] = (key, tensor)
        elif copy is not None and (module := context.base.modules.get(copy["module"])) is not None:
            check_copy(context, module, key, tensor)
        else:
            context.refuse(key, "is not a known tensor of trainable tokens")
    return found


def _targets(context: LoweringContext) -> frozenset[str]:
    """Returns the names of the targeted modules; by default, the embedding."""
    if context.config.get("target_modules"):
        targets = context.targets(("linear", "embedding"))
    else:
        targets = frozenset([] if context.embedding is None else [context.embedding.name])
    if not targets:
        context.refuse("target_modules", f"matches no module of the base {context.base.name}")
    return targets
