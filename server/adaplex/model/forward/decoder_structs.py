"""Structs of a DecoderShape, as the C kernels read them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.forward.decoder_shape import DecoderLayer, DecoderShape, Linear, Norm
from adaplex.model.kernels.native import structs
from adaplex.model.kv_cache import KVCache
from adaplex.model.weights.int8_head import Int8Head

NO_MODULE = -1
"""Number of a module that adapters cannot change."""


def model_struct(
    shape: DecoderShape,
    cache: KVCache,
    modules: Mapping[str, BaseModule],
    int8_head: Int8Head | None = None,
) -> structs.Model:
    """Returns the decoder; `modules` are all modules of the base, whose order numbers them,
    `int8_head` is a copy of its output layer. All tensors must stay alive.
    """
    numbers = {name: number for number, name in enumerate(modules)}
    blocks = {name: numbers[name] for name, module in modules.items() if module.joins}
    layers = (structs.Layer * len(shape.layers))(
        *(_layer(each, cache, i, numbers, blocks) for i, each in enumerate(shape.layers))
    )
    kind = shape.layers[0].kind
    return structs.Model(
        embedding=shape.embedding.data_ptr(),
        position_embedding=_address(shape.position_embedding),
        layer=layers,
        final_norm=_norm(shape.final_norm, numbers),
        head=shape.head.backend.struct,
        int8_head=structs.Int8Head() if int8_head is None else _int8_head(int8_head),
        layers=len(layers),
        hidden=shape.embedding.shape[1],
        heads=kind.queries // shape.head_dim,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        middle=kind.middle,
        vocabulary=shape.head.backend.out_features,
        positions=shape.positions,
        blocks=cache.num_blocks,
        modules=len(modules),
        rotary_dim=kind.rotated,
        activation=kind.activation,
        gated=kind.gated,
        embedding_module=numbers[shape.embedding_name],
        head_module=numbers[shape.head.name],
        embedding_scale=shape.embedding_scale,
        logit_softcap=shape.logit_softcap,
    )


def _int8_head(head: Int8Head) -> structs.Int8Head:
    return structs.Int8Head(
        panels=head.panels.data_ptr(),
        scales=head.scales.data_ptr(),
        errors=head.errors.data_ptr(),
        longest=head.longest,
    )


def _layer(
    layer: DecoderLayer,
    cache: KVCache,
    index: int,
    modules: Mapping[str, int],
    blocks: Mapping[str, int],
) -> structs.Layer:
    """Returns a layer; `blocks` numbers the blocks that bottlenecks fit."""
    attention, mlp, options = layer.attention, layer.mlp, layer.attention.options
    rotary = attention.rotary

    def linears(several: tuple[Linear, ...]) -> tuple[structs.Linear, ...]:
        return tuple(structs.Linear(each.backend.struct, modules[each.name]) for each in several)

    return structs.Layer(
        qkv=linears(attention.qkv),
        gate_up=linears(mlp.gate_up),
        out=linears((attention.out,))[0],
        down=linears((mlp.down,))[0],
        qkv_count=len(attention.qkv),
        gate_up_count=len(mlp.gate_up),
        attention_norm=_norm(layer.attention_norm, modules),
        q_norm=_norm(attention.q_norm, modules),
        k_norm=_norm(attention.k_norm, modules),
        attention_out_norm=_norm(layer.attention_out_norm, modules),
        mlp_norm=_norm(layer.mlp_norm, modules),
        mlp_out_norm=_norm(layer.mlp_out_norm, modules),
        attention_module=blocks.get(attention.name, NO_MODULE),
        mlp_module=blocks.get(mlp.name, NO_MODULE),
        keys=cache.keys[index].data_ptr(),
        values=cache.values[index].data_ptr(),
        cosines=None if rotary is None else rotary.cosines.data_ptr(),
        sines=None if rotary is None else rotary.sines.data_ptr(),
        window=options.window or 0,
        scale=options.scale,
        softcap=options.softcap or 0,
    )


def _norm(norm: Norm | None, modules: Mapping[str, int]) -> structs.Norm:
    """Returns a norm, or one without a weight for a norm that a layer lacks."""
    if norm is None:
        return structs.Norm(module=NO_MODULE)
    return structs.Norm(
        weight=norm.weight.data_ptr(),
        bias=_address(norm.bias),
        module=modules.get(norm.name, NO_MODULE),
        centered=norm.centered,
        epsilon=norm.epsilon,
        offset=norm.offset,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
