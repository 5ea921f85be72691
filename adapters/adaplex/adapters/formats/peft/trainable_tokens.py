"""Trainable tokens: some rows of the embedding, or of the output layer, are others.

PEFT writes the new rows themselves. On a base whose output layer uses the embedding's weight, the
rows of the embedding are those of the output layer too. Sources: `peft.tuners.trainable_tokens`
and `peft.utils.other.set_additional_trainable_modules`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import HARMLESS, PREFIX, LoweringContext
from adaplex.adapters.formats.modules_to_save import check_copy
from adaplex.adapters.formats.token_rows import lower_rows, token_rows
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import ModuleProgram

ROWS = re.compile(r"(?P<module>.+)\.trainable_tokens_delta(\.default)?")
COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")


class TrainableTokens:
    """PEFT's type of its own; inside of LoRA they are a field."""

    family = "trainable-tokens"
    semantic_fields = frozenset(["peft_type", "target_modules", "token_indices"])
    about = FormatRow("Trainable tokens", ("replaced rows",))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("trainable tokens", self.semantic_fields, HARMLESS | {"init_weights"})
        reading.check_target_fields()
        ids: Any = reading.config.get("token_indices")
        reading.check_tokens("token_indices", ids)
        reading.raise_refused()
        programs: dict[str, ModuleProgram | None] = {}
        with reading.collecting():
            tensors = _sort_tensors(reading)
            targets = dict.fromkeys(sorted(_targets(reading)), ids)
            programs = lower_rows(reading, token_rows(reading, targets), tensors)
        reading.raise_refused()
        return Lowered(tuple(filter(None, programs.values())))


def _sort_tensors(reading: LoweringContext) -> dict[str, tuple[str, Tensor]]:
    """Name of a module -> key and tensor; refuses tensors that fit no place."""
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in reading.tensors.items():
        name = key.removeprefix(PREFIX)
        copy = COPY.fullmatch(name)
        if name == key:
            reading.refuse(key, f"does not begin with {PREFIX}")
        elif rows := ROWS.fullmatch(name):
            if rows["module"] in found:
                reading.refuse(key, "is given twice")
            found[rows["module"]] = (key, tensor)
        elif copy is not None and (module := reading.base.modules.get(copy["module"])) is not None:
            check_copy(reading, module, key, tensor)
        else:
            reading.refuse(key, "is not a tensor of trainable tokens that this server knows")
    return found


def _targets(reading: LoweringContext) -> frozenset[str]:
    """Names of the modules that the config targets: by default, the embedding."""
    if reading.config.get("target_modules"):
        targets = reading.targets(("linear", "embedding"))
    else:
        targets = frozenset([] if reading.embedding is None else [reading.embedding.name])
    if not targets:
        reading.refuse("target_modules", f"matches no module of the base {reading.base.name}")
    return targets
