"""StandIns: modules that are imported when something of them is read, not when they are named."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """Stands for a module that is not imported yet. It has the attributes that it is given, and
    imports the module, in its own place, where any other is read.
    """

    def __init__(self, name: str, attributes: Mapping[str, object]) -> None:
        super().__init__(name)
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # attributes of modules, which import systems look for
            raise AttributeError(name)
        return getattr(import_in_place(self.__name__), name)


class StandIns(MetaPathFinder, Loader):
    """Finds a StandIn for each of some submodules, as long as it is in `sys.meta_path`."""

    def __init__(
        self,
        attributes: Mapping[str, Mapping[str, object]],
        *,
        leaves: Collection[str] = (),
        first: Mapping[str, str] | None = None,
    ) -> None:
        """`attributes` has, by the name of each module, what its stand-in has; `leaves` are
        submodules that do not import their parents; `first` names, by module, another one that has
        to be imported before it.
        """
        self._attributes = {n: a for n, a in attributes.items() if n not in sys.modules}
        self._leaves = leaves
        self._first = first or {}

    def find_spec(self, fullname: str, path: Any, target: object = None) -> ModuleSpec | None:
        """Returns the spec of a stand-in; of a module that importing its parent, in the place of
        what stands for it, has loaded; or None for modules that others find.
        """
        if fullname in self._attributes:
            found = PathFinder.find_spec(fullname, path)
            if found is None:
                return None
            spec = ModuleSpec(fullname, self)
            spec.submodule_search_locations = found.submodule_search_locations
            return spec
        if (before := self._first.get(fullname)) is not None:
            import_in_place(before)
        parent = fullname.rpartition(".")[0]
        if fullname in self._leaves or not isinstance(sys.modules.get(parent), StandIn):
            return None
        import_in_place(parent)
        return ModuleSpec(fullname, self) if fullname in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Returns the loaded module, or what stands for it."""
        if spec.name in sys.modules:
            return sys.modules[spec.name]
        return StandIn(spec.name, self._attributes[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: the module is loaded, or stands for one that is not."""

    def forget(self, name: str) -> None:
        """Removes what stands for a module, which is then found as without this finder."""
        self._attributes.pop(name, None)
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            vars(sys.modules[parent]).pop(child, None)


def import_in_place(name: str) -> ModuleType:
    """Imports a module in the place of what stands for it, if anything does."""
    for finder in sys.meta_path:
        if isinstance(finder, StandIns):
            finder.forget(name)
    return import_module(name)
