"""LoRA as HF PEFT 0.21 writes it: y += B(Ax) * scale, any rank a module, optional biases.

The tensor keys are the truth. Every tensor and every config field is accounted for, or the
adapter is refused with all the reasons at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats import reading as shared
from adaplex.adapters.formats.lowered import Lowered
from adaplex.adapters.formats.reading import PREFIX, TARGETS, Reading, is_number, is_rank
from adaplex.adapters.formats.targets import pattern_value
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import BaseSpec, LowRank, ModuleProgram

PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
BIAS = re.compile(r"(?P<module>.+?)(\.base_layer)?\.bias")

USED = TARGETS | frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
    ]
)
HARMLESS = shared.HARMLESS | frozenset(
    [
        "lora_dropout",
        "fan_in_fan_out",
        "init_lora_weights",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
    ]
)
"""Known fields that change training, or how PEFT stores weights, but not the answer."""
UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA needs adapters that start in mid-prompt",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "replicated layers need a deeper base",
    "lora_bias": "biases of lora_B are not served",
    "megatron_config": "Megatron's parallel layers are not served",
    "modules_to_save": "needs replaced weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "needs low-rank deltas on expert parameters",
    "trainable_token_indices": "needs replaced embedding rows",
    "use_bdlora": "needs block-diagonal pairs",
    "use_dora": "DoRA needs the output-scale primitive",
    "use_qalora": "QA-LoRA needs its pooled input",
    "velora_config": "VeLoRA is not served",
}
"""Known fields that change the answer, and what serving them would need."""
UNSUPPORTED_TENSORS = {
    "lora_embedding_": "LoRA on embeddings is not served",
    "lora_magnitude_vector": "DoRA needs the output-scale primitive",
    "lora_B.bias": "biases of lora_B are not served",
    "lora_B.default.bias": "biases of lora_B are not served",
    "base_layer.weight": "copies a weight of the base, which PEFT would load over the base's own; "
    "save with save_embedding_layers=False",
    "modules_to_save": "needs replaced weights",
    "token_adapter": "needs replaced embedding rows",
}
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Initialisers that leave the base as it is."""
BIASES = ("none", "all", "lora_only")


@dataclass
class _Module:
    """The tensors found for one module."""

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None


class Lora:
    """The format; see the module's docstring."""

    family = "lora"
    semantic_fields = USED

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = Reading(checkpoint, base, limits)
        reading.check_known("LoRA", USED, HARMLESS, UNSUPPORTED)
        _check_init(reading)
        if not _check_used(reading):
            reading.raise_refused()
        found = _sort_tensors(reading)
        lowered: list[ModuleProgram | None] = []
        with reading.collecting():
            _check_targets(reading, found)
            lowered = [_lower_module(reading, name, found[name]) for name in sorted(found)]
        reading.raise_refused()
        programs = tuple(program for program in lowered if program is not None)
        reading.check_ranks(programs)
        return Lowered(programs, tuple(_notes(reading)))


def _check_init(reading: Reading) -> None:
    """Refuses initialisers that change the base."""
    init = reading.config.get("init_lora_weights")
    if init not in (None, False, True, *PLAIN_INITS):
        reading.refuse(
            "init_lora_weights",
            f"{init!r:.40} changes the base weights; convert the adapter to plain LoRA first",
        )


def _check_used(reading: Reading) -> bool:
    """Refuses fields of the wrong kind. Whether the fields can be used."""
    config, before = reading.config, len(reading.refusals)
    if not is_rank(config.get("r")):
        reading.refuse("r", "must be a positive integer")
    if not is_number(config.get("lora_alpha")):
        reading.refuse("lora_alpha", "must be a positive number")
    if not isinstance(config.get("use_rslora") or False, bool):
        reading.refuse("use_rslora", "must be true or false")
    for name, fits in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            kind = "integers" if fits is is_rank else "numbers"
            reading.refuse(name, f"must map patterns to positive {kind}")
    reading.check_target_fields()
    if not config.get("target_modules"):
        reading.refuse("target_modules", "is missing")
    if config.get("bias", "none") not in BIASES:
        reading.refuse("bias", f"must be one of {', '.join(BIASES)}")
    return len(reading.refusals) == before


