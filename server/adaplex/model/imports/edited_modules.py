"""EditedModules: modules that are changed as soon as they have been imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Edit = Callable[[ModuleType], None]


class EditedModules(MetaPathFinder):
    """Applies a function to each of some modules after its import, as long as this finder is in
    `sys.meta_path`.
    """

    def __init__(self, edits: Mapping[str, Edit]) -> None:
        self._edits = edits

    def find_spec(self, fullname: str, path: Any, target: object = None) -> ModuleSpec | None:
        """Returns the spec of a module with an edit, None for others."""
        edit = self._edits.get(fullname)
        spec = None if edit is None else PathFinder.find_spec(fullname, path)
        if edit is not None and spec is not None and spec.loader is not None:
            spec.loader = _Editing(spec.loader, edit)
        return spec


class _Editing(Loader):
    """Loads a module by its own loader, to which it is returned, and edits it."""

    def __init__(self, loader: Loader, edit: Edit) -> None:
        self._loader = loader
        self._edit = edit

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns what the module's own loader returns."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module, then its edit."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._edit(module)
