"""What PEFT injects into layers: the tensors of each module, lowered one module at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.reading import PREFIX, Reading
from adaplex.adapters.formats.targets import LINEARS
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import BaseModule, ModuleKind, ModuleProgram

Roles = Mapping[str, Tensor]
"""PEFT's name of a parameter -> tensor, of one module."""
LowerOne = Callable[[BaseModule, Roles], ModuleProgram | None]
"""Lowers one module; None, with refusals, when its tensors do not fit."""

BIASES = ("bias", "base_layer.bias")
"""Keys of trained biases; both are the role `bias`."""
ADAPTER_NAME = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
"""Left in the keys of a training checkpoint."""
PACKED_BYTES = 2
"""Of an element, in bf16."""


def by_module(
    reading: Reading,
    family: str,
    roles: Collection[str],
    *,
    shared: Collection[str] = (),
    unsupported: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Module name -> its tensors. Refuses tensors that have no place; the `shared` keys have one of
    their own. `unsupported` tells for parts of keys what serving them would need.
    """
    met: set[str] = set()
    pattern = re.compile(rf"(?P<module>.+?)\.(?P<role>{'|'.join(map(re.escape, roles))})")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in reading.tensors.items():
        name = ADAPTER_NAME.sub("", key)
        if name in shared:
            if name in met:
                reading.refuse(key, "is given twice")
            met.add(name)
            continue
        need = next((why for part, why in (unsupported or {}).items() if part in name), None)
        if not name.startswith(PREFIX):
            reading.refuse(key, f"does not begin with {PREFIX}")
        elif need is not None:
            reading.refuse(key, need)
        elif place := pattern.fullmatch(name.removeprefix(PREFIX)):
            role = place["role"].removeprefix("base_layer.")
            module = found.setdefault(place["module"], {})
            if role in module:
                reading.refuse(key, "is given twice")
            module[role] = tensor
        else:
            reading.refuse(key, f"is not a tensor of {family} that this server knows")
    return found


def shared_tensor(reading: Reading, name: str) -> Tensor | None:
    """A tensor of the whole adapter, if the checkpoint has it."""
    keys = [key for key in reading.tensors if ADAPTER_NAME.sub("", key) == name]
    return reading.tensors[keys[0]] if keys else None


def lower_modules(
    reading: Reading,
    found: Mapping[str, Roles],
    lower_one: LowerOne,
    *,
    kinds: Collection[ModuleKind] = LINEARS,
    only: str = "",
) -> tuple[ModuleProgram, ...]:
    """Lowers every module, by name. `only` is what the config calls it when just the targets'
    biases are trained, for families that can train biases.

    Raises AdapterInvalid with every refusal.
    """
    lowered: list[ModuleProgram | None] = []
    with reading.collecting():
        targets = reading.targets(kinds)
        adapted = {name for name, roles in found.items() if roles.keys() - {"bias"} or not only}
        reading.check_targets(adapted, targets)
        for name in sorted(found):
            if (module := reading.base.modules.get(name)) is not None:
                program = lower_one(module, found[name]) if name in adapted else ModuleProgram(name)
                if only and "bias" in found[name]:
                    _check_bias(reading, name, name in targets, only)
                    bias = reading.bias_difference(module, f"{name}.bias", found[name]["bias"])
                    program = replace(program or ModuleProgram(name), bias=bias)
                lowered.append(program)
            elif name not in adapted:
                reading.refuse(name, f"the base {reading.base.name} has no such module")
    reading.raise_refused()
    return tuple(program for program in lowered if program is not None)


def all_there(reading: Reading, module: BaseModule, roles: Roles, *wanted: str) -> bool:
    """Refuses each of the wanted parameters that is missing; tells whether none is."""
    missing = [role for role in wanted if role not in roles]
    for role in missing:
        reading.refuse(f"{PREFIX}{module.name}.{role}", "is missing")
    return not missing


def is_linear(reading: Reading, module: BaseModule, family: str) -> bool:
    """Refuses a Conv1D, for families that PEFT has for torch's linears alone."""
    if module.transposed:
        reading.refuse(module.name, f"is a Conv1D, which PEFT's {family} does not take")
    return not module.transposed


class WrittenOut:
    """Adds up the pairs that are larger than the tensors they are made of."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limit = limits.max_adapter_bytes
        self._bytes = 0

    def add(self, module: BaseModule, rank: int) -> None:
        """Raises AdapterTooLarge when one more pair is too much."""
        self._bytes += rank * (module.in_features + module.out_features) * PACKED_BYTES
        if self._bytes > self._limit:
            raise AdapterTooLarge(
                f"its low-rank pairs, written out, take more than {self._limit} bytes, the limit "
                f"of an adapter: {module.name} alone has rank {rank}",
                field="r",
            )


def _check_bias(reading: Reading, name: str, is_target: bool, only: str) -> None:
    """The config says which modules may carry a trained bias."""
    kind = reading.config.get("bias", "none")
    if kind == "none" or (kind == only and not is_target):
        reading.refuse(f"{name}.bias", f"is there, but bias is {kind!r}")


def check_bias_field(reading: Reading, only: str) -> None:
    """Refuses a `bias` that PEFT does not know."""
    kinds = ("none", "all", only)
    fits = reading.config.get("bias", "none") in kinds
    reading.check_kind("bias", fits, f"one of {', '.join(kinds)}")


def check_has_targets(reading: Reading) -> None:
    """Refuses fields about targets that are of the wrong kind, or name none."""
    reading.check_target_fields()
    if not reading.config.get("target_modules"):
        reading.refuse("target_modules", "is missing; PEFT writes it when it saves")
