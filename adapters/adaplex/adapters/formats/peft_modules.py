"""Lowers the parameters that PEFT injects into modules, one module at a time.

Besides its own parameters, a family may have fully trained modules, which `modules_to_save` names,
trained biases, and copies of the base's weights that PEFT saves along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.modules_to_save import (
    check_copy,
    replacement,
    saved_modules,
    without_saved,
)
from adaplex.adapters.formats.targets import LINEARS
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, ModuleKind
from adaplex.adapters.program.program import ModuleProgram

Roles = Mapping[str, Tensor]
"""Tensors of one module by PEFT's parameter name."""
LowerOne = Callable[[BaseModule, Roles], ModuleProgram | None]
"""Lowers one module; returns None, with refusals, if its tensors do not fit."""

SAVED: Mapping[str, str] = {
    "weight": "weight",
    "bias": "bias",
    "modules_to_save.weight": "weight",
    "modules_to_save.bias": "bias",
    "base_layer.weight": "copy",
    "base_layer.bias": "bias",
}
"""Suffix of a tensor key that any family may have -> role."""
SAVED_ROLES = frozenset(SAVED.values())
ADAPTER_NAME = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
"""Adapter name in the keys of a training checkpoint, which PEFT removes when it saves."""
PACKED_BYTES = 2
"""Bytes of a packed element, in bf16."""


