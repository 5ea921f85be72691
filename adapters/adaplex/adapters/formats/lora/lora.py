"""LoRA as HF PEFT 0.21 writes it, with what it may hold besides low-rank pairs of linears.

Pairs of linears, of the embedding and of experts; DoRA, QA-LoRA and activated LoRA; biases,
replaced weights and trained tokens. The tensor keys are the truth. Every tensor and every config
field is accounted for, or the adapter is refused with all the reasons at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lora.config import USED, check_config
from adaplex.adapters.formats.lora.pairs import lower_pair, scale_of
from adaplex.adapters.formats.lora.parameters import Place, pattern_names, targeted_parameters
from adaplex.adapters.formats.lora.tensors import LoraTensors, sort_tensors
from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.formats.modules_to_save import (
    check_copy,
    is_close,
    replacement,
    saved_modules,
    without_saved,
)
from adaplex.adapters.formats.token_rows import lower_rows, token_rows
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram


class Lora:
    """The format; see the module's docstring."""

    family = "lora"
    semantic_fields = USED
    about = FormatRow(
        "LoRA, rsLoRA, QLoRA, DoRA, QA-LoRA, activated LoRA; on linears, embeddings, output layers "
        "and experts; modules_to_save, trainable tokens",
        ("low-rank", "output scale", "bias", "replaced weight", "replaced rows"),
        "initialisers that change the base, replicated layers, Arrow, KaSA, MonteCLoRA, VeLoRA, "
        "BD-LoRA, Megatron",
    )

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        if not check_config(context):
            context.raise_refusals()
        places = targeted_parameters(context)
        found = sort_tensors(context, places)
        programs: list[ModuleProgram] = []
        with context.collect_refusals():
            programs = _Modules(context, places, found).lower()
        context.raise_refusals()
        context.check_ranks(programs)
        if context.config.get("fan_in_fan_out"):
            context.add_note(
                "fan_in_fan_out: weights are kept as [out, in] here, nothing to transpose"
            )
        return Lowered(
            tuple(programs),
            notes=tuple(context.notes),
            warnings=tuple(context.warnings),
            invocation=_invocation(context),
            family=_family(context, programs),
        )


def _invocation(context: LoweringContext) -> tuple[int, ...]:
    """The tokens that activate it, where it is activated LoRA."""
    return tuple(context.config.get("alora_invocation_tokens") or ())


def _family(context: LoweringContext, programs: Sequence[ModuleProgram]) -> str:
    """What kind of LoRA it is."""
    if context.config.get("use_dora"):
        return "dora"
    if _invocation(context):
        return "alora"
    pairs = (program.low_rank for program in programs)
    return "qalora" if any(pair is not None and pair.group > 1 for pair in pairs) else "lora"


