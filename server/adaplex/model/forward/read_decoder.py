"""Reads the shape of a loaded base for the C decoder.

The shape is read off the modules, not off a list of models: llama, mistral, qwen2, qwen3, smollm,
gemma2, gemma3, phi3 and gpt2 have one of those that are known, and so has every model of the same
parts and settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaplex.model.adapters.torch_rows import table_scale
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.forward.decoder_shape import DecoderShape, OtherShape
from adaplex.model.forward.read_layer import LayerReader
from adaplex.model.forward.read_parts import (
    first_found,
    parts_of,
    read_linear,
    read_norm,
    require_no_more,
)
from adaplex.model.forward.read_rotary import RotaryReader
from adaplex.model.kernels.paged_kv import AttentionOptions
from adaplex.model.kv_cache import LayerShape

LAYERS = (("layers",), ("h",))
FINAL_NORMS = (("norm",), ("ln_f",))
ROTARY, POSITIONS = "rotary_emb", "wpe"
"""Optional parts: the rotary embedding, and a table of embeddings of positions."""


@torch.inference_mode()
def read_decoder(
    model: Any,
    shapes: Sequence[LayerShape],
    options: Mapping[int, AttentionOptions],
    *,
    positions: int,
) -> DecoderShape:
    """Reads the parts of a loaded base. `shapes` are those of its KV cache, `options` those of the
    attention of each layer; tables cover at most `positions`. Raises OtherShape.
    """
    try:
        return _read(model, shapes, options, positions)
    except AttributeError as error:
        raise OtherShape(str(error)) from error


def _read(
    model: Any,
    shapes: Sequence[LayerShape],
    options: Mapping[int, AttentionOptions],
    positions: int,
) -> DecoderShape:
    prefix, inner = model.base_model_prefix, model.base_model
    parts, table = parts_of(inner), model.get_input_embeddings()
    (layers,) = first_found(parts, LAYERS, "layers")
    (final,) = first_found(parts, FINAL_NORMS, "last norm")
    embedding = next((name for name in parts if getattr(inner, name) is table), "")
    require_no_more(parts, {embedding, layers, final, ROTARY, POSITIONS}, "a decoder")
    places = getattr(inner, POSITIONS).weight.detach() if POSITIONS in parts else None
    if places is not None:
        positions = min(positions, places.shape[0])
    hidden, shape = table.weight.shape[1], _common_shape(shapes)
    rope = getattr(model.config, "rope_parameters", None) or {}
    rotary = RotaryReader(getattr(inner, ROTARY, None), rope, positions=positions)
    reader = LayerReader(hidden, shape.kv_heads, shape.key_dim, rotary)
    read = tuple(
        reader.read(f"{prefix}.{layers}.{i}", layer, options[i])
        for i, layer in enumerate(getattr(inner, layers))
    )
    if len({layer.kind for layer in read}) != 1:
        raise OtherShape("layers that differ in width, rotated dimensions or activation")
    scale = table_scale(table, table.weight)
    return DecoderShape(
        embedding_name=f"{prefix}.{embedding}",
        embedding=table.weight.detach().contiguous(),
        embedding_scale=1.0 if scale is None else float(scale),
        position_embedding=None if places is None else places.contiguous(),
        layers=read,
        final_norm=read_norm(f"{prefix}.{final}", getattr(inner, final), hidden),
        head=read_linear(model.get_output_embeddings(), *table.weight.shape),
        logit_softcap=float(getattr(model.config, "final_logit_softcapping", None) or 0),
        kv_heads=shape.kv_heads,
        head_dim=shape.key_dim,
        positions=positions,
    )


def _common_shape(shapes: Sequence[LayerShape]) -> LayerShape:
    """Returns the shape of the keys and values of all layers. Raises OtherShape."""
    shape = shapes[0]
    if len(set(shapes)) != 1 or shape.key_dim != shape.value_dim:
        raise OtherShape("keys and values of several sizes")
    if shape.key_dim % PANEL_COLUMNS:
        raise OtherShape(f"heads of {shape.key_dim} dimensions, no multiple of {PANEL_COLUMNS}")
    return shape
