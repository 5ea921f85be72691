"""Checks of a LoRA config: known fields, their kinds, and fields that exclude each other."""

from __future__ import annotations

from adaplex.adapters.formats.lowering_context import (
    COMMON_FIELDS,
    TARGET_FIELDS,
    UNSET,
    LoweringContext,
    is_names,
    is_number,
    is_rank,
)

USED = TARGET_FIELDS | frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "use_dora",
        "use_qalora",
        "alora_invocation_tokens",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
    ]
)
"""Config fields that change the answer; they enter the digest."""
HARMLESS = COMMON_FIELDS | frozenset(
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
        "qalora_group_size",  # also determined by the shapes of the tensors
        "group_size",
    ]
)
"""Config fields that change training, or how PEFT stores weights, but not the answer."""
UNSUPPORTED = {
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "replicated layers need a deeper base",
    "megatron_config": "Megatron's parallel layers are not served",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "needs block-diagonal pairs",
    "velora_config": "VeLoRA is not served",
}
"""Config fields that change the answer but are not served, and what serving them would need."""
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Initialisers that do not change the base's weights."""
BIASES = ("none", "all", "lora_only")
FLAGS = ("use_rslora", "lora_bias", "use_dora", "use_qalora", "ensure_weight_tying")
CONFLICTS = (
    ("use_dora", ("lora_bias", "use_qalora", "alora_invocation_tokens", "target_parameters")),
    ("use_qalora", ("alora_invocation_tokens", "target_parameters")),
    ("lora_bias", ("target_parameters",)),
    ("alora_invocation_tokens", ("target_parameters",)),
)
"""Fields, and those that PEFT does not allow together with them."""
EVERYWHERE = ("modules_to_save", "trainable_token_indices", "bias")
"""Fields that PEFT applies to all tokens, even before the invocation of activated LoRA."""


def check_config(context: LoweringContext) -> bool:
    """Refuses fields that are unknown or of the wrong kind; True if lowering can go on to find
    further refusals.
    """
    context.check_fields("LoRA", USED, HARMLESS, UNSUPPORTED)
    _check_init(context)
    before = len(context.refusals)
    _check_numbers(context)
    _check_targets(context)
    for name in FLAGS:
        value = context.config.get(name) or False
        context.check_kind(name, isinstance(value, bool), "true or false")
    if context.config.get("bias", "none") not in BIASES:
        context.refuse("bias", f"must be one of {', '.join(BIASES)}")
    _check_invocation(context)
    _check_conflicts(context)
    return len(context.refusals) == before


def is_set(context: LoweringContext, name: str) -> bool:
    """True if the config uses the field."""
    return context.config.get(name) not in (*UNSET, "none")


def _check_init(context: LoweringContext) -> None:
    """Refuses initialisers that change the base's weights."""
    init = context.config.get("init_lora_weights")
    if init not in (None, False, True, *PLAIN_INITS):
        context.refuse(
            "init_lora_weights",
            f"{init!r:.40} changes the base weights; convert the adapter to plain LoRA first",
        )


def _check_numbers(context: LoweringContext) -> None:
    config = context.config
    context.check_kind("r", is_rank(config.get("r")), "a positive integer")
    context.check_kind("lora_alpha", is_number(config.get("lora_alpha")), "a positive number")
    context.check_patterns()


def _check_targets(context: LoweringContext) -> None:
    context.check_target_fields()
    context.check_modules_to_save()
    parameters = context.config.get("target_parameters")
    fits = not isinstance(parameters, str) and is_names(parameters)
    context.check_kind("target_parameters", fits, "a list of strings")
    if not context.config.get("target_modules") and not parameters:
        context.refuse("target_modules", "is missing")


def _check_invocation(context: LoweringContext) -> None:
    tokens = context.config.get("alora_invocation_tokens")
    if tokens is not None:
        context.check_tokens("alora_invocation_tokens", tokens)


def _check_conflicts(context: LoweringContext) -> None:
    """Refuses fields that PEFT does not allow together, or applies to other tokens than we do."""
    for name, others in CONFLICTS:
        for other in others:
            if is_set(context, name) and is_set(context, other):
                context.refuse(other, f"cannot be combined with {name}")
    if is_set(context, "alora_invocation_tokens"):
        for name in EVERYWHERE:
            if is_set(context, name):
                context.refuse(name, "changes tokens before the invocation of activated LoRA")
