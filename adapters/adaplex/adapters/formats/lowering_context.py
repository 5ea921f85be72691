"""LoweringContext: state of lowering one checkpoint, and the checks that all formats share.

A format must account for every tensor and every config field. An adapter is refused with all
reasons at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, Refusal
from adaplex.adapters.formats.targets import LINEARS, Patterns, targeted
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import FINGERPRINT, NAME, QUANTIZATION
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec, ModuleKind
from adaplex.adapters.program.program import ModuleProgram

PREFIX = "base_model.model."
"""Prefix of the tensor keys that PEFT writes, except those of prompt learning."""
TARGET_FIELDS = frozenset(
    ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
)
"""PEFT config fields that select the adapted modules."""
COMMON_FIELDS = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        NAME,
        FINGERPRINT,
        QUANTIZATION,
        "revision",
        "inference_mode",
    ]
)
"""Fields of every PEFT config, which do not change the answer."""
UNSET: tuple[object, ...] = (None, False, "", [], {})
"""Values that mean that a config does not use a field."""
MAX_NUMBER = 1e9
"""Bound of ranks and alphas."""


@dataclass
class LoweringContext:
    """A checkpoint, the base it is lowered for, and the refusals and notes collected so far."""

    checkpoint: Checkpoint
    base: BaseSpec
    limits: AdapterLimits
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    patterns: Patterns = field(default_factory=Patterns)

    @property
    def config(self) -> Mapping[str, Any]:
        """The adapter's config."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's tensors by key."""
        return self.checkpoint.tensors

    def refuse(self, where: str, reason: str) -> None:
        """Adds a reason not to serve the adapter."""
        self.refusals.append(Refusal(where, reason))

    def add_note(self, text: str) -> None:
        """Adds a note for the user, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def collect_refusals(self) -> Iterator[None]:
        """Context manager that collects the refusals of an AdapterInvalid raised in its body."""
        try:
            yield
        except AdapterInvalid as error:
            self.refusals.extend(error.refusals)

    def raise_refusals(self) -> None:
        """Raises AdapterInvalid with every refusal so far, if there is one."""
        if self.refusals:
            raise AdapterInvalid(self.refusals)

    def check_fields(
        self,
        family: str,
        used: Collection[str],
        harmless: Collection[str] = COMMON_FIELDS,
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        """Refuses set fields that are unknown or unsupported.

        `used` are fields that change the answer, `harmless` fields that do not; `unsupported` maps
        fields that are not served to what serving them would need.
        """
        needs = unsupported or {}
        for name, value in sorted(self.config.items()):
            if value in UNSET:
                continue
            if name in needs:
                self.refuse(name, needs[name])
            elif name not in used and name not in harmless:
                self.refuse(name, f"is not a known field of {family}")

    def check_kind(self, name: str, fits: bool, kind: str) -> bool:
        """Refuses a field unless it `fits`, which is returned; `kind` says what it must be."""
        if not fits:
            self.refuse(name, f"must be {kind}")
        return fits

    def check_patterns(self) -> None:
        """Refuses rank_pattern and alpha_pattern if they are of the wrong kind."""
        for name, fits in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
            patterns = self.config.get(name) or {}
            if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
                kind = "integers" if fits is is_rank else "numbers"
                self.refuse(name, f"must map patterns to positive {kind}")

    def check_target_fields(self) -> None:
        """Refuses target fields of the wrong kind."""
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if not is_names(self.config.get(name)):
                self.refuse(name, "must be a string or a list of strings")
        layers = self.config.get("layers_to_transform")
        indices = layers if isinstance(layers, list) else [0 if layers is None else layers]
        if not all(type(index) is int and index >= 0 for index in indices):
            self.refuse("layers_to_transform", "must be a layer index or a list of them")
        elif layers not in (None, []) and isinstance(self.config.get("target_modules"), str):
            self.refuse("layers_to_transform", "needs target_modules to be a list")

    def check_modules_to_save(self) -> None:
        """Refuses modules_to_save if it is of the wrong kind."""
        saved = self.config.get("modules_to_save")
        fits = not isinstance(saved, str) and is_names(saved)
        self.check_kind("modules_to_save", fits, "a list of strings")

    def check_tokens(self, where: str, tokens: Any) -> bool:
        """Refuses a field that is not a list of the base's token ids; True if it is one."""
        fits = isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)
        if not fits or not tokens:
            self.refuse(where, "must be a list of token ids")
            return False
        if self.embedding is not None and max(tokens) >= self.embedding.in_features:
            count = self.embedding.in_features
            self.refuse(where, f"has token {max(tokens)}, but the base has {count} tokens")
            return False
        return True

    @cached_property
    def embedding(self) -> BaseModule | None:
        """The base's input embedding."""
        return next((m for m in self.base.modules.values() if m.kind == "embedding"), None)

    @cached_property
    def head(self) -> BaseModule | None:
        """The base's output layer."""
        return next((m for m in self.base.modules.values() if m.is_head), None)

    def base_weight(self, module: BaseModule, what: str) -> Tensor | None:
        """Returns the base's weight at a module, fp32, in main memory; None, with a refusal that
        `what` needs it, if it is unknown.
        """
        try:
            return self.base.weight(module.name).cpu()
        except KeyError:
            self.refuse(module.name, f"{what} needs the base's weight, which is not available")
            return None

    def check_bytes(self, where: str, size: int) -> None:
        """Raises AdapterTooLarge if tensors expand beyond the size limit of an adapter."""
        if size > self.limits.max_adapter_bytes:
            raise AdapterTooLarge(
                f"{where} takes {size} bytes when lowered, the limit is "
                f"{self.limits.max_adapter_bytes}",
                field=where,
            )

    def targets(self, kinds: Collection[ModuleKind] = LINEARS) -> frozenset[str]:
        """Returns the names of the targeted modules. Raises AdapterInvalid for a bad pattern."""
        return targeted(self.config, self.base.modules.values(), self.patterns, kinds)

    def check_targets(self, found: Collection[str], targets: Collection[str]) -> None:
        """Refuses modules that have tensors but are not targets, targets without tensors, and
        modules that the base does not have.
        """
        modules = self.base.modules
        for name in sorted(set(found) - modules.keys()):
            self.refuse_missing(name)
        for name in sorted(set(found) & modules.keys() - set(targets)):
            self.refuse(name, "has tensors, but target_modules does not name it")
        for name in sorted(set(targets) - set(found)):
            self.refuse(name, "is named by target_modules, but has no tensors")
        if not targets:
            self.refuse("target_modules", f"matches no module of the base {self.base.name}")

    def refuse_missing(self, name: str) -> None:
        """Refuses a module that is not among those that adapters may change, with the reason."""
        if self.is_router(name):
            self.refuse(name, "is a router of experts, which adapters cannot change")
        else:
            self.refuse(name, f"the base {self.base.name} has no such module")

    def is_router(self, name: str) -> bool:
        """True for the router of a mixture of experts, also by its name in transformers 4."""
        block, _, last = name.replace(".block_sparse_moe.", ".mlp.").rpartition(".")
        has_experts = any(m.startswith(f"{block}.experts.") for m in self.base.modules)
        return last in ("gate", "router") and has_experts and name not in self.base.modules

    def check_shape(self, key: str, tensor: Tensor, *shape: int) -> bool:
        """Refuses a tensor of another shape; True if it has this shape."""
        if tuple(tensor.shape) != shape:
            self.refuse(key, f"has shape {list(tensor.shape)}, expected {list(shape)}")
        return tuple(tensor.shape) == shape

    def bias_difference(self, module: BaseModule, key: str, bias: Tensor) -> Tensor | None:
        """Returns the difference of a trained bias, which PEFT stores, from the base's bias; None,
        with a refusal, if the base has no bias or it has another shape.
        """
        base = self.base.biases.get(module.name)
        if base is None:
            self.refuse(key, f"the base's {module.name} has no bias")
            return None
        return bias.float() - base if self.check_shape(key, bias, *base.shape) else None

    def check_ranks(self, programs: Iterable[ModuleProgram], where: str = "r") -> None:
        """Raises AdapterTooLarge for the first rank above the limit, counted per expert."""
        for program in programs:
            rank = 0 if program.low_rank is None else program.low_rank.rank
            rank //= self.base.modules[program.module].experts or 1
            if rank > self.limits.max_rank:
                raise AdapterTooLarge(
                    f"{program.module} has rank {rank}, the limit is {self.limits.max_rank}",
                    field=where,
                )


def is_number(value: object) -> bool:
    """True for a positive number below MAX_NUMBER that is not a bool."""
    return type(value) in (int, float) and 0 < value < MAX_NUMBER  # type: ignore[operator]


def is_rank(value: object) -> bool:
    """True for a positive integer below MAX_NUMBER."""
    return type(value) is int and is_number(value)


def is_names(value: object) -> bool:
    """True for None, a string, or a list of strings."""
    if isinstance(value, list):
        return all(isinstance(entry, str) for entry in value)
    return value is None or isinstance(value, str)
