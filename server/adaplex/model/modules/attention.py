"""Paged attention behind transformers' attention interface.

No mask function is registered under the same name, so transformers builds no mask.
Source of the interface: `transformers.AttentionInterface`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from adaplex.model.kernels import reference
from adaplex.model.kernels.paged_kv import AttentionOptions, PagedAttend, PagedKV
from adaplex.model.step.step_context import StepContext

IMPLEMENTATION = "adaplex_paged"
ATTEND_ATTRIBUTE = "adaplex_attend"
"""Attribute of every attention module: the `Attend` that it calls."""


class Attend(Protocol):
    """query [1, heads, rows, dk], key [1, kv_heads, rows, dk], value [1, kv_heads, rows, dv]
    -> [1, rows, heads, dv]."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **kw: Any
    ) -> Tensor:
        """Attends; `kw` are the options that transformers passes on."""
        ...


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Calls the `Attend` that is installed at the module; transformers calls this."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attend: Attend = getattr(module, ATTEND_ATTRIBUTE)
    return attend(module, query, key, value, scale, **kwargs), None


AttentionInterface.register(IMPLEMENTATION, attention_interface)


def install(model: nn.Module, attend: Attend) -> None:
    """Makes every attention layer of the model call `attend`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            object.__setattr__(module, ATTEND_ATTRIBUTE, attend)


class PagedAttention:
    """Writes the step's keys and values to the cache and attends over the block tables."""

    def __init__(self, step: StepContext, attend: PagedAttend = reference.attend) -> None:
        self._step = step
        self._attend = attend

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Shapes as in `Attend`; padding rows get zeros."""
        step, layer = self._step, int(module.layer_idx)  # type: ignore[arg-type]
        assert step.cache is not None
        cache = step.cache
        cache.write(layer, step.slots, key[0], value[0])
        window = sliding_window or getattr(module, "sliding_window", None)
        options = AttentionOptions(scale, window, softcap, s_aux)
        step.attention[layer] = options
        heads, rows = query.shape[1], query.shape[2]
        out = query.new_zeros(rows, heads, value.shape[-1])
        for group in step.groups:
            stop = group.start + group.batch * group.count
            q = query[0, :, group.start : stop].view(heads, group.batch, group.count, -1)
            kv = PagedKV(cache.keys[layer], cache.values[layer], group.tables, group.positions)
            mixed = self._attend(q.transpose(0, 1), kv, options)
            out[group.start : stop] = mixed.transpose(1, 2).reshape(-1, heads, value.shape[-1])
        return out.unsqueeze(0)
