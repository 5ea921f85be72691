"""Prefix tuning of AdapterHub (`PrefixTuningConfig`), which its own llama and mistral have.

The library counts the prompt's positions from 0 and does not turn the prefix's keys; here the
prompt comes behind the prefix, so the keys are turned to where it begins: scores are the same. It
cannot write prefixes as safetensors, since the layers share them: whoever converts its file may
keep the copies of the layers or leave them out. Source: `adapters.methods.prefix_tuning`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from adaplex.adapters.formats.adapterhub.method_config import LoweredMethod, MethodConfig
from adaplex.adapters.formats.lowering_context import is_rank
from adaplex.adapters.program.primitives import KVPrefix
from adaplex.adapters.program.program import ModuleProgram

USED = ("prefix_length", "flat", "bottleneck_size", "non_linearity", "leave_out")
HARMLESS = (
    *("architecture", "dropout", "init_weights_seed", "shared_gating"),
    *("encoder_prefix", "cross_prefix"),  # decoders have neither
)
UNSUPPORTED = {"use_gating": "gates average over the whole prompt, which a stream does not have"}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": torch.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
PLACE, FLAT = "prefix_tuning", "self_prefix.control_trans"
OWN = ("llama", "mistral")
"""The library's own models; the others have no prefixes."""


def lower_prefix(part: MethodConfig) -> LoweredMethod:
    """The keys and values of every layer; refusals go to the part's context."""
    context, base = part.context, part.context.base
    context.check_fields("AdapterHub's prefix tuning", USED, HARMLESS, UNSUPPORTED)
    part.check_flags("flat")
    for name, default in (("prefix_length", 30), ("bottleneck_size", 512)):
        context.check_kind(name, is_rank(part.field(name, default)), "a positive integer")
    activation = part.field("non_linearity", "tanh")
    fits = isinstance(activation, str) and activation.lower() in FUNCTIONS
    context.check_kind("non_linearity", fits, f"one of {', '.join(FUNCTIONS)}")
    if part.used_layers() != part.layers:
        context.refuse("leave_out", "leaves layers without the positions that others have")
    shapes = set(base.kv_shapes)
    heads, keys, values = next(iter(shapes), (0, 0, 0))
    turned = base.rotary is not None and 2 * len(base.rotary) == keys == values
    if len(shapes) != 1 or not turned or part.model_type not in OWN:
        context.refuse(
            "prefix_length", f"needs layers of one shape with rotary keys, of {' or '.join(OWN)}"
        )
    if context.refusals:
        return LoweredMethod("prefix-tuning", (), {})
    states = _states(part, 2 * len(part.layers) * heads * keys)
    if states is None:
        return LoweredMethod("prefix-tuning", (), {})
    by_layer = states.view(len(states), len(part.layers), 2, heads, keys)
    modules = tuple(
        ModuleProgram(
            f"model.layers.{layer}.self_attn",
            prefix=KVPrefix(_turned(part, by_layer[:, layer, 0]), by_layer[:, layer, 1]),
        )
        for layer in part.layers
    )
    return LoweredMethod("prefix-tuning", modules, {"method": "prefix", "activation": activation})


def _states(part: MethodConfig, size: int) -> Tensor | None:
    """fp32 [tokens, size]: all that the layers cache, layer by layer, keys before values."""
    tokens, inner = part.field("prefix_length", 30), part.field("bottleneck_size", 512)
    _drop_copies(part)
    if part.field("flat", False):
        found = part.take(PLACE, {FLAT: (tokens * size,)})
        return None if found is None else found[FLAT].float().view(tokens, size)
    embedding = part.places.get(PLACE, {}).get("self_prefix.wte.weight")
    hidden = 0 if embedding is None else embedding.shape[-1]
    names = ["wte.weight", *(f"control_trans.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))]
    shapes = [(tokens, hidden), (inner, hidden), (inner,), (size, inner), (size,)]
    found = part.take(PLACE, dict(zip((f"self_prefix.{n}" for n in names), shapes, strict=True)))
    if found is None:
        return None
    x, first, first_bias, second, second_bias = (found[f"self_prefix.{n}"].float() for n in names)
    activate = FUNCTIONS[part.field("non_linearity", "tanh").lower()]
    return functional.linear(activate(functional.linear(x, first, first_bias)), second, second_bias)


def _drop_copies(part: MethodConfig) -> None:
    """Takes the layers' copies out; refuses those that differ from the one that is used."""
    shared = part.places.get(PLACE, {})
    for layer in part.layers:
        place = f"layers.{layer}.self_attn.prefix_tuning.pool"
        for name, tensor in part.places.pop(place, {}).items():
            if name not in shared or not torch.equal(tensor, shared[name]):
                part.context.refuse(f"{place}.{name}", "differs from what the model shares")


def _turned(part: MethodConfig, keys: Tensor) -> Tensor:
    """Keys [tokens, heads, features] without a position -> as at that of the first prompt token."""
    rotary = part.context.base.rotary
    assert rotary is not None
    angles = (rotary * len(keys)).repeat(2)
    half = keys.shape[-1] // 2
    across = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
    return keys * angles.cos() + across * angles.sin()
