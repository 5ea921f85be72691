"""Llama: the parts of a llama-shaped model that the hand-written decoder reads.

The shape is read off the modules, not off a list of names: llama, mistral, qwen2, qwen3 and smollm
have it, and so has every model of the same parts and settings. `native_forward.py` then runs both
to compare how the parts are put together, but a short prompt does not show everything: so an
unknown setting counts as another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.linear.native import NativeLinear
from adaplex.model.modules.attention import ATTEND_ATTRIBUTE
from adaplex.model.modules.hooks import AdaptedLinear

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linears of a layer, in the order of LayerLinears."""
ADAPTED_MODULES = (
    *LINEARS,
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn",
    "mlp",
    "self_attn.q_norm",
    "self_attn.k_norm",
)
"""Modules of a layer that adapters may touch, in the order of the C decoder; not every model has
the last two."""
PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})

ATTENTION_SETTINGS = frozenset(
    {
        "attention_dropout",
        "config",
        "head_dim",
        "is_causal",
        "layer_idx",
        "layer_type",
        "num_attention_heads",
        "num_key_value_groups",
        "num_key_value_heads",
        "residual_dropout",
        "scaling",
        "sliding_window",
        "training",
        ATTEND_ATTRIBUTE,
    }
)
"""Known attributes of attention. `use_rope` of smollm3 is not among them, on purpose: each fourth
layer of it has no positions."""
ROPE_SETTINGS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    }
)
"""Known rope parameters. `llama_4_scaling_beta` of ministral3 is not among them, on purpose: it
scales queries of far positions."""


class NotLlama(Exception):
    """The model has another shape; the message names the part."""


class LayerLinears(NamedTuple):
    """The linears of a layer."""

    q: NativeLinear
    k: NativeLinear
    v: NativeLinear
    o: NativeLinear
    gate: NativeLinear
    up: NativeLinear
    down: NativeLinear


@dataclass(frozen=True)
class LlamaLayer:
    """One layer; norms are fp32 [features]."""

    linears: LayerLinears
    names: tuple[str, ...]
    """Names of its ADAPTED_MODULES."""
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int
    """Visible keys; 0 for all."""


@dataclass(frozen=True)
class Llama:
    """The whole decoder."""

    embedding: Tensor
    """[vocabulary, hidden] in the compute dtype."""
    layers: tuple[LlamaLayer, ...]
    final_norm: Tensor
    head: NativeLinear
    embedding_name: str
    final_norm_name: str
    head_name: str
    cosines: Tensor
    """fp32 [positions, head_dim / 2]."""
    sines: Tensor
    """fp32 [positions, head_dim / 2]."""
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scale: float


@torch.inference_mode()
def read_llama(model: Any, *, positions: int, windows: Mapping[int, int]) -> Llama:
    """Reads the parts of a loaded base; tables of rotations cover `positions`; `windows` has the
    visible keys of each layer, 0 for all. Raises NotLlama.
    """
    try:
        return _read(model, positions, windows)
    except AttributeError as error:
        raise NotLlama(str(error)) from error


def _read(model: Any, positions: int, windows: Mapping[int, int]) -> Llama:
    inner, config = model.model, model.config
    _require_parts(
        {name for name, _ in inner.named_children()},
        {"embed_tokens", "layers", "norm", "rotary_emb"},
    )
    layers = tuple(
        _layer(f"model.layers.{i}", layer, windows[i]) for i, layer in enumerate(inner.layers)
    )
    attention = inner.layers[0].self_attn
    head_dim = int(attention.head_dim)
    if head_dim % PANEL_COLUMNS:
        raise NotLlama(f"heads of {head_dim} dimensions, no multiple of {PANEL_COLUMNS}")
    where = torch.arange(positions)[None]
    cosines, sines = inner.rotary_emb(torch.zeros(1, dtype=torch.float32), where)
    if cosines.shape[-1] != head_dim or inner.rotary_emb.rope_type in ("dynamic", "longrope"):
        raise NotLlama("another rotary embedding")
    _require_known(config.rope_parameters, ROPE_SETTINGS)
    norms = [inner.norm] + [
        n for x in inner.layers for n in (x.input_layernorm, x.post_attention_layernorm)
    ]
    if len({norm.variance_epsilon for norm in norms}) != 1:
        raise NotLlama("norms of different kinds")
    return Llama(
        embedding=inner.embed_tokens.weight.detach().contiguous(),
        layers=layers,
        final_norm=_norm(inner.norm),
        head=_native(model.lm_head),
        embedding_name="model.embed_tokens",
        final_norm_name="model.norm",
        head_name=model.lm_head.name,
        cosines=cosines[0, :, : head_dim // 2].float().contiguous(),
        sines=sines[0, :, : head_dim // 2].float().contiguous(),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        epsilon=float(inner.norm.variance_epsilon),
        scale=float(attention.scaling),
    )


def _layer(name: str, layer: Any, window: int) -> LlamaLayer:
    _require_parts({child for child, _ in layer.named_children()}, PARTS)
    attention = layer.self_attn
    extra = {child for child, _ in attention.named_children()} - ATTENTION_PARTS
    if extra:
        raise NotLlama(f"attention with {', '.join(sorted(extra))}")
    settings = (setting for setting in vars(attention) if not setting.startswith("_"))
    _require_known(settings, ATTENTION_SETTINGS)
    if (
        not isinstance(layer.mlp.act_fn, nn.SiLU)
        and type(layer.mlp.act_fn).__name__ != "SiLUActivation"
    ):
        raise NotLlama(f"activation {type(layer.mlp.act_fn).__name__}")
    q_norm, k_norm = (
        _norm(attention.get_submodule(part)) if hasattr(attention, part) else None
        for part in ("q_norm", "k_norm")
    )
    return LlamaLayer(
        linears=LayerLinears(*(_native(layer.get_submodule(part)) for part in LINEARS)),
        names=tuple(f"{name}.{part}" for part in ADAPTED_MODULES),
        attention_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        q_norm=q_norm,
        k_norm=k_norm,
        window=window,
    )


def _require_parts(found: set[str], wanted: set[str] | frozenset[str]) -> None:
    """Raises NotLlama for missing or further parts."""
    if found != wanted:
        raise NotLlama(f"parts {', '.join(sorted(found ^ wanted))}")


def _require_known(found: Iterable[str], known: frozenset[str]) -> None:
    """Raises NotLlama for unknown settings."""
    if unknown := set(found) - known:
        raise NotLlama(f"settings {', '.join(sorted(unknown))}")


def _norm(norm: Any) -> Tensor:
    """Returns the fp32 weight of an RMSNorm. Raises NotLlama for another norm."""
    if getattr(norm, "bias", None) is not None or not hasattr(norm, "variance_epsilon"):
        raise NotLlama(f"norm {type(norm).__name__}")
    weight: Tensor = norm.weight.detach().float().contiguous()
    return weight


def _native(module: Any) -> NativeLinear:
    """Returns the backend of a linear. Raises NotLlama for one without panels."""
    if not isinstance(module, AdaptedLinear) or not isinstance(module.backend, NativeLinear):
        raise NotLlama("a linear without panels")
    return module.backend
