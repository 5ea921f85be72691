"""LoRA as HF PEFT 0.21 writes it.

Lowers pairs of linears, of the embedding and of experts; DoRA, QA-LoRA and activated LoRA; biases,
replaced weights and trained tokens. Tensor keys take precedence over the config. Every tensor and
config field must be accounted for, or the adapter is refused with all reasons at once.
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
from adaplex.adapters.formats.lora.parameters import (
    Parameters,
    pattern_names,
    targeted_parameters,
)
from adaplex.adapters.formats.lora.separate_experts import SeparateExperts
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
    """Format of LoRA; see the module's docstring."""

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
        parameters = targeted_parameters(context)
        found = sort_tensors(context, parameters)
        programs: list[ModuleProgram] = []
        with context.collect_refusals():
            programs = _LoraModules(context, parameters, found).lower()
        context.raise_refusals()
        context.check_ranks(programs)
        if context.config.get("fan_in_fan_out"):
            context.add_note(
                "fan_in_fan_out: ignored, because weights are stored as [out, in] here"
            )
        return Lowered(
            tuple(programs),
            notes=tuple(context.notes),
            warnings=tuple(context.warnings),
            invocation=_invocation(context),
            family=_family(context, programs),
        )


def _invocation(context: LoweringContext) -> tuple[int, ...]:
    """Returns the invocation tokens of activated LoRA; empty otherwise."""
    return tuple(context.config.get("alora_invocation_tokens") or ())


def _family(context: LoweringContext, programs: Sequence[ModuleProgram]) -> str:
    """Returns the variant of LoRA."""
    if context.config.get("use_dora"):
        return "dora"
    if _invocation(context):
        return "alora"
    pairs = (program.low_rank for program in programs)
    return "qalora" if any(pair is not None and pair.group > 1 for pair in pairs) else "lora"


