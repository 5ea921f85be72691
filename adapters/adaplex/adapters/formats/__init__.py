"""Families: one file each, one line each in FORMATS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.digest import content_digest
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.formats.adalora import AdaLora
from adaplex.adapters.formats.bitfit import Beft, BitFit
from adaplex.adapters.formats.ia3 import IA3
from adaplex.adapters.formats.ln_tuning import LNTuning
from adaplex.adapters.formats.loha import Loha
from adaplex.adapters.formats.lokr import Lokr
from adaplex.adapters.formats.lora import Lora
from adaplex.adapters.formats.lowered import Lowered
from adaplex.adapters.formats.prefix import PrefixTuning
from adaplex.adapters.formats.prompt import MultitaskPromptTuning, PromptTuning
from adaplex.adapters.formats.vera import Vera
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import AdapterProgram, BaseSpec


class Format(Protocol):
    """How one family is read."""

    family: str
    semantic_fields: frozenset[str]
    """Config fields that change the answer; they enter the digest."""

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """Raises AdapterInvalid with every refusal, or AdapterTooLarge."""
        ...


FORMATS: Mapping[str, Format] = {
    "LORA": Lora(),
    "ADALORA": AdaLora(),
    "BEFT": Beft(),
    "BITFIT": BitFit(),
    "CPT": PromptTuning("cpt"),
    "IA3": IA3(),
    "LN_TUNING": LNTuning(),
    "LOHA": Loha(),
    "LOKR": Lokr(),
    "MULTITASK_PROMPT_TUNING": MultitaskPromptTuning(),
    "PREFIX_TUNING": PrefixTuning(),
    "PROMPT_TUNING": PromptTuning("prompt-tuning"),
    "P_TUNING": PromptTuning("p-tuning"),
    "VERA": Vera(),
}
"""PEFT's `peft_type` -> format."""

NEEDS: Mapping[str, str] = {
    "ADAPTION_PROMPT": "gated attention over learned prompts",
    "BOFT": "merged weights computed by PEFT",
    "BONE": "merged weights computed by PEFT",
    "C3A": "merged weights computed by PEFT",
    "FOURIERFT": "merged weights computed by PEFT",
    "HRA": "merged weights computed by PEFT",
    "OFT": "merged weights computed by PEFT",
    "POLY": "a router between low-rank pairs",
    "RANDLORA": "merged weights computed by PEFT",
    "TRAINABLE_TOKENS": "replaced embedding rows",
    "VBLORA": "merged weights computed by PEFT",
    "XLORA": "a router between low-rank pairs",
}
"""What a family that is not served yet would need."""


def lower(checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> AdapterProgram:
    """Lowers a checkpoint to primitives. Raises AdapterInvalid with every refusal."""
    kind = checkpoint.config.get("peft_type")
    found = FORMATS.get(kind) if isinstance(kind, str) else None
    if found is None:
        need = f"; it needs {NEEDS[kind]}" if isinstance(kind, str) and kind in NEEDS else ""
        raise AdapterInvalid.because(
            "peft_type", f"{kind!r:.80} is not served; served are {', '.join(FORMATS)}{need}"
        )
    lowered = found.lower(checkpoint, base, limits)
    program = AdapterProgram(
        content_digest(checkpoint, found.semantic_fields),
        lowered.family or found.family,
        lowered.modules,
        lowered.notes,
        lowered.warnings,
        lowered.invocation,
    )
    if refusals := list(_overflows(program)):
        raise AdapterInvalid(refusals)
    return program


def _overflows(program: AdapterProgram) -> Iterator[Refusal]:
    """Tensors that are not finite once scaled and in bf16: they would poison other rows."""
    for module in program.modules:
        for role, tensor in module.tensors():
            if not bool(torch.isfinite(tensor.to(torch.bfloat16)).all()):
                yield Refusal(module.module, f"its {role}, scaled by {module.scale:g}, overflows")
