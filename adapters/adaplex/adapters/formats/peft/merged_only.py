"""PEFT types without a primitive of their own, served as merged weights that PEFT computes.

Needs the extra `adaplex[peft]`. Every config field is checked here, and patterns are matched here,
so that PEFT receives only full module names and plain values. The expected tensors and shapes are
those that PEFT would save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import (
    COMMON_FIELDS,
    PREFIX,
    TARGET_FIELDS,
    LoweringContext,
    is_names,
)
from adaplex.adapters.formats.modules_to_save import replacement, saved_modules, without_saved
from adaplex.adapters.formats.peft.build import (
    Recipe,
    SavedTensor,
    SharedTree,
    is_installed,
    merge_alone,
    saved_tensors,
)
from adaplex.adapters.formats.peft.kinds import KINDS, PeftKind
from adaplex.adapters.formats.targets import pattern_value
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

PATTERN = "_pattern"
"""Suffix of config fields that map patterns of module names to values."""
TRAINING_ONLY = frozenset(["fan_in_fan_out", "init_weights", "bias"])
"""Fields of most types that do not change the answer; `bias` is checked separately."""
UNSUPPORTED = {
    "trainable_token_indices": "needs replaced embedding rows beside merged weights",
}
"""Config fields that change the answer but are not served, and what serving them would need."""
INDICES = ".shira_indices"
"""Suffix of tensors that hold row and column indices of a weight."""
DENSE = ("", "bf16", "fp32")
"""Formats of the base that do not change its weights."""
SEEDS = ("seed", "prng_key")
"""Suffixes of config fields that may be any integer from 0 to MAX_SEED."""
MAX_SEED = 2**63 - 1
MAX_TEXT = 40
"""Maximum characters of a field that names a variant."""
EXACT_BASE_WARNING = (
    "it depends on a decomposition of the base's weights, which may differ between machines"
)


class MergedOnly:
    """Format of one PEFT type; see the module's docstring."""

    def __init__(self, kind: PeftKind) -> None:
        self._kind, self.family = kind, kind.name.lower()
        self.semantic_fields = kind.fields | TARGET_FIELDS | {"peft_type", "modules_to_save"}
        refused = ["trained biases"]
        refused += [f"{name} other than {str(value).lower()}" for name, value in kind.required]
        refused += ["quantized bases"] * kind.exact_base
        primitives = ("merged weight", *(("bias",) * kind.moves_bias), "replaced weight")
        self.about = FormatRow(kind.title, primitives, ", ".join(refused), extra="adaplex[peft]")

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format. Invalid values of tensors are detected only when a weight is merged."""
        if not is_installed():
            raise AdapterInvalid.because(
                "peft_type",
                f"{self._kind.name} is merged by PEFT, which is not installed: "
                "pip install 'adaplex[peft]'",
            )
        context = LoweringContext(checkpoint, base, limits)
        _check_config(context, self._kind)
        context.raise_refusals()
        modules = _targets(context)
        replaced, keys = _replaced(context)
        recipe = _recipe(context, self._kind, modules)
        tensors = {key: t for key, t in checkpoint.tensors.items() if key not in keys}
        _check_tensors(context, tensors, _expected(recipe, modules))
        context.raise_refusals()
        merger = _Merger(recipe, modules, tensors)
        programs = [*replaced, *(merger.program(module, base) for module in modules)]
        programs.sort(key=lambda program: program.module)
        warnings = (EXACT_BASE_WARNING,) if self._kind.exact_base else ()
        return Lowered(tuple(programs), warnings=warnings)


MERGED_ONLY: Mapping[str, MergedOnly] = {kind.name: MergedOnly(kind) for kind in KINDS}
"""Format by PEFT's `peft_type`."""


