"""A reference of AdapterProgram in plain torch: hooks on a transformers model.

It is slow, has no batches of several adapters and uses no code of the server. Programs that the
formats lower to are tested with it against PEFT, by module and by the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram

FUSED = ("gate_up_proj", "down_proj")
PARTS: dict[str, Literal["attention", "mlp"]] = {
    "self_attn": "attention",
    "attn": "attention",
    "mlp": "mlp",
}
"""Last parts of the names of blocks."""


def linear(
    program: ModuleProgram, x: Tensor, weight: Tensor, base_bias: Tensor | None = None
) -> Tensor:
    """Maps x [..., in] to [..., out], for the base's weight [out, in] and bias [out]."""
    weight = weight if program.weight is None else program.weight.float()
    if program.rows is not None:
        weight = weight.clone()
        weight[list(program.rows.ids)] = program.rows.weight.float()
    if program.input_scale is not None:
        x = x * program.input_scale
    y = F.linear(x, weight, base_bias)
    if program.output_scale is not None:
        y = y * program.output_scale
    if program.low_rank is not None:
        y = y + F.linear(F.linear(x, program.low_rank.a.float()), program.low_rank.b.float())
    return y if program.bias is None else y + program.bias


def embedding(program: ModuleProgram, ids: Tensor, table: Tensor) -> Tensor:
    """Maps ids [...] to [..., hidden], for the base's table [vocabulary, hidden]."""
    table = table.clone() if program.weight is None else program.weight.float().clone()
    if program.rows is not None:
        table[list(program.rows.ids)] = program.rows.weight.float()
    y = table[ids]
    if program.low_rank is not None:
        assert program.low_rank.lookup
        y = y + F.linear(program.low_rank.a.float().T[ids], program.low_rank.b.float())
    return y


def experts(program: ModuleProgram, weight: Tensor) -> Tensor:
    """Returns the base's weights [experts, out, in] with the program folded in."""
    assert program.low_rank is not None
    count = weight.shape[0]
    a = program.low_rank.a.float().reshape(count, -1, weight.shape[2])
    b = program.low_rank.b.float().reshape(weight.shape[1], count, -1)
    return weight + torch.einsum("oer,eri->eoi", b, a)


def describe(model: PreTrainedModel, name: str = "org/tiny", **changes: Any) -> BaseSpec:
    """Returns the spec of a transformers model, without the server's loader; copies its weights."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    modules: dict[str, BaseModule] = {}
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        weight = _oriented(module)
        for parameter in FUSED:
            fused = getattr(module, parameter, None)
            if isinstance(fused, nn.Parameter) and fused.dim() == 3:
                full = f"{path}.{parameter}"
                count, out_features, in_features = fused.shape
                modules[full] = BaseModule(
                    full, "experts", in_features, out_features, experts=count
                )
        if module is table:
            modules[path] = BaseModule(path, "embedding", *weight.shape)
        elif isinstance(module, nn.Linear | Conv1D):
            out_features, in_features = weight.shape
            modules[path] = BaseModule(
                path,
                "linear",
                in_features,
                out_features,
                module.bias is not None,
                module is head,
                isinstance(module, Conv1D),
            )
        elif weight is not None and weight.dim() == 1:
            has_bias = getattr(module, "bias", None) is not None
            modules[path] = BaseModule(path, "norm", len(weight), len(weight), has_bias)
        else:
            continue
        weights[path] = weight.detach().float().clone()
        if modules[path].has_bias:
            biases[path] = module.bias.detach().float().clone()
    fields: dict[str, Any] = {
        "tied": bool(model.config.tie_word_embeddings),
        "weight": weights.__getitem__,
    }
    fields |= {"modules": modules, "biases": biases}
    return BaseSpec(name, "base", model.config.model_type, **(fields | changes))


def with_blocks(model: PreTrainedModel, base: BaseSpec) -> BaseSpec:
    """Returns the spec with attention and MLP blocks, and the KV shapes of each layer."""
    hidden = model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr,index]
    blocks: dict[str, BaseModule] = {}
    for name, _ in model.named_modules():
        words = name.split(".")
        if (part := PARTS.get(words[-1])) is not None:
            layer = next(int(word) for word in words if word.isdigit())
            blocks[name] = BaseModule(name, "block", hidden, hidden, layer=layer, part=part)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    shapes = ((heads, size, size),) * config.num_hidden_layers
    return replace(base, modules={**base.modules, **blocks}, kv_shapes=shapes)


@torch.no_grad()
def logits(
    model: PreTrainedModel, program: AdapterProgram, tokens: list[int], start: int = 0
) -> Tensor:
    """Returns fp32 logits [vocabulary] after the last token, with the program's leading positions.

    The program is applied from position `start` on.
    """
    modules = program.modules
    virtual = [m.virtual[None] for m in modules if m.virtual is not None]
    prefix = [
        (m.prefix.keys.transpose(0, 1)[None], m.prefix.values.transpose(0, 1)[None])
        for m in modules
        if m.prefix is not None
    ]
    bare = replace(program, modules=tuple(m for m in modules if m.prefix is None))
    with applied(model, bare, start):
        embedded = model.get_input_embeddings()(torch.tensor([tokens]))
        out = model(
            inputs_embeds=torch.cat([*virtual, embedded], dim=1),
            past_key_values=DynamicCache(prefix) if prefix else None,
        )
    last: Tensor = out.logits[0, -1]
    return last.float()


@contextmanager
def applied(model: PreTrainedModel, program: AdapterProgram, start: int = 0) -> Iterator[None]:
    """Applies the program to the model, from position `start` on, until the end of `with`."""
    handles, kept = [], []
    for module in program.modules:
        owner, _, last = module.module.rpartition(".")
        layer = getattr(model.get_submodule(owner), last)
        if isinstance(layer, nn.Parameter):
            kept.append((layer, layer.data))
            layer.data = experts(module, layer.data)
            continue
        handles.append(layer.register_forward_hook(partial(_hooked, module, start)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, data in kept:
            weight.data = data


def _hooked(
    program: ModuleProgram, start: int, layer: Any, args: tuple[Tensor, ...], y: Tensor
) -> Tensor:
    """Returns a layer's output with its program applied, instead of y [1, tokens, features]."""
    if isinstance(layer, nn.Embedding):
        made = embedding(program, args[0], layer.weight)
    elif isinstance(layer, nn.Linear | Conv1D):
        made = linear(program, args[0], _oriented(layer), layer.bias)
    else:
        named = {} if program.weight is None else {"weight": program.weight.float()}
        with torch.no_grad():
            made = torch.func.functional_call(_unhooked(layer), named, args)
        made = made if program.bias is None else made + program.bias
    return torch.cat([y[:, :start], made[:, start:]], dim=1)


def _unhooked(layer: nn.Module) -> nn.Module:
    """Returns the layer without its hooks."""
    bare = layer.__new__(type(layer))
    bare.__dict__ = layer.__dict__ | {"_forward_hooks": {}}
    return bare


def _oriented(module: Any) -> Any:
    """Returns a module's weight, of a linear as [out, in]; None if it has none."""
    weight = getattr(module, "weight", None)
    return weight.T if isinstance(module, Conv1D) else weight
