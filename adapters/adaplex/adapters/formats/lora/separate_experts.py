"""SeparateExperts: pairs of single experts, as adapters for transformers 4 have them.

Transformers 5 fuses the experts of a layer, with their gate and up projections in one parameter.
The pairs of a layer become one pair of the fused parameter, in which those of gate and up stand
block-diagonally. Source: `peft.utils.transformers_weight_conversion`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adaplex.adapters.formats.lora.pairs import rank_of, scale_of
from adaplex.adapters.formats.lora.tensors import LoraTensors
from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.formats.targets import targeted
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

NAME = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<projection>\w+)")
PARTS = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}
"""Fused parameter of a projection, and which part of its outputs the projection makes."""
PART_COUNT = {"gate_up_proj": 2, "down_proj": 1}
RENAMED = (".block_sparse_moe.", ".mlp.")
"""Name of the block of experts in transformers 4, and in 5."""


@dataclass(frozen=True)
class ExpertPair:
    """The pair of one projection of one expert."""

    tensors: LoraTensors
    module: BaseModule
    """Fused parameter of the base."""
    expert: int
    part: int
    """Part of the parameter's outputs that the pair changes."""

    @property
    def linear(self) -> BaseModule:
        """The projection as a linear of its own."""
        out_features = self.module.out_features // PART_COUNT[self.module.name.rpartition(".")[2]]
        return BaseModule(self.tensors.name, "linear", self.module.in_features, out_features)


@dataclass(frozen=True)
class SeparateExperts:
    """The pairs of single experts of one adapter."""

    context: LoweringContext
    found: Mapping[str, LoraTensors]
    """Tensors of the whole adapter, by module name."""

    @cached_property
    def pairs(self) -> dict[str, ExpertPair]:
        """Pairs by the name that the adapter gives their module."""
        pairs = {}
        for name, tensors in self.found.items():
            if name not in self.context.base.modules and (place := self._place(name)) is not None:
                pairs[name] = ExpertPair(tensors, *place)
        return pairs

    def lower(self) -> Iterator[ModuleProgram]:
        """Yields the program of each fused parameter; refuses pairs that do not fit."""
        context = self.context
        linears = [pair.linear for pair in self.pairs.values()]
        named = targeted(context.config, linears, context.patterns)
        by_module: dict[str, list[ExpertPair]] = defaultdict(list)
        for name, pair in sorted(self.pairs.items()):
            if name not in named:
                context.refuse(name, "has tensors, but target_modules does not name it")
            elif self._fits(pair):
                by_module[pair.module.name].append(pair)
        if context.config.get("use_rslora") and by_module:
            context.add_note(
                "use_rslora: pairs of experts' gate and up projections are scaled as PEFT does, "
                "by the square root of their joint rank"
            )
        yield from (self._fused(pairs) for pairs in by_module.values())

    def _place(self, name: str) -> tuple[BaseModule, int, int] | None:
        """Returns the fused parameter, the expert and the part that a module's name stands for."""
        match = NAME.fullmatch(name)
        if match is None or match["projection"] not in PARTS:
            return None
        parameter, part = PARTS[match["projection"]]
        for owner in (match["owner"], f"{match['owner']}.".replace(*RENAMED).rstrip(".")):
            module = self.context.base.modules.get(f"{owner}.{parameter}")
            if module is not None and module.kind == "experts" and not module.transposed:
                return module, int(match["expert"]), part
        return None

    def _fits(self, pair: ExpertPair) -> bool:
        """Refuses a pair of other tensors, shapes or experts than the base's; True if it fits."""
        context, tensors, linear = self.context, pair.tensors, pair.linear
        if pair.expert >= pair.module.experts:
            context.refuse(linear.name, f"is not among the base's {pair.module.experts} experts")
            return False
        for kind in sorted(tensors.found.keys() - {"a", "b"}):
            context.refuse(tensors.keys[kind], "is not served for a single expert")
        if tensors.found.keys() != {"a", "b"}:
            if not tensors.found.keys() >= {"a", "b"}:
                context.refuse(linear.name, "is missing half of its pair")
            return False
        rank = rank_of(context, linear.name)
        shapes = {"a": (rank, linear.in_features), "b": (linear.out_features, rank)}
        fits = [
            context.check_shape(tensors.keys[half], tensors.found[half], *shape)
            for half, shape in shapes.items()
        ]
        return all(fits)

    def _fused(self, pairs: list[ExpertPair]) -> ModuleProgram:
        """Returns the program of one fused parameter: a [experts * rank, in], b [out, experts *
        rank], padded with zeros to the largest rank of an expert.
        """
        module = pairs[0].module
        ranks: dict[int, int] = defaultdict(int)
        for pair in pairs:
            ranks[pair.expert] += pair.tensors.found["a"].shape[0]
        rank = max(ranks.values())
        dtype = pairs[0].tensors.found["a"].dtype
        a = torch.zeros(module.experts, rank, module.in_features, dtype=dtype)
        b = torch.zeros(module.experts, module.out_features, rank)
        used: dict[int, int] = defaultdict(int)
        for pair in sorted(pairs, key=lambda each: (each.expert, each.part)):
            own_a, own_b = pair.tensors.found["a"], self._scaled(pair)
            ranks_here = slice(used[pair.expert], used[pair.expert] + own_a.shape[0])
            rows = slice(pair.part * own_b.shape[0], (pair.part + 1) * own_b.shape[0])
            a[pair.expert, ranks_here] = own_a.to(dtype)
            b[pair.expert, rows, ranks_here] = own_b
            used[pair.expert] += own_a.shape[0]
        return ModuleProgram(
            module.name,
            LowRank(a.flatten(0, 1), b.transpose(0, 1).flatten(1)),
            scale=self._scale(pairs[0]),
        )

    def _scaled(self, pair: ExpertPair) -> Tensor:
        return pair.tensors.found["b"].float() * self._scale(pair)

    def _scale(self, pair: ExpertPair) -> float:
        """Returns the scale that PEFT gives a pair: that of the fused one, whose rank and alpha are
        multiplied by the number of parts.
        """
        scale = scale_of(self.context, pair.linear.name, pair.tensors.found["a"].shape[0])
        parts = PART_COUNT[pair.module.name.rpartition(".")[2]]
        return scale * math.sqrt(parts) if self.context.config.get("use_rslora") else scale
