"""LoRA, DoRA and (IA)^3 of AdapterHub (`LoRAConfig`).

In the library's own llama and mistral, `intermediate_lora` is the down projection and `output_lora`
the up projection; in models that it adapts through an interface, such as qwen2, it is the reverse.
Source: `adapters.methods.lora` and `adapters.models`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.adapterhub.method_config import LoweredMethod, MethodConfig
from adaplex.adapters.formats.lowering_context import is_number, is_rank
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

USED = (
    "selfattn_lora",
    "intermediate_lora",
    "output_lora",
    "attn_matrices",
    "leave_out",
    "r",
    "alpha",
    "composition_mode",
    "use_dora",
)
"""Fields that change the answer."""
HARMLESS = ("architecture", "dropout", "init_weights", "init_weights_seed", "dtype")
"""Fields that do not change the answer."""
UNSUPPORTED = {
    "use_gating": "gates average over the whole prompt, which chunks and decode steps do not have",
    "vera_b": "VeRA is served in PEFT's format",
    "vera_d": "VeRA is served in PEFT's format",
}
"""Fields that change the answer but are not served, and why."""
OWN = {"intermediate_lora": "mlp.down_proj", "output_lora": "mlp.up_proj"}
INTERFACE = {"intermediate_lora": "mlp.up_proj", "output_lora": "mlp.down_proj"}
PROJECTIONS = {"llama": OWN, "mistral": OWN, "qwen2": INTERFACE, "qwen3": INTERFACE}
"""Model type -> field -> projection."""
SCALED_SINCE = (1, 1)
"""First version of the library that applies alpha / r; earlier ones train with scale 1."""


def lower_lora(method: MethodConfig) -> LoweredMethod:
    """Lowers a `LoRAConfig`; refusals are added to the method's context."""
    context = method.context
    context.check_fields("AdapterHub's LoRA", USED, HARMLESS, UNSUPPORTED)
    method.check_flags("selfattn_lora", "intermediate_lora", "output_lora", "use_dora")
    mode = method.field("composition_mode", "add")
    context.check_kind("composition_mode", mode in ("add", "scale"), "add or scale")
    rank, alpha = method.field("r", 8), method.field("alpha", 8)
    dora = method.field("use_dora", False)
    context.check_kind("alpha", is_number(alpha), "a positive number")
    if context.check_kind("r", is_rank(rank), "a positive integer") and mode == "scale":
        context.check_kind("r", rank == 1 and not dora, "1, without use_dora, for scale")
    projections = list(_projections(method))
    layers = method.used_layers()
    if context.refusals:
        return LoweredMethod("lora", (), {})
    if rank > context.limits.max_rank:
        raise AdapterTooLarge(
            f"r is {rank}, the limit is {context.limits.max_rank}", field="config.r"
        )
    scale = 1.0 if method.version < SCALED_SINCE else alpha / rank
    lower = _lower_scale if mode == "scale" else _lower_pair
    made = [lower(method, f"layers.{i}.{name}", scale) for i in layers for name in projections]
    family = "ia3" if mode == "scale" else "dora" if dora else "lora"
    modules = tuple(module for module in made if module is not None)
    return LoweredMethod(family, modules, {"method": family, "scale": scale})


def _projections(method: MethodConfig) -> Iterator[str]:
    """Yields the names of a layer's linears that the config adapts."""
    matrices = method.field("attn_matrices", ["q", "v"])
    fits = isinstance(matrices, list) and all(name in ("q", "k", "v") for name in matrices)
    if method.context.check_kind("attn_matrices", fits, "a list of q, k and v") and method.field(
        "selfattn_lora", True
    ):
        yield from (f"self_attn.{name}_proj" for name in dict.fromkeys(matrices))
    for field, name in PROJECTIONS[method.model_type].items():
        if method.field(field, False):
            yield name


def _lower_pair(method: MethodConfig, place: str, scale: float) -> ModuleProgram | None:
    """Returns a low-rank pair; with DoRA, the pair and the base's output are scaled to the learned
    magnitude. The library computes the norm of W + B A without the scale, and scales the bias too.
    """
    name, rank = f"model.{place}", method.field("r", 8)
    module = method.module(name)
    if module is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A": (rank, module.in_features),
        "lora_B": (module.out_features, rank),
    }
    if method.field("use_dora", False):
        shapes["m.weight"] = (module.out_features, 1)
    found = method.pop_tensors(place, shapes)
    if found is None:
        return None
    a, b = found["lora_A"], found["lora_B"].float()
    if "m.weight" not in found:
        return ModuleProgram(name, LowRank(a, b * scale), scale=scale)
    weight = method.context.base_weight(module, "DoRA")
    if weight is None:
        return None
    norm = torch.linalg.norm(weight + b @ a.float(), dim=1)
    gain: Tensor = found["m.weight"].float().flatten() / norm
    pair = LowRank(a, b * scale * gain[:, None])
    return ModuleProgram(name, pair, scale=scale, output_scale=gain)


def _lower_scale(method: MethodConfig, place: str, scale: float) -> ModuleProgram | None:
    """Returns an output scale."""
    name = f"model.{place}"
    module = method.module(name)
    found = module and method.pop_tensors(place, {"lora_B": (module.out_features, 1)})
    if not found:
        return None
    return ModuleProgram(name, output_scale=found["lora_B"].float().flatten() * scale)