@dataclass(frozen=True)
class _Modules:
    """What the config asks of the base's modules, and the tensors found for them."""

    context: LoweringContext
    places: Mapping[tuple[str, int], Place]
    found: Mapping[str, LoraTensors]

    def lower(self) -> list[ModuleProgram]:
        """Programs by name, and refusals where tensors do not fit. Raises AdapterInvalid for a bad
        pattern.
        """
        context, known = self.context, self.context.base.modules
        pairs = {name for name, tensors in self.found.items() if tensors.is_pair}
        context.check_targets(pairs - self._twins, self._targets)
        for name in sorted(self.found.keys() - known.keys() - pairs):
            context.refuse(name, f"the base {context.base.name} has no such module")
        embedding = context.embedding
        if embedding is not None and embedding.name in self._targets and _invocation(context):
            context.refuse(embedding.name, "is an embedding, which activated LoRA does not adapt")
        rows = self._rows()
        for name in sorted(rows.keys() & (pairs | self._saved)):
            context.refuse(name, "has trained tokens, and is adapted or replaced as well")
        names = (self.found.keys() | self._saved | self._twins) & known.keys() - rows.keys()
        made = [*(self._module(known[name]) for name in sorted(names)), *rows.values()]
        return sorted(filter(None, made), key=lambda program: program.module)

    @cached_property
    def _tied(self) -> tuple[str, str] | None:
        """Embedding and output layer, where they are to stay tied."""
        context = self.context
        embedding, head = context.embedding, context.head
        if not (context.base.tied and context.config.get("ensure_weight_tying")):
            return None
        return None if embedding is None or head is None else (embedding.name, head.name)

    @cached_property
    def _saved(self) -> frozenset[str]:
        """Modules that are replaced."""
        saved = saved_modules(self.context)
        return saved.union(self._tied) if self._tied and saved.intersection(self._tied) else saved

    @cached_property
    def _named(self) -> frozenset[str]:
        """Modules that target_modules names."""
        return without_saved(self.context, self.context.targets(("linear", "embedding")))

    @cached_property
    def _twins(self) -> frozenset[str]:
        """The output layer, where its pair is that of the embedding, transposed."""
        is_twin = self._tied is not None and not self._named.isdisjoint(self._tied)
        return frozenset(self._tied[1:] if self._tied is not None and is_twin else ())

    @cached_property
    def _targets(self) -> frozenset[str]:
        """Modules that have a pair of their own."""
        named = self._named
        if self._tied is not None and self._twins:
            named = named - self._twins | {self._tied[0]}
        return named | {place.module for place in self.places.values()}

    def _module(self, module: BaseModule) -> ModuleProgram | None:
        """The program of a module whose rows stay; None where it does nothing, or is refused."""
        tensors = self.found.get(module.name) or LoraTensors(module.name)
        if module.name in self._saved:
            return self._replaced(module, tensors)
        self._check_copies(module, tensors)
        bias = self._bias(module, tensors)
        if module.name in self._twins:
            program = self._twin(module, tensors)
        elif tensors.is_pair:
            program = lower_pair(self.context, tensors, pattern_names(self.places))
        else:
            program = ModuleProgram(module.name)
        if program is None or bias is None:
            return program if program is not None and program.primitives else None
        return replace(program, bias=bias if program.bias is None else bias + program.bias)

    def _replaced(self, module: BaseModule, tensors: LoraTensors) -> ModuleProgram | None:
        """A module that was trained as a whole."""
        context = self.context
        if tensors.is_pair:
            context.refuse(module.name, "is named by modules_to_save, and is adapted as well")
        weight, key = tensors.get("weight"), tensors.keys.get("weight", module.name)
        if self._tied is not None and module.name == self._tied[1]:
            source = self.found.get(self._tied[0]) or LoraTensors(self._tied[0])
            if weight is not None and not _equal(weight, source.get("weight")):
                context.refuse(key, "is not the embedding's, as ensure_weight_tying asks for")
            weight = source.get("weight")
        biases = [tensors.found[kind] for kind in ("bias", "saved_bias") if tensors.has(kind)]
        if len(biases) == 2 and not torch.equal(*biases):
            context.refuse(tensors.keys["bias"], "is given twice")
        return replacement(context, module, key, weight, biases[0] if biases else None)

    def _twin(self, module: BaseModule, tensors: LoraTensors) -> ModuleProgram | None:
        """The output layer, tied to an embedding that has a pair."""
        assert self._tied is not None
        context, source = self.context, self.found.get(self._tied[0])
        a, b = (None if source is None else source.get(f"table_{half}") for half in "ba")
        if context.config.get("use_dora"):
            context.refuse("use_dora", "does not go with ensure_weight_tying")
        if a is None or b is None or a.dim() != 2:
            return None  # the embedding's own refusal says so
        a, b = a.T, b.T
        for kind, half in (("a", a), ("b", b)):
            if tensors.has(kind) and not _equal(tensors.found[kind], half):
                where = tensors.keys[kind]
                context.refuse(where, "is not the embedding's, as ensure_weight_tying asks for")
        scale = scale_of(context, module.name, a.shape[0])
        return ModuleProgram(module.name, LowRank(a.contiguous(), b.float() * scale), scale=scale)

    def _bias(self, module: BaseModule, tensors: LoraTensors) -> Tensor | None:
        """What a trained bias adds; the config says which modules may carry one."""
        bias, kind = tensors.get("bias"), self.context.config.get("bias", "none")
        if bias is None:
            return None
        if kind == "none" or (kind == "lora_only" and module.name not in self._targets):
            self.context.refuse(f"{module.name}.bias", f"is there, but bias is {kind!r}")
        return self.context.bias_difference(module, f"{module.name}.bias", bias)

    def _check_copies(self, module: BaseModule, tensors: LoraTensors) -> None:
        """Weights and biases that may only be there if they are the base's own."""
        for kind in ("copy", "weight"):
            if (copy := tensors.get(kind)) is not None:
                check_copy(self.context, module, tensors.keys[kind], copy)
        own = self.context.base.biases.get(module.name)
        for kind in ("copied_bias", "saved_bias"):
            copy = tensors.get(kind)
            if copy is not None and (
                own is None or copy.shape != own.shape or not is_close(copy, own)
            ):
                self.context.refuse(tensors.keys[kind], "is not the base's own bias")

    def _rows(self) -> dict[str, ModuleProgram | None]:
        """Programs that replace rows, by name of the module."""
        found = {
            name: (tensors.keys["rows"], tensors.found["rows"])
            for name, tensors in self.found.items()
            if tensors.has("rows")
        }
        return lower_rows(self.context, token_rows(self.context, self._tokens()), found)

    def _tokens(self) -> dict[str, list[int]]:
        """Name of a module -> the ids of its trained tokens."""
        context, wanted = self.context, self.context.config.get("trainable_token_indices") or {}
        embedding = context.embedding
        if not isinstance(wanted, dict):
            wanted = {"embed_tokens" if embedding is None else embedding.name: wanted}
        tokens: dict[str, list[int]] = {}
        for end, ids in wanted.items():
            where = f"trainable_token_indices {end}"
            names = [name for name in context.base.modules if name.endswith(end)]
            if not names:
                context.refuse(where, f"the base {context.base.name} has no such module")
            if context.check_tokens(where, ids):
                tokens |= dict.fromkeys(names, ids)
        return tokens


def _equal(one: Tensor, other: Tensor | None) -> bool:
    """Whether both are there, and the same."""
    return other is not None and torch.equal(one, other)