@dataclass(frozen=True)
class _LoraModules:
    """Lowers one adapter's modules."""

    context: LoweringContext
    parameters: Parameters
    """Parameters that `target_parameters` names."""
    found: Mapping[str, LoraTensors]
    """Tensors by module name."""

    def lower(self) -> list[ModuleProgram]:
        """Returns the programs, sorted by module name; refuses tensors that do not fit.

        Raises AdapterInvalid for a bad pattern.
        """
        context, known = self.context, self.context.base.modules
        experts = SeparateExperts(context, self.found)
        fused = list(experts.lower())
        pairs = {name for name, tensors in self.found.items() if tensors.is_pair}
        pairs -= experts.pairs.keys()
        if pairs or self._targets or not experts.pairs:
            context.check_targets(pairs - self._tied_outputs, self._targets)
        for name in sorted(self.found.keys() - known.keys() - pairs - experts.pairs.keys()):
            context.refuse_missing(name)
        embedding = context.embedding
        if embedding is not None and embedding.name in self._targets and _invocation(context):
            context.refuse(embedding.name, "is an embedding, which activated LoRA does not adapt")
        rows = self._lower_rows()
        for name in sorted(rows.keys() & (pairs | self._replaced)):
            context.refuse(name, "has trained tokens, and is adapted or replaced as well")
        changed = self.found.keys() | self._replaced | self._tied_outputs
        names = changed & known.keys() - rows.keys()
        made = [*(self._lower_module(known[name]) for name in sorted(names)), *rows.values()]
        twice = {program.module for program in fused} & {p.module for p in made if p is not None}
        for name in sorted(twice):
            context.refuse(name, "is adapted whole, and by single experts as well")
        made += fused
        return sorted(filter(None, made), key=lambda program: program.module)

    @cached_property
    def _tied(self) -> tuple[str, str] | None:
        """Names of the embedding and the output layer, if the config keeps them tied."""
        context = self.context
        embedding, head = context.embedding, context.head
        if not (context.base.tied and context.config.get("ensure_weight_tying")):
            return None
        return None if embedding is None or head is None else (embedding.name, head.name)

    @cached_property
    def _replaced(self) -> frozenset[str]:
        """Names of the modules whose weights are replaced."""
        saved = saved_modules(self.context)
        return saved.union(self._tied) if self._tied and saved.intersection(self._tied) else saved

    @cached_property
    def _config_targets(self) -> frozenset[str]:
        """Names of the modules that target_modules selects."""
        return without_saved(self.context, self.context.targets(("linear", "embedding")))

    @cached_property
    def _tied_outputs(self) -> frozenset[str]:
        """Name of the output layer, if its pair is the embedding's, transposed; else empty."""
        is_twin = self._tied is not None and not self._config_targets.isdisjoint(self._tied)
        return frozenset(self._tied[1:] if self._tied is not None and is_twin else ())

    @cached_property
    def _targets(self) -> frozenset[str]:
        """Names of the modules that have a pair of their own."""
        named = self._config_targets
        if self._tied is not None and self._tied_outputs:
            named = named - self._tied_outputs | {self._tied[0]}
        return named | {parameter.module for parameter in self.parameters.values()}

    def _lower_module(self, module: BaseModule) -> ModuleProgram | None:
        """Returns the program of a module without replaced rows; None if it changes nothing, or is
        refused.
        """
        tensors = self.found.get(module.name) or LoraTensors(module.name)
        if module.name in self._replaced:
            return self._lower_replaced(module, tensors)
        self._check_copies(module, tensors)
        bias = self._bias(module, tensors)
        if module.name in self._tied_outputs:
            program = self._lower_tied_output(module, tensors)
        elif tensors.is_pair:
            program = lower_pair(self.context, tensors, pattern_names(self.parameters))
        else:
            program = ModuleProgram(module.name)
        if program is None or bias is None:
            return program if program is not None and program.primitives else None
        return replace(program, bias=bias if program.bias is None else bias + program.bias)

    def _lower_replaced(self, module: BaseModule, tensors: LoraTensors) -> ModuleProgram | None:
        """Returns the program of a fully trained module; None if it is refused."""
        context = self.context
        if tensors.is_pair:
            context.refuse(module.name, "is named by modules_to_save, and is adapted as well")
        weight, key = tensors.get("weight"), tensors.keys.get("weight", module.name)
        if self._tied is not None and module.name == self._tied[1]:
            source = self.found.get(self._tied[0]) or LoraTensors(self._tied[0])
            if weight is not None and not _equal(weight, source.get("weight")):
                context.refuse(key, "differs from the embedding's, despite ensure_weight_tying")
            weight = source.get("weight")
        biases = [tensors.found[kind] for kind in ("bias", "saved_bias") if tensors.has(kind)]
        if len(biases) == 2 and not torch.equal(*biases):
            context.refuse(tensors.keys["bias"], "is given twice")
        return replacement(context, module, key, weight, biases[0] if biases else None)

    def _lower_tied_output(self, module: BaseModule, tensors: LoraTensors) -> ModuleProgram | None:
        """Returns the program of the output layer, tied to an embedding that has a pair; None if
        the pair is refused.
        """
        assert self._tied is not None
        context, source = self.context, self.found.get(self._tied[0])
        a, b = (None if source is None else source.get(f"table_{half}") for half in "ba")
        if context.config.get("use_dora"):
            context.refuse("use_dora", "cannot be combined with ensure_weight_tying")
        if a is None or b is None or a.dim() != 2:
            return None  # refused at the embedding
        a, b = a.T, b.T
        for kind, half in (("a", a), ("b", b)):
            if tensors.has(kind) and not _equal(tensors.found[kind], half):
                where = tensors.keys[kind]
                context.refuse(where, "differs from the embedding's, despite ensure_weight_tying")
        scale = scale_of(context, module.name, a.shape[0])
        return ModuleProgram(module.name, LowRank(a.contiguous(), b.float() * scale), scale=scale)

    def _bias(self, module: BaseModule, tensors: LoraTensors) -> Tensor | None:
        """Returns the difference of a trained bias from the base's, or None without one; refuses
        biases that the config field `bias` excludes.
        """
        bias, kind = tensors.get("bias"), self.context.config.get("bias", "none")
        if bias is None:
            return None
        if kind == "none" or (kind == "lora_only" and module.name not in self._targets):
            self.context.refuse(f"{module.name}.bias", f"is present, but bias is {kind!r}")
        return self.context.bias_difference(module, f"{module.name}.bias", bias)

    def _check_copies(self, module: BaseModule, tensors: LoraTensors) -> None:
        """Refuses copies of the base's weights and biases that differ from them."""
        for kind in ("copy", "weight"):
            if (copy := tensors.get(kind)) is not None:
                check_copy(self.context, module, tensors.keys[kind], copy)
        own = self.context.base.biases.get(module.name)
        for kind in ("copied_bias", "saved_bias"):
            copy = tensors.get(kind)
            if copy is not None and (
                own is None or copy.shape != own.shape or not is_close(copy, own)
            ):
                self.context.refuse(tensors.keys[kind], "differs from the base's bias")

    def _lower_rows(self) -> dict[str, ModuleProgram | None]:
        """Returns the programs that replace rows, by module name."""
        found = {
            name: (tensors.keys["rows"], tensors.found["rows"])
            for name, tensors in self.found.items()
            if tensors.has("rows")
        }
        return lower_rows(self.context, token_rows(self.context, self._token_ids()), found)

    def _token_ids(self) -> dict[str, list[int]]:
        """Returns the ids of trained tokens by module name."""
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
    """True if `other` is not None, and equals `one`."""
    return other is not None and torch.equal(one, other)
