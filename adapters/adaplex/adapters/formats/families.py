"""Table of adapter families, and the entry points that choose a family's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.digest import content_digest
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.formats.adapterhub import AdapterHub
from adaplex.adapters.formats.base import Format
from adaplex.adapters.formats.bundle import Bundle
from adaplex.adapters.formats.lora.lora import Lora
from adaplex.adapters.formats.peft.adalora import AdaLora
from adaplex.adapters.formats.peft.bitfit import Beft, BitFit
from adaplex.adapters.formats.peft.ia3 import IA3
from adaplex.adapters.formats.peft.ln_tuning import LNTuning
from adaplex.adapters.formats.peft.loha import Loha
from adaplex.adapters.formats.peft.lokr import Lokr
from adaplex.adapters.formats.peft.merged_only import MERGED_ONLY, MergedOnly
from adaplex.adapters.formats.peft.prefix import PrefixTuning
from adaplex.adapters.formats.peft.prompt import MultitaskPromptTuning, PromptTuning
from adaplex.adapters.formats.peft.trainable_tokens import TrainableTokens
from adaplex.adapters.formats.peft.vera import Vera
from adaplex.adapters.formats.text_tensors import text_tensors
from adaplex.adapters.formats.vocabulary_copies import VocabularyCopies
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import recorded_quantization
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram

ADAPTERHUB = "ADAPTERHUB"
"""Kind of a config without `peft_type` but with the `config` object of AdapterHub's library."""
WHOLE = (ADAPTERHUB, "HYBRID")
"""Kinds whose checkpoints have no copies of the base's weights, or in their parts only."""


def _lower_part(checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> AdapterProgram:
    return lower(checkpoint, base, limits)


FORMATS: Mapping[str, Format] = {
    "LORA": Lora(),
    "ADALORA": AdaLora(),
    ADAPTERHUB: AdapterHub(),
    "BEFT": Beft(),
    "BITFIT": BitFit(),
    "CPT": PromptTuning("cpt", "CPT"),
    "HYBRID": Bundle(_lower_part),
    "IA3": IA3(),
    "LN_TUNING": LNTuning(),
    "LOHA": Loha(),
    "LOKR": Lokr(),
    "MULTITASK_PROMPT_TUNING": MultitaskPromptTuning(),
    "CARTRIDGE": PrefixTuning("cartridge", "cartridges", ["num_frozen_tokens"]),
    "PREFIX_TUNING": PrefixTuning("prefix-tuning", "prefix tuning", ["prefix_projection"]),
    "PROMPT_TUNING": PromptTuning("prompt-tuning", "prompt tuning"),
    "P_TUNING": PromptTuning("p-tuning", "P-tuning"),
    "VERA": Vera(),
    "TRAINABLE_TOKENS": TrainableTokens(),
    **MERGED_ONLY,
}
"""Format by kind: PEFT's `peft_type`, or ADAPTERHUB, BITFIT or HYBRID, which PEFT does not have."""

NEEDS: Mapping[str, str] = {
    "ADAMSS": "the clusters of the base's weights that it was trained on, which it does not save",
    "ADAPTION_PROMPT": "gated attention over learned prompts",
    "BONE": "to be saved again by PEFT 0.21, which calls it MISS",
    "FROD": "a decomposition of the base's weights over all layers at once",
    "LILY": "a router between low-rank pairs",
    "POLY": "a router between low-rank pairs",
    "SHADOW": "a second, smaller network beside the base's layers",
    "XLORA": "a router between low-rank pairs",
}
"""Feature that each unsupported `peft_type` would need."""


def lower(checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> AdapterProgram:
    """Lowers a checkpoint to primitives.

    Raises AdapterInvalid with every refusal, or AdapterTooLarge.
    """
    kind = kind_of(checkpoint.config)
    found = FORMATS.get(kind) if isinstance(kind, str) else None
    if found is None:
        need = f"; it needs {NEEDS[kind]}" if isinstance(kind, str) and kind in NEEDS else ""
        raise AdapterInvalid.because(
            "peft_type", f"{kind!r:.80} is not served; served are {', '.join(FORMATS)}{need}"
        )
    if refusals := list(_integer_tensors(checkpoint, found)):
        raise AdapterInvalid(refusals)
    if kind in WHOLE:
        lowered = found.lower(checkpoint, base, limits)
    else:
        text, idle = text_tensors(checkpoint, base)
        copies = VocabularyCopies.of(text, base, limits)
        lowered = copies.applied(found.lower(copies.checkpoint, copies.base, limits))
        lowered = replace(lowered, notes=(*lowered.notes, *idle))
    digest = identity(checkpoint)
    if digest is None:
        assert lowered.semantics is not None
        read = Checkpoint(lowered.semantics, checkpoint.tensors)
        digest = content_digest(read, lowered.semantics)
    program = AdapterProgram(
        digest,
        lowered.family or found.family,
        lowered.modules,
        (*lowered.notes, *recorded_quantization(checkpoint.config)),
        lowered.warnings,
        lowered.invocation,
    )
    if refusals := list(_overflows(program)):
        raise AdapterInvalid(refusals)
    return program


def identity(checkpoint: Checkpoint) -> str | None:
    """Returns the digest of a checkpoint of a known family; None if only lowering determines it."""
    fields = FORMATS[kind_of(checkpoint.config)].semantic_fields
    return None if fields is None else content_digest(checkpoint, fields)


def kind_of(config: Mapping[str, Any]) -> Any:
    """Returns the config's kind: a key of FORMATS, unless the family is unknown."""
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        return ADAPTERHUB
    return config.get("peft_type")


def _integer_tensors(checkpoint: Checkpoint, found: Format) -> Iterator[Refusal]:
    """Yields refusals of integer tensors, which only merged-only types and bundles may have."""
    for name, tensor in sorted(checkpoint.tensors.items()):
        if not tensor.is_floating_point() and not isinstance(found, MergedOnly | Bundle):
            reason = f"has dtype {tensor.dtype}; weights of {found.family} must be floating-point"
            yield Refusal(name, reason)


def _overflows(program: AdapterProgram) -> Iterator[Refusal]:
    """Yields refusals of tensors that overflow bf16 once scaled: NaN would spread to other rows."""
    for module in program.modules:
        for role, tensor in module.tensors():
            if not bool(torch.isfinite(tensor.to(torch.bfloat16)).all()):
                reason = f"its {role}, scaled by {module.scale:g}, overflows bf16"
                yield Refusal(module.module, reason)
