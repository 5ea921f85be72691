"""PEFT types that have no primitive of their own: merged weights, which PEFT itself computes.

Needs the extra `adaplex[peft]`. The config is checked here, field by field; patterns are matched
here too, so that PEFT is given whole module names and plain numbers only. Which tensors there must
be, and of which shapes, PEFT says by what it would save.
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
"""Fields that end so map patterns of module names to values."""
TRAINING_ONLY = frozenset(["fan_in_fan_out", "init_weights", "bias"])
"""Fields of most types: how training began, how the base stores weights, and what is checked."""
UNSUPPORTED = {
    "trainable_token_indices": "needs replaced embedding rows beside merged weights",
}
POSITIONS = ".shira_indices"
"""Tensors that hold rows and columns of a weight."""
DENSE = ("", "bf16", "fp32")
"""Quantizations that leave the weights as they were trained on."""
SEEDS = ("seed", "prng_key")
"""Fields that end so may be any whole number."""
MAX_SEED = 2**63 - 1
MAX_TEXT = 40
"""Characters of a field that names a variant."""
SIGNS = (
    "it rests on a decomposition of the base's weights, which other machines may make differently"
)


class MergedOnly:
    """The format of one PEFT type; see the module's docstring."""

    def __init__(self, kind: PeftKind) -> None:
        self._kind, self.family = kind, kind.name.lower()
        self.semantic_fields = kind.fields | TARGET_FIELDS | {"peft_type", "modules_to_save"}
        refused = ["trained biases"]
        refused += [f"{name} other than {str(value).lower()}" for name, value in kind.required]
        refused += ["quantized bases"] * kind.exact_base
        primitives = ("merged weight", *(("bias",) * kind.moves_bias), "replaced weight")
        self.about = FormatRow(kind.title, primitives, ", ".join(refused), extra="adaplex[peft]")

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format. What the tensors' values lead to shows when a weight is merged."""
        if not is_installed():
            raise AdapterInvalid.because(
                "peft_type",
                f"{self._kind.name} is merged by PEFT, which is not installed here: "
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
        return Lowered(tuple(programs), warnings=(SIGNS,) if self._kind.exact_base else ())


MERGED_ONLY: Mapping[str, MergedOnly] = {kind.name: MergedOnly(kind) for kind in KINDS}
"""PEFT's `peft_type` -> format."""


def _check_config(context: LoweringContext, kind: PeftKind) -> None:
    """Refuses fields that are unknown, of the wrong kind, or beyond what memory and time allow."""
    config = context.config
    harmless = COMMON_FIELDS | kind.harmless | TRAINING_ONLY
    used = kind.fields | TARGET_FIELDS | {"peft_type", "modules_to_save"}
    context.check_fields(kind.title, used, harmless, UNSUPPORTED)
    saved_too = config.get("modules_to_save")
    context.check_kind("modules_to_save", is_names(saved_too), "a list of strings")
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
            f"{kind.name} rests on a decomposition of the base's weights as they were when it was "
            f"trained; this base is {context.base.quantization}: serve it in bf16 or fp32",
        )
    most = dict(kind.loops) | ({"r": context.limits.max_rank} if kind.shared else {})
    for name in sorted(kind.fields & config.keys()):
        values = config[name] or {} if name.endswith(PATTERN) else {"": config[name]}
        if not isinstance(values, dict):
            context.refuse(name, "must map patterns to numbers")
            continue
        bound = most.get(name, _bound(context, name))
        for value in values.values():
            if problem := _problem(value, bound):
                context.refuse(name, problem)


def _bound(context: LoweringContext, name: str) -> int:
    """The most that a whole number can mean: elements of all tensors, or of a side of a weight."""
    if name.endswith(SEEDS):
        return MAX_SEED
    sides = (max(m.in_features, m.out_features) for m in context.base.modules.values())
    return max([*sides, sum(tensor.numel() for tensor in context.tensors.values())])


def _problem(value: object, bound: int) -> str:
    """What is wrong with the value of a field, if anything."""
    if value is None or isinstance(value, bool | float):
        return ""
    if isinstance(value, int):
        return "" if 0 <= value <= bound else f"is {value}, the limit is {bound}"
    if isinstance(value, str):
        return "" if len(value) <= MAX_TEXT else f"is longer than {MAX_TEXT} characters"
    return "must be a number, a word, true or false"