def tensors_by_module(
    context: LoweringContext,
    family: str,
    roles: Collection[str],
    *,
    shared: Collection[str] = (),
    unsupported: Mapping[str, str] | None = None,
    more: Mapping[str, str] = SAVED,
    prefix: str = PREFIX,
) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors by module name and role, and refuses tensors that match no role.

    `roles` are the family's own, `more` those of any family; `shared` are keys of tensors that
    belong to no module. `unsupported` maps substrings of keys to what serving them would need.
    """
    seen: set[str] = set()
    known = {role: role for role in roles} | {k: v for k, v in more.items() if k not in roles}
    pattern = re.compile(rf"(?P<module>.+?)\.(?P<role>{'|'.join(map(re.escape, known))})")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in context.tensors.items():
        name = ADAPTER_NAME.sub("", key)
        need = next((why for part, why in (unsupported or {}).items() if part in name), None)
        if name in shared:
            if name in seen:
                context.refuse(key, "is given twice")
            seen.add(name)
        elif not name.startswith(prefix):
            context.refuse(key, f"does not begin with {prefix}")
        elif need is not None:
            context.refuse(key, need)
        elif place := pattern.fullmatch(name.removeprefix(prefix)):
            module, role = found.setdefault(place["module"], {}), known[place["role"]]
            if role in module:
                context.refuse(key, "is given twice")
            module[role] = tensor
        else:
            context.refuse(key, f"is not a known tensor of {family}")
    return found


def shared_tensor(context: LoweringContext, name: str) -> Tensor | None:
    """Returns a tensor that belongs to no module, or None if the checkpoint has none."""
    keys = [key for key in context.tensors if ADAPTER_NAME.sub("", key) == name]
    return context.tensors[keys[0]] if keys else None


def lower_modules(
    context: LoweringContext,
    found: Mapping[str, Roles],
    lower_one: LowerOne,
    *,
    kinds: Collection[ModuleKind] = LINEARS,
    only: str = "",
) -> tuple[ModuleProgram, ...]:
    """Returns the programs of all modules, sorted by name.

    `only` is the family's value of the config field `bias` for training the targets' biases only;
    empty for families that train no biases. Raises AdapterInvalid with every refusal.
    """
    lowered: list[ModuleProgram | None] = []
    with context.collect_refusals():
        targets = without_saved(context, context.targets(kinds))
        adapted = {name for name, roles in found.items() if roles.keys() - SAVED_ROLES}
        context.check_targets(adapted, targets)
        lowered += saved_programs(context, found, adapted)
        for name in sorted(found.keys() - saved_modules(context)):
            if (module := context.base.modules.get(name)) is not None:
                program = lower_one(module, found[name]) if name in adapted else None
                bias = _trained_bias(context, module, found[name], name in targets, only)
                if bias is not None:
                    program = replace(program or ModuleProgram(name), bias=bias)
                lowered.append(program)
            elif name not in adapted:
                context.refuse(name, f"the base {context.base.name} has no such module")
    context.raise_refusals()
    programs = (program for program in lowered if program is not None)
    return tuple(sorted(programs, key=lambda program: program.module))


def saved_programs(
    context: LoweringContext, found: Mapping[str, Roles], adapted: Collection[str] = ()
) -> list[ModuleProgram | None]:
    """Returns the programs of the modules that `modules_to_save` names, and refuses the weights of
    other modules and of modules that are adapted as well.
    """
    saved = saved_modules(context)
    for name, roles in found.items():
        module = context.base.modules.get(name)
        if "weight" in roles and name not in saved:
            context.refuse(f"{name}.weight", "is present, but modules_to_save does not name it")
        if "copy" in roles and module is not None:
            check_copy(context, module, f"{PREFIX}{name}.base_layer.weight", roles["copy"])
    for name in sorted(saved.intersection(adapted)):
        context.refuse(name, "is named by modules_to_save, and is adapted as well")
    roles_of = {name: found.get(name, {}) for name in sorted(saved)}
    return [
        replacement(
            context, context.base.modules[name], name, roles.get("weight"), roles.get("bias")
        )
        for name, roles in roles_of.items()
    ]


def check_present(context: LoweringContext, module: BaseModule, roles: Roles, *wanted: str) -> bool:
    """Refuses each wanted parameter that is missing; True if none is."""
    missing = [role for role in wanted if role not in roles]
    for role in missing:
        context.refuse(f"{PREFIX}{module.name}.{role}", "is missing")
    return not missing


def check_linear(context: LoweringContext, module: BaseModule, family: str) -> bool:
    """Refuses a Conv1D, for families that PEFT implements only for torch's linears; True if the
    module is not one.
    """
    if module.transposed:
        context.refuse(module.name, f"is a Conv1D, which PEFT's {family} does not support")
    return not module.transposed


class ExpandedSize:
    """Limits the bytes of low-rank pairs that are larger than the tensors they are built from."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limit = limits.max_adapter_bytes
        self._bytes = 0

    def add(self, module: BaseModule, rank: int) -> None:
        """Adds the bytes of a pair. Raises AdapterTooLarge if the total exceeds the limit."""
        self._bytes += rank * (module.in_features + module.out_features) * PACKED_BYTES
        if self._bytes > self._limit:
            raise AdapterTooLarge(
                f"its low-rank pairs, expanded, take more than {self._limit} bytes, the limit "
                f"of an adapter: {module.name} alone has rank {rank}",
                field="r",
            )


def check_bias_field(context: LoweringContext, only: str) -> None:
    """Refuses a value of `bias` that PEFT does not accept."""
    kinds = ("none", "all", only)
    fits = context.config.get("bias", "none") in kinds
    context.check_kind("bias", fits, f"one of {', '.join(kinds)}")


def check_has_targets(context: LoweringContext) -> None:
    """Refuses target fields and modules_to_save of the wrong kind, and missing target_modules."""
    context.check_target_fields()
    context.check_modules_to_save()
    if not context.config.get("target_modules"):
        context.refuse("target_modules", "is missing; PEFT writes it when saving")


def _trained_bias(
    context: LoweringContext, module: BaseModule, roles: Roles, is_target: bool, only: str
) -> Tensor | None:
    """Returns the difference of a trained bias from the base's, or None without one; refuses
    biases that the config field `bias` excludes.
    """
    if "bias" not in roles:
        return None
    kind = context.config.get("bias", "none")
    if not only:
        context.refuse(f"{module.name}.bias", "is present, but this family trains no biases")
    elif kind == "none" or (kind == only and not is_target):
        context.refuse(f"{module.name}.bias", f"is present, but bias is {kind!r}")
    return context.bias_difference(module, f"{module.name}.bias", roles["bias"])
