"""Replaced weights: what `modules_to_save` names, and copies of the base that PEFT saves along.

Source: `peft.utils.other._set_trainable` (which modules are saved) and
`peft.tuners.tuners_utils.check_target_module_exists` (that they are no targets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import ModuleProgram

ROUNDING = 2.0**-7
"""Relative: a copy, or the base that is served, may have been rounded to bf16."""
TINY = 1e-6
"""Absolute: below it half precision knows few numbers."""


def saved_modules(context: LoweringContext) -> frozenset[str]:
    """Names of the base's modules that `modules_to_save` replaces: those whose name, or that of
    something they lie in, ends in an entry, by whole words or not.
    """
    entries = tuple(context.config.get("modules_to_save") or ())
    return frozenset(
        module.name
        for module in context.base.modules.values()
        if module.kind != "block" and any(path.endswith(entries) for path in _paths(module.name))
    )


def without_saved(context: LoweringContext, targets: frozenset[str]) -> frozenset[str]:
    """PEFT adapts no module that it replaces. Raises AdapterInvalid for a bad pattern."""
    entries = context.config.get("modules_to_save") or ()
    patterns = [rf"(^|.*\.){entry}($|\..*)" for entry in entries]
    return frozenset(
        name
        for name in targets
        if not any(
            context.patterns.match(pattern, name, "modules_to_save", whole=False)
            for pattern in patterns
        )
    )


def replacement(
    context: LoweringContext,
    module: BaseModule,
    key: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> ModuleProgram | None:
    """The program of a module that was trained as a whole; None, with refusals, when its tensors
    do not fit. `key` is that of the weight.
    """
    if module.kind == "experts":
        context.refuse(module.name, "is named by modules_to_save; experts cannot be replaced")
        return None
    if weight is None:
        context.refuse(module.name, "is named by modules_to_save, but has no tensors")
        return None
    if module.has_bias and bias is None:
        context.refuse(f"{module.name}.bias", "is missing; its weight is there")
    if not context.check_shape(key, weight, *_shape(module)):
        return None
    difference = None
    if bias is not None:
        difference = context.bias_difference(module, f"{module.name}.bias", bias)
    return ModuleProgram(module.name, bias=difference, weight=_oriented(module, weight))


def check_copy(context: LoweringContext, module: BaseModule, key: str, copy: Tensor) -> None:
    """PEFT loads a copy of the base's weight over the base's own: they must be the same."""
    if not context.check_shape(key, copy, *_shape(module)):
        return
    weight = context.base_weight(module, "a copy of it")
    if weight is not None and not is_close(_oriented(module, copy), weight):
        context.refuse(
            key,
            "is not the base's own weight, which PEFT would load it over; to replace a weight, "
            "name the module in modules_to_save",
        )


def is_close(copy: Tensor, own: Tensor) -> bool:
    """Whether a tensor is the base's own, but for rounding."""
    return torch.allclose(copy.float(), own, rtol=ROUNDING, atol=TINY)


def _paths(name: str) -> list[str]:
    """The name, and those of all that it lies in."""
    words = name.split(".")
    return [".".join(words[: i + 1]) for i in range(len(words))]


def _shape(module: BaseModule) -> tuple[int, ...]:
    """Of the weight as the base keeps it."""
    if module.kind == "norm":
        return (module.out_features,)
    if module.kind == "embedding" or module.transposed:
        return (module.in_features, module.out_features)
    return (module.out_features, module.in_features)


def _oriented(module: BaseModule, weight: Tensor) -> Tensor:
    """[out, in] of a linear."""
    return weight.T.contiguous() if module.transposed else weight
