"""Replaced rows of the embedding or the output layer, one for each trained token.

On a base whose output layer shares the embedding's weight, the embedding's rows replace those of
the output layer too. Source: `peft.utils.other.set_additional_trainable_modules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import ReplacedRows
from adaplex.adapters.program.program import ModuleProgram


@dataclass(frozen=True)
class TokenRows:
    """Rows of a module that are replaced, and the module whose tensor holds them."""

    ids: tuple[int, ...]
    """Token ids, in the order of the tensor's rows."""
    source: str
    """Name of this module, or of the embedding that it is tied to."""


def token_rows(context: LoweringContext, wanted: Mapping[str, list[int]]) -> dict[str, TokenRows]:
    """Returns the replaced rows by module name. `wanted` has token ids by module name; modules
    without rows are refused.
    """
    embedding, head = context.embedding, context.head
    rows = {}
    for name, ids in wanted.items():
        if name in {module.name for module in (embedding, head) if module is not None}:
            rows[name] = TokenRows(tuple(ids), name)
        else:
            context.refuse(name, "has no token rows: it is not the embedding or the output layer")
    if context.base.tied and embedding is not None and head is not None and embedding.name in rows:
        first = rows[embedding.name]
        if rows.get(head.name, first).ids == first.ids:
            rows[head.name] = first
        elif context.config.get("ensure_weight_tying"):
            reason = "needs the same tokens for the embedding and the output layer"
            context.refuse("ensure_weight_tying", reason)
    return rows


def lower_rows(
    context: LoweringContext,
    rows: Mapping[str, TokenRows],
    tensors: Mapping[str, tuple[str, Tensor]],
) -> dict[str, ModuleProgram | None]:
    """Returns the programs that replace rows, by module name. `tensors` has (key, tensor) by module
    name.
    """
    sources = {row.source for row in rows.values()}
    for name in sorted(sources - tensors.keys()):
        context.refuse(name, "its trained tokens are missing")
    for name in sorted(tensors.keys() - sources):
        own = tensors[name][1]
        twin = tensors.get(rows[name].source) if name in rows else None
        if twin is None or not torch.equal(own, twin[1]):
            context.refuse(tensors[name][0], "has tokens that the config does not name")
    return {
        name: _replaced(context, context.base.modules[name], row.ids, *tensors[row.source])
        for name, row in sorted(rows.items())
        if row.source in tensors
    }


def _replaced(
    context: LoweringContext, module: BaseModule, ids: tuple[int, ...], key: str, tensor: Tensor
) -> ModuleProgram | None:
    """Returns the program of one module; None, with a refusal, if its tensor does not fit."""
    features = module.in_features if module.is_head else module.out_features
    if len(set(ids)) < len(ids):
        context.refuse(key, "has a repeated token")
    elif module.is_head and module.has_bias:
        context.refuse(module.name, "has a bias, which PEFT omits with trainable tokens")
    elif context.check_shape(key, tensor, len(ids), features):
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rows = ReplacedRows(tuple(sorted(ids)), tensor[order])
        return ModuleProgram(module.name, rows=rows)
    return None
