"""Trainable tokens: some rows of the embedding, or of the output layer, are others.

PEFT writes the new rows themselves. On a base whose output layer uses the embedding's weight, the
rows of the embedding are those of the output layer too. Sources: `peft.tuners.trainable_tokens`
and `peft.utils.other.set_additional_trainable_modules`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.about import FormatRow
from adaplex.adapters.formats.lowered import Lowered
from adaplex.adapters.formats.lowering_context import HARMLESS, PREFIX, LoweringContext
from adaplex.adapters.formats.modules_to_save import check_copy
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import ReplacedRows
from adaplex.adapters.program.program import ModuleProgram

ROWS = re.compile(r"(?P<module>.+)\.trainable_tokens_delta(\.default)?")
COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")


@dataclass(frozen=True)
class TokenRows:
    """Which rows of a module are replaced, and whose tensor has them."""

    ids: tuple[int, ...]
    source: str
    """Name of a module: this one, or the embedding that it is tied to."""


class TrainableTokens:
    """PEFT's type of its own; inside of LoRA they are a field."""

    family = "trainable-tokens"
    semantic_fields = frozenset(["peft_type", "target_modules", "token_indices"])
    about = FormatRow("Trainable tokens", ("replaced rows",))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("trainable tokens", self.semantic_fields, HARMLESS | {"init_weights"})
        reading.check_target_fields()
        ids: Any = reading.config.get("token_indices")
        reading.check_tokens("token_indices", ids)
        reading.raise_refused()
        programs: dict[str, ModuleProgram | None] = {}
        with reading.collecting():
            tensors = _sort_tensors(reading)
            targets = dict.fromkeys(sorted(_targets(reading)), ids)
            programs = lower_rows(reading, token_rows(reading, targets), tensors)
        reading.raise_refused()
        return Lowered(tuple(filter(None, programs.values())))


def token_rows(reading: LoweringContext, wanted: Mapping[str, list[int]]) -> dict[str, TokenRows]:
    """Name of a module -> its rows, out of the ids wanted for each module by name; refuses modules
    that have no rows.
    """
    embedding, head = reading.embedding, reading.head
    rows = {}
    for name, ids in wanted.items():
        if name in {module.name for module in (embedding, head) if module is not None}:
            rows[name] = TokenRows(tuple(ids), name)
        else:
            reading.refuse(name, "has no rows to replace: it is no embedding or output layer")
    if reading.base.tied and embedding is not None and head is not None and embedding.name in rows:
        first = rows[embedding.name]
        if rows.get(head.name, first).ids == first.ids:
            rows[head.name] = first
        elif reading.config.get("ensure_weight_tying"):
            reading.refuse("ensure_weight_tying", "needs the same tokens for both layers")
    return rows


def lower_rows(
    reading: LoweringContext,
    rows: Mapping[str, TokenRows],
    tensors: Mapping[str, tuple[str, Tensor]],
) -> dict[str, ModuleProgram | None]:
    """Programs that replace rows, by name of the module; `tensors` has key and tensor by it."""
    sources = {row.source for row in rows.values()}
    for name in sorted(sources - tensors.keys()):
        reading.refuse(name, "its trained tokens are missing")
    for name in sorted(tensors.keys() - sources):
        own = tensors[name][1]
        twin = tensors.get(rows[name].source) if name in rows else None
        if twin is None or not torch.equal(own, twin[1]):
            reading.refuse(tensors[name][0], "has tokens that the config does not name")
    return {
        name: _replaced(reading, reading.base.modules[name], row.ids, *tensors[row.source])
        for name, row in sorted(rows.items())
        if row.source in tensors
    }


def _replaced(
    reading: LoweringContext, module: BaseModule, ids: tuple[int, ...], key: str, tensor: Tensor
) -> ModuleProgram | None:
    """The program of one module; None, with a refusal, when its tensor does not fit."""
    features = module.in_features if module.is_head else module.out_features
    if len(set(ids)) < len(ids):
        reading.refuse(key, "has a token twice")
    elif module.is_head and module.has_bias:
        reading.refuse(module.name, "has a bias, which PEFT leaves out with trainable tokens")
    elif reading.fits(key, tensor, len(ids), features):
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rows = ReplacedRows(tuple(sorted(ids)), tensor[order])
        return ModuleProgram(module.name, rows=rows)
    return None


def _sort_tensors(reading: LoweringContext) -> dict[str, tuple[str, Tensor]]:
    """Name of a module -> key and tensor; refuses tensors that fit no place."""
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in reading.tensors.items():
        name = key.removeprefix(PREFIX)
        copy = COPY.fullmatch(name)
        if name == key:
            reading.refuse(key, f"does not begin with {PREFIX}")
        elif rows := ROWS.fullmatch(name):
            if rows["module"] in found:
                reading.refuse(key, "is given twice")
            found[rows["module"]] = (key, tensor)
        elif copy is not None and (module := reading.base.modules.get(copy["module"])) is not None:
            check_copy(reading, module, key, tensor)
        else:
            reading.refuse(key, "is not a tensor of trainable tokens that this server knows")
    return found


def _targets(reading: LoweringContext) -> frozenset[str]:
    """Names of the modules that the config targets: by default, the embedding."""
    if reading.config.get("target_modules"):
        targets = reading.targets(("linear", "embedding"))
    else:
        targets = frozenset([] if reading.embedding is None else [reading.embedding.name])
    if not targets:
        reading.refuse("target_modules", f"matches no module of the base {reading.base.name}")
    return targets
