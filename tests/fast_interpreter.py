"""Makes Triton's interpreter about twice as fast, with the same results.

At each call of a device function the interpreter looks for what to patch in the language, which is
patched already, and it describes the type of each intermediate result anew. `install` leaves the
first out and caches parts of the second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_plain_block = core.block_type.__init__
_plain_tensor = core.tensor.__init__
_plain_numpy_type = interpreter._get_np_dtype
_numpy_types: dict[str, Any] = {}


@cache
def _block_of(*sizes: int) -> tuple[Any, int, str]:
    """Returns a block's shape as Triton describes it, its number of elements, and its text."""
    block = core.block_type.__new__(core.block_type)
    _plain_block(block, core.float32, list(sizes))
    return block.shape, block.numel, str(block.shape)


@cache
def _tensor_of(*sizes: int) -> tuple[Any, Any]:
    """Returns the shape and the number of elements of a tensor of these sizes; () for a scalar."""
    tensor = core.tensor.__new__(core.tensor)
    _plain_tensor(
        tensor, None, core.block_type(core.float32, list(sizes)) if sizes else core.float32
    )
    return tensor.shape, tensor.numel


def _block(self: Any, element_ty: Any, shape: Any) -> None:
    """In place of block_type's constructor."""
    self.element_ty = element_ty
    sizes = shape.values if isinstance(shape, core.tuple) else shape
    known = _block_of(*(s.value if isinstance(s, core.constexpr) else s for s in sizes))
    self.shape, self.numel, text = known
    self.name = f"<{text}, {element_ty}>"


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """In place of tensor's constructor."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensor_of(*(type.shape.values if type.is_block() else ()))


def _numpy_type(of: Any) -> Any:
    """In place of _get_np_dtype, which makes a table of all types each time."""
    if isinstance(of, core.block_type):
        of = of.element_ty
    if of.name not in _numpy_types:
        _numpy_types[of.name] = _plain_numpy_type(of)
    return _numpy_types[of.name]


@cache
def _languages(function: Callable[..., Any]) -> list[Any]:
    """Returns the modules of the language that a device function uses."""
    return [each for each in function.__globals__.values() if each is tl or each is core]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a device function, in place of InterpretedFunction.__call__."""
    if any(core.is_builtin(language.arange) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def install() -> None:
    """Speeds up the interpreter of this process."""
    core.block_type.__init__ = _block
    core.tensor.__init__ = _tensor
    interpreter._get_np_dtype = _numpy_type
    interpreter.InterpretedFunction.__call__ = _call
