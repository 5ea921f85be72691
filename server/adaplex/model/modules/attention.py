"""Paged attention behind transformers' attention interface.

No mask function is registered under the same name, so transformers builds no mask.
Source of the interface: `transformers.AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from adaplex.model.kernels import reference
from adaplex.model.step.step_context import StepContext

IMPLEMENTATION = "adaplex_paged"
HOOK = "adaplex_attend"
"""Attribute of every attention module that holds the function to call."""


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
    """What transformers calls; hands over to the function that the module's model installed."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attend: Attend = getattr(module, HOOK)
    return attend(module, query, key, value, scale, **kwargs), None


AttentionInterface.register(IMPLEMENTATION, attention_interface)


def install(model: nn.Module, attend: Attend) -> None:
    """Makes every attention layer of the model call `attend`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            object.__setattr__(module, HOOK, attend)


PagedKernel = Callable[..., Tensor]
"""Called as `reference.attend`, and gives the same; the query may be a strided view."""


def paged_kernel(device: torch.device) -> PagedKernel:
    """Triton's on a CUDA device, the reference elsewhere."""
    if device.type != "cuda":
        return reference.attend
    # Imported here, since only torch for CUDA brings Triton along.
    from adaplex.model.kernels.triton import attention as triton_attention

    return triton_attention.attend


class PagedAttention:
    """Writes the step's keys and values to the cache and attends over the block tables."""

    def __init__(self, step: StepContext, kernel: PagedKernel = reference.attend) -> None:
        self._step = step
        self._kernel = kernel

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
        step.windows[layer] = int(window or 0)
        heads, rows = query.shape[1], query.shape[2]
        out = query.new_zeros(rows, heads, value.shape[-1])
        for group in step.groups:
            stop = group.start + group.batch * group.count
            q = query[0, :, group.start : stop].view(heads, group.batch, group.count, -1)
            mixed = self._kernel(
                q.transpose(0, 1),
                cache.keys[layer],
                cache.values[layer],
                group.tables,
                group.positions,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=s_aux,
            )
            out[group.start : stop] = mixed.transpose(1, 2).reshape(-1, heads, value.shape[-1])
        return out.unsqueeze(0)