def _targets(context: LoweringContext) -> tuple[BaseModule, ...]:
    """The linears that the config targets, in the base's order. Raises AdapterInvalid."""
    names = without_saved(context, context.targets())
    if not names:
        raise AdapterInvalid.because(
            "target_modules", f"matches no linear of the base {context.base.name}"
        )
    return tuple(module for name, module in context.base.modules.items() if name in names)


def _replaced(context: LoweringContext) -> tuple[list[ModuleProgram], set[str]]:
    """The programs of modules that `modules_to_save` names, and the keys of their tensors."""
    programs, keys = [], set[str]()
    for name in sorted(saved_modules(context)):
        weight, bias = f"{PREFIX}{name}.weight", f"{PREFIX}{name}.bias"
        get = context.tensors.get
        made = replacement(context, context.base.modules[name], weight, get(weight), get(bias))
        programs += [made] if made is not None else []
        keys |= {weight, bias}
    return programs, keys


def _recipe(context: LoweringContext, kind: PeftKind, modules: Sequence[BaseModule]) -> Recipe:
    """What PEFT is told; each pattern as the modules that it matches. Raises AdapterInvalid."""
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
    """What PEFT would save for these modules. Of modules that are alike one is built, unless the
    kind shares tensors between them.
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
    """The checkpoint must hold just the tensors that PEFT would save."""
    for key in sorted(expected.keys() - tensors.keys()):
        context.refuse(key, "is missing")
    for key in sorted(tensors.keys() - expected.keys()):
        context.refuse(key, "is not a tensor that PEFT saves for this config on this base")
    for key in sorted(expected.keys() & tensors.keys()):
        context.check_shape(key, tensors[key], *expected[key].shape)
        if expected[key].is_real and not tensors[key].is_floating_point():
            context.refuse(key, f"has dtype {tensors[key].dtype}, expected real numbers")
        if key.endswith(POSITIONS):
            _check_positions(context, key)


def _check_positions(context: LoweringContext, key: str) -> None:
    """PEFT writes to the rows and columns [2, count] that the checkpoint names without looking."""
    module = context.base.modules[key.removeprefix(PREFIX).removesuffix(POSITIONS)]
    sides = torch.tensor([[module.out_features], [module.in_features]])
    positions = context.tensors[key]
    if positions.shape[:1] == (2,) and not bool(((positions >= 0) & (positions < sides)).all()):
        context.refuse(key, f"names an element outside of {sides.flatten().tolist()}")


class _Merger:
    """Merges one adapter, module by module. Thread-safe; it keeps nothing of what it makes."""

    def __init__(
        self, recipe: Recipe, modules: tuple[BaseModule, ...], tensors: Mapping[str, Tensor]
    ) -> None:
        self._recipe, self._tensors = recipe, tensors
        self._shared = SharedTree(recipe, modules, tensors) if recipe.kind.shared else None

    def program(self, module: BaseModule, base: BaseSpec) -> ModuleProgram:
        """The primitives of one linear. Raises AdapterInvalid for values that cannot be merged."""
        bias = None
        if self._recipe.kind.moves_bias and module.has_bias:
            moved = self._merge(module, base.weight(module.name)).bias
            bias = moved.detach() - base.biases[module.name]
        return ModuleProgram(module.name, bias=bias, transform=partial(self._weight, module))

    def _weight(self, module: BaseModule, weight: Tensor) -> Tensor:
        """A Transform. Raises AdapterInvalid for values that cannot be merged."""
        made: Tensor = self._merge(module, weight).weight.detach()
        made = made.T.contiguous() if module.transposed else made
        if made.shape != weight.shape or not bool(torch.isfinite(made).all()):
            raise AdapterInvalid.because(module.name, "merged, its weight is not finite")
        return made.to(weight.device)

    def _merge(self, module: BaseModule, weight: Tensor) -> Any:
        """PEFT's merged linear."""
        if self._shared is not None:
            return self._shared.merge(module, weight)
        own = f"{PREFIX}{module.name}."
        tensors = {key: t for key, t in self._tensors.items() if key.startswith(own)}
        return merge_alone(self._recipe, module, weight, tensors)
