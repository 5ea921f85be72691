"""A start without the parts of torch and transformers that serving does not need.

A server compiles nothing with torch and has one process. But importing torch and
transformers imports torch's compiler and its distributed tensors, for decorators and sharding, and
Python's kernels for tensors without data; searches all modules for the caller of each registration
of an operator; and reads the source of every model that transformers has.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from adaplex.model.imports.class_table import ClassTable
from adaplex.model.imports.edited_modules import EditedModules
from adaplex.model.imports.library_thread import load_library_of_torch
from adaplex.model.imports.stand_ins import StandIns, import_in_place

TESTED = {"torch": "2.13.", "transformers": "5.23."}
"""Package -> the versions whose imports were tested without these parts; others import them."""
COMPILER = "torch._dynamo"
LEAF = f"{COMPILER}._trace_wrapped_higher_order_op"
"""Submodule that transformers' masks import, and that does not import the compiler."""
MARKERS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of functions that mean something to torch.compile only. Each imports the compiler."""
META_KERNELS = "torch._meta_registrations"
"""Python's kernels for tensors without data, beside those that torch has in C++."""
WITHOUT_TORCH = ("structlog", "rich.console", "jinja2", "httpx2", "numpy", "huggingface_hub.hf_api")
"""Modules to import while torch's library is loaded, those without libraries first: one library is
loaded at a time."""


@contextmanager
def light_imports(cache: Path) -> Iterator[None]:
    """Makes modules and operators that the block is first to import and call do without torch's
    compiler, and see torch as if it were built without `torch.distributed`, which transformers then
    never uses in this process. The compiler is imported after all where more of it is needed than
    MARKERS, also within the block; so are META_KERNELS, also after it, with the compiler or by
    import_meta_kernels. The names in transformers' models come from a file in the folder `cache`,
    which the first start writes.

    Without the versions of TESTED, and where torch is imported already, the block does nothing.
    """
    if "torch" in sys.modules or not _tested():
        yield
        return
    markers = dict.fromkeys(MARKERS, _unmarked)
    stand_ins = StandIns(
        {COMPILER: markers, META_KERNELS: {}},
        leaves={LEAF},
        first={COMPILER: META_KERNELS},
    )
    edited = EditedModules({"transformers.utils.import_utils": ClassTable(cache).install})
    sys.meta_path[:0] = [stand_ins, edited]
    with ExitStack() as stack:
        stack.callback(sys.meta_path.remove, edited)
        stack.callback(stand_ins.forget, COMPILER)
        stack.enter_context(mock.patch.object(inspect, "getmodule", _module_of))
        _import_torch()
        compiler, distributed = map(import_module, ("torch.compiler", "torch.distributed"))
        for name, marker in markers.items():
            stack.enter_context(mock.patch.object(compiler, name, marker))
        stack.enter_context(mock.patch.object(distributed, "is_available", _unavailable))
        yield


@contextmanager
def without_collections() -> Iterator[None]:
    """Imports without searching for garbage, of which imports make next to none: the search is a
    seventh of their time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_meta_kernels() -> None:
    """Imports Python's kernels for tensors without data, if they were deferred."""
    import_in_place(META_KERNELS)


def _import_torch() -> None:
    """Imports torch, and other modules while its library is loaded."""
    loading = load_library_of_torch()
    for name in () if loading is None else WITHOUT_TORCH:
        with suppress(ImportError):  # who needs it reports it
            import_module(name)
    if loading is not None:
        loading.join()
    import_module("torch")


def _module_of(
    subject: Any,
    filename: str | None = None,
    search: Callable[..., ModuleType | None] = inspect.getmodule,
) -> ModuleType | None:
    """Returns the module of a frame, which its globals name, or of another object by `search`. For
    frames too that would look up the files of all modules, and torch calls it at each registration.
    """
    if inspect.isframe(subject):
        return sys.modules.get(subject.f_globals.get("__name__", ""))
    return search(subject, filename)


def _tested() -> bool:
    return all(version(name).startswith(start) for name, start in TESTED.items())


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """Returns the function as it is, or a decorator that does."""
    return function if callable(function) else _unmarked


def _unavailable() -> bool:
    return False
