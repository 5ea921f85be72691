"""Llama: what the hand-written decoder needs of a llama-shaped model.

The shape is read off the modules, not off a list of names: llama, mistral, qwen2, qwen3 and smollm
have it, and so has whatever is built of the same parts and settings. Whether the parts are also put
together in the same way is found out by running both (`native_forward.py`), but a short prompt does
not show everything: hence a setting that is not known is taken for another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaplex.model.linear.native import NativeLinear
from adaplex.model.modules.attention import HOOK
from adaplex.model.modules.hooks import AdaptedLinear

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
NAMED = (
    *(*LINEARS, "input_layernorm", "post_attention_layernorm", "self_attn", "mlp"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)
"""What adapters may touch of a layer, in the order of the C decoder; not all have the last two."""
PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})

ATTENTION_SETTINGS = frozenset(
    {
        *("attention_dropout", "config", "head_dim", "is_causal", "layer_idx", "layer_type"),
        *("num_attention_heads", "num_key_value_groups", "num_key_value_heads"),
        *("residual_dropout", "scaling", "sliding_window", "training", HOOK),
    }
)
"""Not among them: `use_rope` of smollm3, whose every fourth layer knows no positions."""
ROPE_SETTINGS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor"),
    }
)
"""Not among them: `llama_4_scaling_beta` of ministral3, which scales queries of far positions."""


class NotLlama(Exception):
    """The model has another shape; says which part."""


@dataclass(frozen=True)
class LlamaLayer:
    """One layer; norms are fp32 [features]."""

    linears: tuple[NativeLinear, ...]
    """q, k, v, o, gate, up, down."""
    names: tuple[str, ...]
    """Of what is NAMED."""
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
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scale: float


@torch.inference_mode()
def llama_of(model: Any, *, positions: int, windows: Mapping[int, int]) -> Llama:
    """Reads a loaded and adapted model; tables of rotations cover `positions`; `windows` has
    the visible keys of each layer, 0 for all. Raises NotLlama.
    """
    try:
        return _read(model, positions, windows)
    except AttributeError as error:
        raise NotLlama(str(error)) from error


def _read(model: Any, positions: int, windows: Mapping[int, int]) -> Llama:
    inner, config = model.model, model.config
    _need(
        {name for name, _ in inner.named_children()},
        {"embed_tokens", "layers", "norm", "rotary_emb"},
    )
    layers = tuple(
        _layer(f"model.layers.{i}", layer, windows[i]) for i, layer in enumerate(inner.layers)
    )
    attention = inner.layers[0].self_attn
    head_dim = int(attention.head_dim)
    if head_dim % 16:
        raise NotLlama(f"heads of {head_dim} dimensions")
    where = torch.arange(positions)[None]
    cosines, sines = inner.rotary_emb(torch.zeros(1, dtype=torch.float32), where)
    if cosines.shape[-1] != head_dim or inner.rotary_emb.rope_type in ("dynamic", "longrope"):
        raise NotLlama("another rotary embedding")
    _know(config.rope_parameters, ROPE_SETTINGS)
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
    _need({child for child, _ in layer.named_children()}, PARTS)
    attention = layer.self_attn
    extra = {child for child, _ in attention.named_children()} - ATTENTION_PARTS
    if extra:
        raise NotLlama(f"attention with {', '.join(sorted(extra))}")
    _know((name for name in vars(attention) if not name.startswith("_")), ATTENTION_SETTINGS)
    if (
        not isinstance(layer.mlp.act_fn, nn.SiLU)
        and type(layer.mlp.act_fn).__name__ != "SiLUActivation"
    ):
        raise NotLlama(f"activation {type(layer.mlp.act_fn).__name__}")
    head_norms = [
        _norm(attention.get_submodule(part)) if hasattr(attention, part) else None
        for part in ("q_norm", "k_norm")
    ]
    return LlamaLayer(
        linears=tuple(_native(layer.get_submodule(part)) for part in LINEARS),
        names=tuple(f"{name}.{part}" for part in NAMED),
        attention_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        q_norm=head_norms[0],
        k_norm=head_norms[1],
        window=window,
    )


def _need(found: set[str], wanted: set[str] | frozenset[str]) -> None:
    if found != wanted:
        raise NotLlama(f"parts {', '.join(sorted(found ^ wanted))}")


def _know(found: Iterable[str], known: frozenset[str]) -> None:
    if unknown := set(found) - known:
        raise NotLlama(f"settings {', '.join(sorted(unknown))}")


def _norm(norm: Any) -> Tensor:
    """fp32 weight of an RMSNorm."""
    if getattr(norm, "bias", None) is not None or not hasattr(norm, "variance_epsilon"):
        raise NotLlama(f"norm {type(norm).__name__}")
    weight: Tensor = norm.weight.detach().float().contiguous()
    return weight


def _native(module: Any) -> NativeLinear:
    if not isinstance(module, AdaptedLinear) or not isinstance(module.backend, NativeLinear):
        raise NotLlama("a linear without panels")
    return module.backend