def _sort_tensors(reading: Reading) -> dict[str, _Module]:
    """Module name -> its tensors; refuses tensors that fit no place."""
    found: dict[str, _Module] = {}
    for key, tensor in reading.checkpoint.tensors.items():
        name = key.removeprefix(PREFIX)
        unsupported = next((w for part, w in UNSUPPORTED_TENSORS.items() if part in name), None)
        if name == key:
            reading.refuse(key, f"does not begin with {PREFIX}")
        elif unsupported is not None:
            reading.refuse(key, unsupported)
        elif pair := PAIR.fullmatch(name):
            module = found.setdefault(pair["module"], _Module())
            attribute = pair["half"].lower()
            if getattr(module, attribute) is not None:
                reading.refuse(key, "is given twice")
            setattr(module, attribute, tensor)
        elif bias := BIAS.fullmatch(name):
            module = found.setdefault(bias["module"], _Module())
            if module.bias is not None:
                reading.refuse(key, "is given twice")
            module.bias = tensor
        else:
            reading.refuse(key, "is not a tensor of LoRA that this server knows")
    return found


def _check_targets(reading: Reading, found: Mapping[str, _Module]) -> None:
    """The config's targets and the tensors must name the same modules of the base."""
    modules, targets = reading.base.modules, reading.targets()
    pairs = {name for name, module in found.items() if module.a is not None or module.b is not None}
    for name in sorted(found.keys() - modules.keys() - pairs):
        reading.refuse(name, f"the base {reading.base.name} has no such module")
    reading.check_targets(pairs, targets)
    for name in sorted(found.keys() & modules.keys()):
        if found[name].bias is not None:
            _check_bias(reading, name, name in targets)


def _check_bias(reading: Reading, name: str, is_target: bool) -> None:
    """The config says which modules may carry a bias."""
    kind = reading.config.get("bias", "none")
    if kind == "none" or (kind == "lora_only" and not is_target):
        reading.refuse(f"{name}.bias", f"is there, but bias is {kind!r}")


def _lower_module(reading: Reading, name: str, tensors: _Module) -> ModuleProgram | None:
    """The primitives of one module; None, with refusals, when its tensors do not fit."""
    module = reading.base.modules.get(name)
    if module is None:
        return None
    bias = (
        None
        if tensors.bias is None
        else reading.bias_difference(module, f"{name}.bias", tensors.bias)
    )
    if tensors.a is None and tensors.b is None:
        return None if bias is None else ModuleProgram(name, bias=bias)
    if tensors.a is None or tensors.b is None:
        missing = "A" if tensors.a is None else "B"
        reading.refuse(f"{PREFIX}{name}.lora_{missing}.weight", "half of a pair is missing")
        return None
    config, patterns = reading.config, reading.patterns
    rank = pattern_value(config, "rank_pattern", name, config["r"], patterns)
    key = f"{PREFIX}{name}.lora_"
    fits = (
        reading.fits(f"{key}A.weight", tensors.a, rank, module.in_features),
        reading.fits(f"{key}B.weight", tensors.b, module.out_features, rank),
    )
    if not all(fits):
        return None
    scale = _scale(reading, name, rank)
    return ModuleProgram(name, LowRank(tensors.a, tensors.b.float() * scale), bias, scale)


def _scale(reading: Reading, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; alpha may differ by module."""
    config = reading.config
    alpha = pattern_value(config, "alpha_pattern", name, config["lora_alpha"], reading.patterns)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _notes(reading: Reading) -> list[str]:
    """What a user may want to know and nobody needs to mend."""
    notes = []
    if reading.config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out: weights are kept as [out, in] here, nothing to transpose")
    return notes
