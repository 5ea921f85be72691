"""Tensors of a checkpoint that take part in text, under the names that the base's modules have.

Adapters of multimodal bases often have tensors of the vision tower, which text never reaches, and
adapters for earlier versions of transformers name modules as these did. Source:
`transformers.conversion_mapping`, which PEFT applies to LoRA.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.lowering_context import PREFIX
from adaplex.adapters.program.base_spec import BaseSpec

EARLIER = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Beginnings of names in earlier versions of transformers, and now."""


def text_tensors(checkpoint: Checkpoint, base: BaseSpec) -> tuple[Checkpoint, tuple[str, ...]]:
    """Returns a checkpoint without the tensors that have no effect on text, and a note for each
    part of the base that they belong to.
    """
    idle: Counter[str] = Counter()
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        name = _current(key.removeprefix(PREFIX), checkpoint, base)
        part = next((part for part in base.idle if name.startswith(f"{part}.")), None)
        if part is None or not key.startswith(PREFIX):
            renamed = f"{PREFIX}{name}" if key.startswith(PREFIX) else key
            tensors[key if renamed in checkpoint.tensors else renamed] = tensor
        else:
            idle[part] += 1
    notes = tuple(
        f"{count} tensors of {part} have no effect on text" for part, count in idle.items()
    )
    return Checkpoint(checkpoint.config, tensors), notes


def _current(name: str, checkpoint: Checkpoint, base: BaseSpec) -> str:
    """Returns the present name of a tensor of LoRA, if only that belongs to a part of the base."""
    if checkpoint.config.get("peft_type") != "LORA" or ".lora_" not in name:
        return name
    for old, new in EARLIER:
        if name.startswith(old):
            renamed = new + name.removeprefix(old)
            module = renamed.partition(".lora_")[0]
            if module in base.modules or any(renamed.startswith(f"{p}.") for p in base.idle):
                return renamed
    return name