def _check_config(context: LoweringContext, kind: PeftKind) -> None:
    """Refuses fields that are unknown, of the wrong kind, or would need too much memory or time."""
    config = context.config
    harmless = COMMON_FIELDS | kind.harmless | TRAINING_ONLY
    used = kind.fields | TARGET_FIELDS | {"peft_type", "modules_to_save"}
    context.check_fields(kind.title, used, harmless, UNSUPPORTED)
    context.check_kind(
        "modules_to_save", is_names(config.get("modules_to_save")), "a list of strings"
    )
    if config.get("bias", "none") not in (None, "none"):
        context.refuse("bias", "trained biases beside merged weights are not served")
    context.check_target_fields()
    if not config.get("target_modules"):
        context.refuse("target_modules", "is missing")
    for name, value in kind.required:
        if config.get(name, value) is not value:
            context.refuse(name, f"must be {str(value).lower()} to be served")
    if kind.exact_base and context.base.quantization not in DENSE:
        context.refuse(
            "peft_type",
            f"{kind.name} depends on a decomposition of the unquantized base's weights; "
            f"this base is {context.base.quantization}: serve it in bf16 or fp32",
        )
    bounds = dict(kind.loops) | ({"r": context.limits.max_rank} if kind.shared else {})
    for name in sorted(kind.fields & config.keys()):
        values = config[name] or {} if name.endswith(PATTERN) else {"": config[name]}
        if not isinstance(values, dict):
            context.refuse(name, "must map patterns to numbers")
            continue
        bound = bounds.get(name, _integer_bound(context, name))
        for value in values.values():
            if problem := _value_problem(value, bound):
                context.refuse(name, problem)


def _integer_bound(context: LoweringContext, name: str) -> int:
    """Returns the largest sensible integer of a field: the number of elements of all tensors, or
    the largest side of a weight; for seeds MAX_SEED.
    """
    if name.endswith(SEEDS):
        return MAX_SEED
    sides = (max(m.in_features, m.out_features) for m in context.base.modules.values())
    return max([*sides, sum(tensor.numel() for tensor in context.tensors.values())])


def _value_problem(value: object, bound: int) -> str:
    """Returns what is wrong with the value of a field; empty if nothing is."""
    if value is None or isinstance(value, bool | float):
        return ""
    if isinstance(value, int):
        return "" if 0 <= value <= bound else f"is {value}, the limit is {bound}"
    if isinstance(value, str):
        return "" if len(value) <= MAX_TEXT else f"is longer than {MAX_TEXT} characters"
    return "must be a number, a string, true or false"


def _targets(context: LoweringContext) -> tuple[BaseModule, ...]:
    """Returns the targeted linears, in the base's order. Raises AdapterInvalid."""
    names = without_saved(context, context.targets())
    if not names:
        raise AdapterInvalid.because(
            "target_modules", f"matches no linear of the base {context.base.name}"
        )
    return tuple(module for name, module in context.base.modules.items() if name in names)


def _replaced(context: LoweringContext) -> tuple[list[ModuleProgram], set[str]]:
    """Returns the programs of modules that `modules_to_save` names, and their tensors' keys."""
    programs, keys = [], set[str]()
    for name in sorted(saved_modules(context)):
        weight, bias = f"{PREFIX}{name}.weight", f"{PREFIX}{name}.bias"
        get = context.tensors.get
        made = replacement(context, context.base.modules[name], weight, get(weight), get(bias))
        programs += [made] if made is not None else []
        keys |= {weight, bias}
    return programs, keys


def _recipe(context: LoweringContext, kind: PeftKind, modules: Sequence[BaseModule]) -> Recipe:
    """Returns the config as a recipe, patterns matched to modules. Raises AdapterInvalid."""
    config, plain, patterns = context.config, dict[str, Any](), dict[str, dict[str, Any]]()
    for name in sorted(kind.fields & config.keys()):
        if not name.endswith(PATTERN):
            plain[name] = config[name]
        elif config[name]:
            values = {
                m.name: pattern_value(config, name, m.name, None, context.patterns) for m in modules
            }
            patterns[name] = {m: value for m, value in values.items() if value is not None}
    return Recipe(kind, plain, patterns, context.base.biases)


