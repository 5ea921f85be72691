"""Lowers the fully trained modules that `modules_to_save` names to replaced weights, and checks the
copies of the base's weights that PEFT saves along.

Source: `peft.utils.other._set_trainable` (which modules are saved) and
`peft.tuners.tuners_utils.check_target_module_exists` (saved modules are not targets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import ModuleProgram

ROUNDING = 2.0**-7
"""Relative tolerance: a copy, or the base that is served, may have been rounded to bf16."""
TINY = 1e-6
"""Absolute tolerance: fp16 represents few smaller numbers."""


def saved_modules(context: LoweringContext) -> frozenset[str]:
    """Returns the names of the base's modules that `modules_to_save` replaces: those whose name, or
    that of a parent module, ends with an entry, not necessarily at a word boundary.
    """
    entries = tuple(context.config.get("modules_to_save") or ())
    return frozenset(
        module.name
        for module in context.base.modules.values()
        if module.kind != "block" and any(path.endswith(entries) for path in _paths(module.name))
    )


def without_saved(context: LoweringContext, targets: frozenset[str]) -> frozenset[str]:
    """Returns the targets without those that `modules_to_save` replaces, which PEFT does not adapt.

    Raises AdapterInvalid for a bad pattern.
    """
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
    """Returns the program of a fully trained module; None, with refusals, if its tensors do not
    fit. `key` is the weight's.
    """
    if module.kind == "experts":
        context.refuse(module.name, "is named by modules_to_save; experts cannot be replaced")
        return None
    if weight is None:
        context.refuse(module.name, "is named by modules_to_save, but has no tensors")
        return None
    if module.has_bias and bias is None:
        context.refuse(f"{module.name}.bias", "is missing, but its weight is present")
    if not context.check_shape(key, weight, *_shape(module)):
        return None
    difference = None
    if bias is not None:
        difference = context.bias_difference(module, f"{module.name}.bias", bias)
    return ModuleProgram(module.name, bias=difference, weight=_oriented(module, weight))


def check_copy(context: LoweringContext, module: BaseModule, key: str, copy: Tensor) -> None:
    """Refuses a copy of the base's weight that differs from it: PEFT would load the copy over the
    base's weight.
    """
    if not context.check_shape(key, copy, *_shape(module)):
        return
    weight = context.base_weight(module, "a copy of it")
    if weight is not None and not is_close(_oriented(module, copy), weight):
        context.refuse(
            key,
            "differs from the base's weight, which PEFT would overwrite with it; to replace a "
            "weight, name the module in modules_to_save",
        )


def is_close(copy: Tensor, own: Tensor) -> bool:
    """True if a tensor equals the base's up to rounding."""
    return torch.allclose(copy.float(), own, rtol=ROUNDING, atol=TINY)


def _paths(name: str) -> list[str]:
    """Returns the names of all parent modules, then the name."""
    words = name.split(".")
    return [".".join(words[: i + 1]) for i in range(len(words))]


def _shape(module: BaseModule) -> tuple[int, ...]:
    """Returns the shape of the weight as the base stores it."""
    if module.kind == "norm":
        return (module.out_features,)
    if module.kind == "embedding" or module.transposed:
        return (module.in_features, module.out_features)
    return (module.out_features, module.in_features)


def _oriented(module: BaseModule, weight: Tensor) -> Tensor:
    """Returns the weight, [out, in] for a linear."""
    return weight.T.contiguous() if module.transposed else weight
