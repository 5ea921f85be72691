"""Which parameters `target_parameters` names, and where PEFT keeps their pairs.

Source: `peft.tuners.tuners_utils.BaseTuner._inject_parameters` and
`peft.tuners.lora.layer.ParamWrapper`. Every parameter of a module wraps those before it: the pair
of the last one is at the module itself, that of the one before at its `base_layer`, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule


@dataclass(frozen=True)
class Place:
    """A parameter that is adapted."""

    module: str
    """Name that the base's module goes by in BaseSpec."""
    parameter: str
    """Its full name, which patterns are matched with."""


def targeted_parameters(context: LoweringContext) -> dict[tuple[str, int], Place]:
    """(name of the owner, depth of the nesting) -> parameter."""
    wanted = context.config.get("target_parameters") or ()
    owned: dict[str, list[Place]] = {}
    for module in context.base.modules.values():
        parameter = parameter_of(module)
        if any(parameter == name or parameter.endswith(f".{name}") for name in wanted):
            owner = parameter.rpartition(".")[0]
            owned.setdefault(owner, []).append(Place(module.name, parameter))
    if wanted and not owned:
        context.refuse(
            "target_parameters",
            f"matches no parameter of the base {context.base.name} that can be adapted",
        )
    return {
        (owner, depth): place
        for owner, places in owned.items()
        for depth, place in enumerate(reversed(places))
    }


def parameter_of(module: BaseModule) -> str:
    """The full name of the parameter that a pair of this module changes; empty where none can."""
    if module.kind == "experts":
        return module.name
    return f"{module.name}.weight" if module.kind == "linear" and not module.transposed else ""


def by_expert(b: Tensor, experts: int) -> Tensor:
    """PEFT's b [out, rank * experts], the experts of each rank side by side -> [out, experts *
    rank], the ranks of each expert side by side, as in a.
    """
    return b.reshape(b.shape[0], -1, experts).transpose(1, 2).reshape(b.shape)


def pattern_names(places: Mapping[tuple[str, int], Place]) -> dict[str, str]:
    """Name of a module -> the parameter by which patterns know it."""
    return {place.module: place.parameter for place in places.values()}