def _expected(recipe: Recipe, modules: Sequence[BaseModule]) -> dict[str, SavedTensor]:
    """Returns the tensors that PEFT would save for these modules, by key. Of modules with equal
    shapes only one is built, unless modules share tensors.
    """
    meta = recipe.kind.shapeless
    if recipe.kind.shared:
        return saved_tensors(recipe.build(modules, meta=meta))
    found: dict[str, SavedTensor] = {}
    alike: dict[object, dict[str, SavedTensor]] = {}
    for module in modules:
        own = f"{PREFIX}{module.name}"
        key = recipe.signature(module)
        if key not in alike:
            built = saved_tensors(recipe.build([module], meta=meta))
            alike[key] = {name.removeprefix(own): entry for name, entry in built.items()}
        found |= {f"{own}{end}": entry for end, entry in alike[key].items()}
    return found


def _check_tensors(
    context: LoweringContext, tensors: Mapping[str, Tensor], expected: Mapping[str, SavedTensor]
) -> None:
    """Refuses missing and additional tensors, and those of another shape or kind."""
    for key in sorted(expected.keys() - tensors.keys()):
        context.refuse(key, "is missing")
    for key in sorted(tensors.keys() - expected.keys()):
        context.refuse(key, "is not a tensor that PEFT saves for this config on this base")
    for key in sorted(expected.keys() & tensors.keys()):
        context.check_shape(key, tensors[key], *expected[key].shape)
        if expected[key].is_real and not tensors[key].is_floating_point():
            context.refuse(key, f"has dtype {tensors[key].dtype}, expected floating-point")
        if key.endswith(INDICES):
            _check_indices(context, key)


def _check_indices(context: LoweringContext, key: str) -> None:
    """Refuses row and column indices [2, count] outside of the weight: PEFT writes to them
    unchecked.
    """
    module = context.base.modules[key.removeprefix(PREFIX).removesuffix(INDICES)]
    sides = torch.tensor([[module.out_features], [module.in_features]])
    indices = context.tensors[key]
    if indices.shape[:1] == (2,) and not bool(((indices >= 0) & (indices < sides)).all()):
        context.refuse(key, f"has an index outside of the weight {sides.flatten().tolist()}")


class _Merger:
    """Merges one adapter, module by module. Thread-safe; does not cache merged weights."""

    def __init__(
        self, recipe: Recipe, modules: tuple[BaseModule, ...], tensors: Mapping[str, Tensor]
    ) -> None:
        self._recipe, self._tensors = recipe, tensors
        self._shared = SharedTree(recipe, modules, tensors) if recipe.kind.shared else None

    def program(self, module: BaseModule, base: BaseSpec) -> ModuleProgram:
        """Returns the program of one linear. Raises AdapterInvalid if it cannot be merged."""
        bias = None
        if self._recipe.kind.moves_bias and module.has_bias:
            moved = self._merge(module, base.weight(module.name)).bias
            bias = moved.detach() - base.biases[module.name]
        return ModuleProgram(module.name, bias=bias, transform=partial(self._weight, module))

    def _weight(self, module: BaseModule, weight: Tensor) -> Tensor:
        """Returns the merged weight; a Transform. Raises AdapterInvalid if it cannot be merged."""
        made: Tensor = self._merge(module, weight).weight.detach()
        made = made.T.contiguous() if module.transposed else made
        if made.shape != weight.shape or not bool(torch.isfinite(made).all()):
            raise AdapterInvalid.because(module.name, "its merged weight is not finite")
        return made.to(weight.device)

    def _merge(self, module: BaseModule, weight: Tensor) -> Any:
        """Returns PEFT's merged linear."""
        if self._shared is not None:
            return self._shared.merge(module, weight)
        own = f"{PREFIX}{module.name}."
        tensors = {key: t for key, t in self._tensors.items() if key.startswith(own)}
        return merge_alone(self._recipe, module, weight, tensors)
