"""The one place that chooses implementations by the device.

Lower packages hold the implementations and are given one; only this module knows all of them, so
it lies above them, though it chooses kernels. Triton is imported within functions, since torch for
the CPU does not install it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.constants import CUDA_MIN_ROWS
from adaplex.model.kernels import reference
from adaplex.model.kernels.low_rank import LowRankKernel, NativeLowRank, ReferenceLowRank
from adaplex.model.kernels.native.build import BuildFailed
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.paged_kv import PagedAttend
from adaplex.model.linear.products import Products
from adaplex.model.progress import Progress
from adaplex.model.step.tiles import AdapterKernels


def native_kernels(
    dtype: torch.dtype,
    device: torch.device,
    *,
    cache: Path,
    progress: Progress,
    patience: float = math.inf,
    int8_activations: bool = False,
) -> NativeKernels | None:
    """Returns the C kernels on a CPU, None on other devices and where they cannot be built in
    `patience` seconds, which one line reports.
    """
    if device.type != "cpu":
        return None
    try:
        return NativeKernels(
            dtype, cache, progress=progress, patience=patience, int8_activations=int8_activations
        )
    except BuildFailed as error:
        progress(f"the model runs on torch, several times slower than on C kernels: {error}")
        return None


def products(device: torch.device) -> Products:
    """Returns Triton's products on a CUDA device, torch's elsewhere."""
    if device.type != "cuda":
        return Products()
    from adaplex.model.kernels.triton import weight_formats
    from adaplex.model.kernels.triton.product import EVERY_TILE

    return Products(
        weight_formats.dense_product,
        weight_formats.int4_product,
        weight_formats.nf4_product,
        EVERY_TILE,
    )


def paged_attend(device: torch.device) -> PagedAttend:
    """Returns Triton's paged attention on a CUDA device, the reference elsewhere."""
    if device.type != "cuda":
        return reference.attend
    from adaplex.model.kernels.triton import attention

    return attention.attend


def adapter_kernels(
    device: torch.device, modules: Mapping[str, BaseModule]
) -> AdapterKernels | None:
    """Returns kernels for everything that adapters do on a CUDA device, None elsewhere: there
    torch does it, and a LowRankKernel the deltas. `modules` are those of the base.
    """
    if device.type != "cuda":
        return None
    from adaplex.model.adapters.triton_rows import TritonKernels

    return TritonKernels(modules, device)


def low_rank_kernel(kernels: NativeKernels | None) -> LowRankKernel:
    """Returns the low-rank deltas in C where there are C kernels, else the reference."""
    return ReferenceLowRank() if kernels is None else NativeLowRank(kernels)


def min_rows(device: torch.device) -> int:
    """Returns the rows of a step below which a row's bits would depend on how many there are."""
    return CUDA_MIN_ROWS if device.type == "cuda" else 1
