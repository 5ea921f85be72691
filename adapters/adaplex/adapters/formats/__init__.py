"""Families: one file each, one line each in FORMATS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from adaplex.adapters.base_match import recorded_quantization
from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.digest import content_digest
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.formats.lora import Lora
from adaplex.adapters.formats.lowered import Lowered
from adaplex.adapters.formats.trainable_tokens import TrainableTokens
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
    "TRAINABLE_TOKENS": TrainableTokens(),
}
"""PEFT's `peft_type` -> format."""

NEEDS: Mapping[str, str] = {
    "ADALORA": "the low-rank primitive with singular values folded in",
    "ADAPTION_PROMPT": "gated attention over learned prompts",
    "BOFT": "merged weights computed by PEFT",
    "BONE": "merged weights computed by PEFT",
    "C3A": "merged weights computed by PEFT",
    "CPT": "the virtual-token primitive",
    "FOURIERFT": "merged weights computed by PEFT",
    "HRA": "merged weights computed by PEFT",
    "IA3": "the input and output scale primitives",
    "LN_TUNING": "replaced norm weights",
    "LOHA": "the low-rank primitive over a Khatri-Rao product",
    "LOKR": "the low-rank primitive over an expanded Kronecker product",
    "MULTITASK_PROMPT_TUNING": "the virtual-token primitive",
    "OFT": "merged weights computed by PEFT",
    "P_TUNING": "the virtual-token primitive",
    "POLY": "a router between low-rank pairs",
    "PREFIX_TUNING": "the KV prefix primitive",
    "PROMPT_TUNING": "the virtual-token primitive",
    "RANDLORA": "merged weights computed by PEFT",
    "VBLORA": "merged weights computed by PEFT",
    "VERA": "the low-rank primitive with shared pairs",
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
        (*lowered.notes, *recorded_quantization(checkpoint.config)),
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
