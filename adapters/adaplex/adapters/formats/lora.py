"""LoRA as HF PEFT 0.21 writes it: y += B(Ax) * scale, any rank a module, optional biases.

The tensor keys are the truth. Every tensor and every config field is accounted for, or the
adapter is refused with all the reasons at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, Refusal
from adaplex.adapters.formats.targets import Patterns, pattern_value, targeted
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import BaseModule, BaseSpec, LowRank, ModuleProgram

PREFIX = "base_model.model."
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
BIAS = re.compile(r"(?P<module>.+?)(\.base_layer)?\.bias")

USED = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
    ]
)
HARMLESS = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "base_model_fingerprint",
        "revision",
        "inference_mode",
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
UNSET: tuple[object, ...] = (None, False, "", [], {})
"""Values by which a config says that it does not use a field."""
BIASES = ("none", "all", "lora_only")
MAX_NUMBER = 1e9
"""Of ranks and alphas."""


@dataclass
class _Module:
    """The tensors found for one module."""

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class _Reading:
    """One checkpoint on its way to primitives; collects refusals as it goes."""

    checkpoint: Checkpoint
    base: BaseSpec
    refusals: list[Refusal] = field(default_factory=list)
    patterns: Patterns = field(default_factory=Patterns)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    def refuse(self, where: str, reason: str) -> None:
        self.refusals.append(Refusal(where, reason))


class Lora:
    """The format; see the module's docstring."""

    family = "lora"
    semantic_fields = USED

    def lower(
        self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits
    ) -> tuple[tuple[ModuleProgram, ...], tuple[str, ...]]:
        """See Format."""
        reading = _Reading(checkpoint, base)
        _check_known(reading)
        if not _check_used(reading):
            raise AdapterInvalid(reading.refusals)
        found = _sort_tensors(reading)
        lowered: list[ModuleProgram | None] = []
        try:
            _check_targets(reading, found)
            lowered = [_lower_module(reading, name, found[name]) for name in sorted(found)]
        except AdapterInvalid as error:  # a bad pattern ends the search, and joins the list
            reading.refusals.extend(error.refusals)
        if reading.refusals:
            raise AdapterInvalid(reading.refusals)
        programs = [program for program in lowered if program is not None]
        _check_ranks(programs, limits)
        return tuple(programs), tuple(_notes(reading))


def _check_known(reading: _Reading) -> None:
    """Refuses fields that are unknown, or ask for what is not served."""
    for name, value in sorted(reading.config.items()):
        if name in UNSUPPORTED and value not in UNSET:
            reading.refuse(name, UNSUPPORTED[name])
        elif name not in USED | HARMLESS | UNSUPPORTED.keys() and value not in UNSET:
            reading.refuse(name, "is not a field of LoRA that this server knows")
    init = reading.config.get("init_lora_weights")
    if init not in (None, False, True, *PLAIN_INITS):
        reading.refuse(
            "init_lora_weights",
            f"{init!r:.40} changes the base weights; convert the adapter to plain LoRA first",
        )


def _check_used(reading: _Reading) -> bool:
    """Refuses fields of the wrong kind. Whether the fields can be used."""
    config, before = reading.config, len(reading.refusals)
    if not _is_rank(config.get("r")):
        reading.refuse("r", "must be a positive integer")
    if not _is_number(config.get("lora_alpha")):
        reading.refuse("lora_alpha", "must be a positive number")
    if not isinstance(config.get("use_rslora") or False, bool):
        reading.refuse("use_rslora", "must be true or false")
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            kind = "integers" if fits is _is_rank else "numbers"
            reading.refuse(name, f"must map patterns to positive {kind}")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if not _is_names(config.get(name)):
            reading.refuse(name, "must be a string or a list of strings")
    if not config.get("target_modules"):
        reading.refuse("target_modules", "is missing")
    layers = config.get("layers_to_transform")
    indices = layers if isinstance(layers, list) else [0 if layers is None else layers]
    if not all(type(index) is int and index >= 0 for index in indices):
        reading.refuse("layers_to_transform", "must be a layer index or a list of them")
    elif layers not in (None, []) and isinstance(config.get("target_modules"), str):
        reading.refuse("layers_to_transform", "needs target_modules to be a list")
    if config.get("bias", "none") not in BIASES:
        reading.refuse("bias", f"must be one of {', '.join(BIASES)}")
    return len(reading.refusals) == before


def _sort_tensors(reading: _Reading) -> dict[str, _Module]:
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


