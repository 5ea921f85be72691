"""Prefix tuning of AdapterHub (`PrefixTuningConfig`), for the library's own llama and mistral.

The library counts the prompt's positions from 0 and does not rotate the prefix's keys. Here the
prompt follows the prefix, so keys are rotated to the prompt's first position, which gives equal
scores. The library cannot write prefixes as safetensors, because layers share them: a converted
file may contain the layers' copies or omit them. Source: `adapters.methods.prefix_tuning`.
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
"""Fields that change the answer."""
HARMLESS = (
    "architecture",
    "dropout",
    "init_weights_seed",
    "shared_gating",
    "encoder_prefix",  # decoders have no encoder
    "cross_prefix",  # nor cross-attention
)
"""Fields that do not change the answer."""
UNSUPPORTED = {
    "use_gating": "gates average over the whole prompt, which chunks and decode steps do not have"
}
"""Fields that change the answer but are not served, and why."""
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": torch.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""Activation by the value of `non_linearity`, in lower case."""
PLACE, FLAT = "prefix_tuning", "self_prefix.control_trans"
"""Place of the shared tensors, and name of the only one if `flat` is set."""
OWN = ("llama", "mistral")
"""Model types that the library implements itself; only these have prefixes."""


def lower_prefix(method: MethodConfig) -> LoweredMethod:
    """Lowers the keys and values of every layer; refusals are added to the method's context."""
    context, base = method.context, method.context.base
    context.check_fields("AdapterHub's prefix tuning", USED, HARMLESS, UNSUPPORTED)
    method.check_flags("flat")
    for name, default in (("prefix_length", 30), ("bottleneck_size", 512)):
        context.check_kind(name, is_rank(method.field(name, default)), "a positive integer")
    activation = method.field("non_linearity", "tanh")
    fits = isinstance(activation, str) and activation.lower() in FUNCTIONS
    context.check_kind("non_linearity", fits, f"one of {', '.join(FUNCTIONS)}")
    if method.used_layers() != method.layers:
        context.refuse("leave_out", "must be empty: every layer needs the prefix's positions")
    shapes = set(base.kv_shapes)
    heads, keys, values = next(iter(shapes), (0, 0, 0))
    rotates = base.rotary is not None and 2 * len(base.rotary) == keys == values
    if len(shapes) != 1 or not rotates or method.model_type not in OWN:
        context.refuse(
            "prefix_length",
            f"needs a base of type {' or '.join(OWN)} with rotary keys of one shape in all layers",
        )
    if context.refusals:
        return LoweredMethod("prefix-tuning", (), {})
    states = _states(method, 2 * len(method.layers) * heads * keys)
    if states is None:
        return LoweredMethod("prefix-tuning", (), {})
    by_layer = states.view(len(states), len(method.layers), 2, heads, keys)
    modules = tuple(
        ModuleProgram(
            f"model.layers.{layer}.self_attn",
            prefix=KVPrefix(_rotated(method, by_layer[:, layer, 0]), by_layer[:, layer, 1]),
        )
        for layer in method.layers
    )
    return LoweredMethod("prefix-tuning", modules, {"method": "prefix", "activation": activation})


def _states(method: MethodConfig, size: int) -> Tensor | None:
    """Returns the keys and values of all layers, fp32 [tokens, size], layer by layer, keys before
    values; None, with refusals, if the tensors do not fit.
    """
    tokens, inner = method.field("prefix_length", 30), method.field("bottleneck_size", 512)
    _drop_copies(method)
    if method.field("flat", False):
        found = method.pop_tensors(PLACE, {FLAT: (tokens * size,)})
        return None if found is None else found[FLAT].float().view(tokens, size)
    embedding = method.places.get(PLACE, {}).get("self_prefix.wte.weight")
    hidden = 0 if embedding is None else embedding.shape[-1]
    names = ["wte.weight", *(f"control_trans.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))]
    shapes = [(tokens, hidden), (inner, hidden), (inner,), (size, inner), (size,)]
    found = method.pop_tensors(
        PLACE, dict(zip((f"self_prefix.{n}" for n in names), shapes, strict=True))
    )
    if found is None:
        return None
    x, first, first_bias, second, second_bias = (found[f"self_prefix.{n}"].float() for n in names)
    activate = FUNCTIONS[method.field("non_linearity", "tanh").lower()]
    return functional.linear(activate(functional.linear(x, first, first_bias)), second, second_bias)


def _drop_copies(method: MethodConfig) -> None:
    """Removes the layers' copies of the shared tensors; refuses copies that differ from them."""
    shared = method.places.get(PLACE, {})
    for layer in method.layers:
        place = f"layers.{layer}.self_attn.prefix_tuning.pool"
        for name, tensor in method.places.pop(place, {}).items():
            if name not in shared or not torch.equal(tensor, shared[name]):
                reason = f"differs from {PLACE}.{name}, which the layers share"
                method.context.refuse(f"{place}.{name}", reason)


def _rotated(method: MethodConfig, keys: Tensor) -> Tensor:
    """Returns keys [tokens, heads, features] rotated to the position of the first prompt token."""
    rotary = method.context.base.rotary
    assert rotary is not None
    angles = (rotary * len(keys)).repeat(2)
    half = keys.shape[-1] // 2
    across = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
    return keys * angles.cos() + across * angles.sin()
