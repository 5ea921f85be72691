"""MethodConfig: one method of an AdapterHub adapter, and the tensors of the whole adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import ModuleProgram

Places = dict[str, dict[str, Tensor]]
"""Tensors by place and name. A place is a key's path, such as `layers.0.output_adapters`."""


@dataclass(frozen=True)
class LoweredMethod:
    """Result of lowering one method."""

    family: str
    modules: tuple[ModuleProgram, ...]
    semantics: Mapping[str, Any]
    """Values that decide the answer beside the tensors; they enter the digest."""


@dataclass(frozen=True)
class MethodConfig:
    """Fields of one method while it is lowered, which pops the tensors that it uses."""

    context: LoweringContext
    """Context with the method's own config, and without tensors."""
    places: Places
    """Tensors that no method has popped yet."""
    layers: tuple[int, ...]
    """Layers of the base."""
    model_type: str
    version: tuple[int, int]
    """Version of the library that wrote the adapter."""

    def field(self, name: str, default: Any) -> Any:
        """Returns a field, or `default`, which is the library's."""
        found = self.context.config.get(name)
        return default if found is None else found

    def module(self, name: str) -> BaseModule | None:
        """Returns a module of the base; None, with a refusal, if it has none of this name."""
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
        """Returns the layers that `leave_out` does not name."""
        left_out = self.field("leave_out", [])
        fits = isinstance(left_out, list) and all(type(layer) is int for layer in left_out)
        if not self.context.check_kind("leave_out", fits, "a list of layers"):
            return ()
        return tuple(layer for layer in self.layers if layer not in left_out)

    def pop_tensors(
        self, place: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor] | None:
        """Pops and returns the tensors of a place; None, with refusals, if their names or shapes
        differ from `shapes`.
        """
        found = self.places.pop(place, None)
        if found is None:
            self.context.refuse(place, "is named by the config, but has no tensors")
            return None
        for name in sorted(found.keys() - shapes.keys()):
            self.context.refuse(f"{place}.{name}", "is not a tensor that the config describes")
        for name in sorted(shapes.keys() - found.keys()):
            self.context.refuse(f"{place}.{name}", "is missing")
        if found.keys() != shapes.keys():
            return None
        fits = [
            self.context.check_shape(f"{place}.{n}", found[n], *shape)
            for n, shape in shapes.items()
        ]
        return found if all(fits) else None
