"""MethodConfig: one method of an AdapterHub adapter, and the tensors that all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import ModuleProgram

Places = dict[str, dict[str, Tensor]]
"""Where the library puts them, such as `layers.0.output_adapters` -> tensors by name."""


@dataclass(frozen=True)
class LoweredMethod:
    """What a method comes to."""

    family: str
    modules: tuple[ModuleProgram, ...]
    semantics: Mapping[str, Any]
    """What decides the answer beside the tensors; enters the digest."""


@dataclass(frozen=True)
class MethodConfig:
    """A method's fields on their way to primitives; what it uses is taken out of `places`."""

    context: LoweringContext
    """Its config is the method's own."""
    places: Places
    layers: tuple[int, ...]
    """Of the base."""
    model_type: str
    version: tuple[int, int]
    """Of the library that wrote the adapter."""

    def field(self, name: str, default: Any) -> Any:
        """A field, or the library's default."""
        found = self.context.config.get(name)
        return default if found is None else found

    def module(self, name: str) -> BaseModule | None:
        """A module of the base; None, with a refusal, when it has none of the name."""
        found = self.context.base.modules.get(name)
        if found is None:
            self.context.refuse(name, f"the base {self.context.base.name} has no such module")
        return found

    def check_flags(self, *names: str) -> None:
        """Refuses fields that are neither true nor false."""
        for name in names:
            self.context.check_kind(
                name, isinstance(self.field(name, False), bool), "true or false"
            )

    def used_layers(self) -> tuple[int, ...]:
        """All layers but those that `leave_out` names."""
        left_out = self.field("leave_out", [])
        fits = isinstance(left_out, list) and all(type(layer) is int for layer in left_out)
        if not self.context.check_kind("leave_out", fits, "a list of layers"):
            return ()
        return tuple(layer for layer in self.layers if layer not in left_out)

    def take(self, place: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """The tensors of a place, if they are just these; refused otherwise."""
        found = self.places.pop(place, None)
        if found is None:
            self.context.refuse(place, "is named by the config, but has no tensors")
            return None
        for name in sorted(found.keys() - shapes.keys()):
            self.context.refuse(f"{place}.{name}", "has no place in what the config describes")
        for name in sorted(shapes.keys() - found.keys()):
            self.context.refuse(f"{place}.{name}", "is missing")
        if found.keys() != shapes.keys():
            return None
        fits = [
            self.context.check_shape(f"{place}.{n}", found[n], *shape)
            for n, shape in shapes.items()
        ]
        return found if all(fits) else None