def _check_targets(reading: _Reading, found: Mapping[str, _Module]) -> None:
    """The config's targets and the tensors must name the same modules of the base."""
    modules = reading.base.modules
    targets = targeted(reading.config, modules.values(), reading.patterns)
    pairs = {name for name, module in found.items() if module.a is not None or module.b is not None}
    for name in sorted(found.keys() - modules.keys()):
        reading.refuse(name, f"the base {reading.base.name} has no such module")
    for name in sorted(pairs & modules.keys() - targets):
        reading.refuse(name, "has tensors, but target_modules does not name it")
    for name in sorted(targets - pairs):
        reading.refuse(name, "is named by target_modules, but has no tensors")
    if not targets:
        reading.refuse("target_modules", f"matches no module of the base {reading.base.name}")
    for name in sorted(found.keys() & modules.keys()):
        if found[name].bias is not None:
            _check_bias(reading, name, name in targets)


def _check_bias(reading: _Reading, name: str, is_target: bool) -> None:
    """The config says which modules may carry a bias."""
    kind = reading.config.get("bias", "none")
    if kind == "none" or (kind == "lora_only" and not is_target):
        reading.refuse(f"{name}.bias", f"is there, but bias is {kind!r}")


def _lower_module(reading: _Reading, name: str, tensors: _Module) -> ModuleProgram | None:
    """The primitives of one module; None, with refusals, when its tensors do not fit."""
    module = reading.base.modules.get(name)
    if module is None:
        return None
    bias = None if tensors.bias is None else _lower_bias(reading, module, tensors.bias)
    if tensors.a is None and tensors.b is None:
        return None if bias is None else ModuleProgram(name, bias=bias)
    if tensors.a is None or tensors.b is None:
        missing = "A" if tensors.a is None else "B"
        reading.refuse(f"{PREFIX}{name}.lora_{missing}.weight", "half of a pair is missing")
        return None
    config, patterns = reading.config, reading.patterns
    rank = pattern_value(config, "rank_pattern", name, config["r"], patterns)
    expected = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
    shapes = {"A": tuple(tensors.a.shape), "B": tuple(tensors.b.shape)}
    for half, shape in shapes.items():
        if shape != expected[half]:
            reading.refuse(
                f"{PREFIX}{name}.lora_{half}.weight",
                f"has shape {list(shape)}, expected {list(expected[half])}",
            )
    if shapes != expected:
        return None
    scale = _scale(reading, name, rank)
    return ModuleProgram(name, LowRank(tensors.a, tensors.b.float() * scale), bias, scale)


def _check_ranks(programs: Sequence[ModuleProgram], limits: AdapterLimits) -> None:
    """Raises AdapterTooLarge for the first rank beyond the limit."""
    for program in programs:
        if program.low_rank is not None and program.low_rank.rank > limits.max_rank:
            raise AdapterTooLarge(
                f"{program.module} has rank {program.low_rank.rank}, the limit is "
                f"{limits.max_rank}",
                field="r",
            )


def _scale(reading: _Reading, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; alpha may differ by module."""
    config = reading.config
    alpha = pattern_value(config, "alpha_pattern", name, config["lora_alpha"], reading.patterns)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lower_bias(reading: _Reading, module: BaseModule, bias: Tensor) -> Tensor | None:
    """PEFT stores the trained bias itself; the primitive is its difference from the base's."""
    base = reading.base.biases.get(module.name)
    if base is None:
        reading.refuse(f"{module.name}.bias", "the base has no bias there")
        return None
    if bias.shape != base.shape:
        reading.refuse(
            f"{module.name}.bias", f"has shape {list(bias.shape)}, expected {list(base.shape)}"
        )
        return None
    return bias.float() - base


def _notes(reading: _Reading) -> list[str]:
    """What a user may want to know and nobody needs to mend."""
    notes = []
    if reading.config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out: weights are kept as [out, in] here, nothing to transpose")
    return notes


def _is_number(value: object) -> bool:
    """A positive number of sensible size that is not a bool."""
    return type(value) in (int, float) and 0 < value < MAX_NUMBER  # type: ignore[operator]


def _is_rank(value: object) -> bool:
    """A positive number that is whole."""
    return type(value) is int and _is_number(value)


def _is_names(value: object) -> bool:
    """None, a string, or a list of strings."""
    if isinstance(value, list):
        return all(isinstance(entry, str) for entry in value)
    return value is None or isinstance(value, str)
