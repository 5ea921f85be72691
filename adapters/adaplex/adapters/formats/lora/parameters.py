"""Finds the parameters that `target_parameters` names, and the keys of their pairs.

Source: `peft.tuners.tuners_utils.BaseTuner._inject_parameters` and
`peft.tuners.lora.layer.ParamWrapper`. Each adapted parameter of a module wraps the previous ones:
the pair of the last is stored at the module, that of the one before at its `base_layer`, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule


@dataclass(frozen=True)
class AdaptedParameter:
    """A parameter that `target_parameters` names."""

    module: str
    """Name of its module in BaseSpec."""
    name: str
    """Full name of the parameter, which patterns match."""


Parameters = Mapping[tuple[str, int], AdaptedParameter]
"""Adapted parameters by (name of the owning module, nesting depth)."""


def targeted_parameters(context: LoweringContext) -> Parameters:
    """Returns the parameters that `target_parameters` names; refuses the field if none matches."""
    targets = context.config.get("target_parameters") or ()
    by_owner: dict[str, list[AdaptedParameter]] = {}
    for module in context.base.modules.values():
        name = parameter_of(module)
        if any(name == target or name.endswith(f".{target}") for target in targets):
            owner = name.rpartition(".")[0]
            by_owner.setdefault(owner, []).append(AdaptedParameter(module.name, name))
    blocks = {name.rpartition(".experts.")[0] for name in context.base.modules}
    routers = [f".{block}.{last}.weight" for block in blocks - {""} for last in ("gate", "router")]
    has_router = any(router.endswith(f".{target}") for router in routers for target in targets)
    if targets and not by_owner and not has_router:  # a router is refused by its module
        context.refuse(
            "target_parameters",
            f"matches no parameter of the base {context.base.name} that can be adapted",
        )
    return {
        (owner, depth): parameter
        for owner, parameters in by_owner.items()
        for depth, parameter in enumerate(reversed(parameters))
    }


def parameter_of(module: BaseModule) -> str:
    """Returns the full name of the parameter that a pair at this module changes; empty if the
    module cannot have one.
    """
    if module.kind == "experts":
        return module.name
    return f"{module.name}.weight" if module.kind == "linear" and not module.transposed else ""


def by_expert(b: Tensor, experts: int) -> Tensor:
    """Returns b [out, experts * rank], ordered by expert as `a` is, from PEFT's b
    [out, rank * experts], which is ordered by rank.
    """
    return b.reshape(b.shape[0], -1, experts).transpose(1, 2).reshape(b.shape)


def pattern_names(parameters: Parameters) -> dict[str, str]:
    """Returns the full parameter name that patterns match, by module name."""
    return {parameter.module: parameter.name for parameter in parameters.values()}
