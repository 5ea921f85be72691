"""A start without torch's compiler and torch's distributed tensors.

A server compiles nothing with torch and has one process. But transformers imports both, for its
decorators and its sharding, as do torch's operators for empty tensors: half of the time that
importing transformers takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any
from unittest import mock

TESTED = {"torch": "2.13.", "transformers": "5.23."}
"""Package -> the versions whose imports were tested without the compiler; others import it."""
COMPILER = "torch._dynamo"
LEAF = f"{COMPILER}._trace_wrapped_higher_order_op"
"""Submodule that transformers' masks import, and that does not import the compiler."""
MARKERS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of functions that mean something to torch.compile only. Each imports the compiler."""


@contextmanager
def light_imports() -> Iterator[None]:
    """Makes modules and operators that the block is first to import and call do without torch's
    compiler, and see torch as if it were built without `torch.distributed`, which transformers then
    never uses in this process. The compiler is imported after all where more of it is needed than
    MARKERS, also within the block.
    """
    if COMPILER in sys.modules or not _tested():
        yield
        return
    import torch
    import torch.compiler
    import torch.distributed

    stand_in = _Compiler(torch.__path__)
    finder = _Submodules(stand_in)
    with ExitStack() as stack:
        for name in MARKERS:
            stack.enter_context(mock.patch.object(torch.compiler, name, _unmarked))
        stack.enter_context(mock.patch.object(torch.distributed, "is_available", _unavailable))
        sys.modules[COMPILER] = stand_in
        vars(torch)["_dynamo"] = stand_in
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            stand_in.remove()


class _Compiler(ModuleType):
    """Has the markers of the compiler, and the submodule LEAF. Imports the compiler, in its own
    place, where anything else of it is read.
    """

    def __init__(self, path: list[str]) -> None:
        super().__init__(COMPILER)
        spec = PathFinder.find_spec(COMPILER, path)
        assert spec is not None
        self.__path__ = list(spec.submodule_search_locations or ())
        for name in MARKERS:
            setattr(self, name, _unmarked)

    def remove(self) -> None:
        """Removes this module from where the compiler belongs."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER], vars(sys.modules["torch"])["_dynamo"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # attributes of modules, which import systems look for
            raise AttributeError(name)
        self.remove()
        return getattr(import_module(COMPILER), name)


class _Submodules(MetaPathFinder, Loader):
    """Imports the compiler, in the place of what stands for it, before a submodule but LEAF."""

    def __init__(self, stand_in: _Compiler) -> None:
        self._stand_in = stand_in

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Returns a spec of a module that importing the compiler has loaded, else None."""
        stands = sys.modules.get(COMPILER) is self._stand_in
        if not stands or not fullname.startswith(f"{COMPILER}.") or fullname == LEAF:
            return None
        self._stand_in.remove()
        import_module(COMPILER)
        return ModuleSpec(fullname, self) if fullname in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Returns the loaded module."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: the module is loaded."""


def _tested() -> bool:
    return all(version(name).startswith(start) for name, start in TESTED.items())


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """Returns the function as it is, or a decorator that does."""
    return function if callable(function) else _unmarked


def _unavailable() -> bool:
    return False
