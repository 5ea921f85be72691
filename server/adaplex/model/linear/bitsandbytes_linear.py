"""Linear backends of bitsandbytes, which takes a second to import: it prepares torch's compiler.

So only what quantizes, or runs its kernels, imports this, and does so when it has to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor

from adaplex.model.kernels.native.kernels import NF4_BLOCK
from adaplex.model.linear.backend import DenseLinear, LinearBackend
from adaplex.model.weights.nf4 import Nf4Product, Nf4Weight, nf4_product


class Nf4Linear(LinearBackend):
    """bitsandbytes nf4: by its fused kernel on CPUs with AVX512-BF16, by Triton on CUDA devices.

    bitsandbytes' kernels for those give a row other bits among other numbers of rows.
    """

    def __init__(
        self, data: Tensor, state: Any, bias: Tensor | None, *, product: Nf4Product | None = None
    ) -> None:
        """`data` and `state` as bitsandbytes quantizes to; `product` is by default Triton's on a
        CUDA device, and none elsewhere.
        """
        super().__init__((state.shape[0], state.shape[1]), bias)
        self._product = product or nf4_product(data.device)
        if self._product is None:
            data, state = bnb_functional._convert_weight_packed_for_cpu(data, state)
        self._data, self._state = data, state
        self._weight = None if self._product is None else Nf4Weight.of(data, state)

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> Nf4Linear:
        """Quantizes a weight [out, in]."""
        nested = nf4_product(weight.device) is not None
        return cls(*quantize_nf4(weight, nested=nested), bias)

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Nf4Linear:
        """What gave these tensors."""
        packed = dict(tensors)
        data = packed.pop("data")
        return cls(data, bnb_functional.QuantState.from_dict(packed, data.device), bias)

    @staticmethod
    def serves(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a fused kernel exists for this weight [out, in] on this device."""
        rows, columns = shape
        if columns % NF4_BLOCK:
            return False
        if nf4_product(device) is not None:
            return True
        return dtype == torch.bfloat16 and rows % 32 == 0 and bool(bnb_functional.has_avx512bf16())

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        if self._product is not None and self._weight is not None:
            return self._product(x, self._weight, self.bias)
        y: Tensor = bnb.matmul_4bit(x.contiguous(), self._data, quant_state=self._state)
        return y if self.bias is None else y + self.bias

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        data, state = self._as_quantized()
        state.dtype = torch.float32
        weight: Tensor = bnb_functional.dequantize_4bit(data, state)
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        data, state = self._as_quantized()
        return {"data": data, **state.as_dict(packed=True)}

    def _as_quantized(self) -> tuple[Tensor, Any]:
        """Data and a state of the caller's own, with what the constructor did to them undone."""
        data, state = self._data, copy.copy(self._state)
        if getattr(state, "packing_format_for_cpu", False):
            data, state = bnb_functional._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = state.absmax.T.reshape(-1).float()
        return data, state

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        absmax = self._state.absmax
        return int(self._data.nbytes + absmax.nbytes)


class Int8Linear(LinearBackend):
    """bitsandbytes LLM.int8 without outlier columns.

    Outlier columns are chosen over the whole batch, which would make a row depend on its
    batch-mates; with threshold 0 each row is quantized alone.
    """

    def __init__(self, data: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """int8 `data` [out, in] in steps of `scale` [out] / 127."""
        super().__init__((data.shape[0], data.shape[1]), bias)
        self._data, self._scale = data, scale

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Quantizes a weight [out, in]."""
        half = weight.to(torch.float16).contiguous()
        data, scale, _ = bnb_functional.int8_vectorwise_quant(half)
        return cls(data, scale, bias)

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Int8Linear:
        """What gave these tensors."""
        return cls(tensors["data"], tensors["scale"], bias)

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        rows, rows_scale, _ = bnb_functional.int8_vectorwise_quant(x.to(torch.float16))
        product = bnb_functional.int8_linear_matmul(rows, self._data)
        y: Tensor = bnb_functional.int8_mm_dequant(product, rows_scale, self._scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        scale: Tensor = self._scale.float() / 127.0
        weight: Tensor = self._data.float() * scale[:, None]
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        return {"data": self._data, "scale": self._scale}

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return int(self._data.nbytes + self._scale.nbytes)


def quantize_nf4(weight: Tensor, *, nested: bool = False) -> tuple[Tensor, Any]:
    """bitsandbytes' codes and state of a weight [out, in]; `nested` quantizes the maxima too."""
    codes, state = bnb_functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=nested
    )
    return codes, state


def nf4_roundtrip(weight: Tensor) -> Tensor:
    """What nf4 makes of a weight [out, in], in its own dtype: for shapes without a kernel."""
    out: Tensor = bnb_functional.dequantize_4bit(*quantize_nf4(weight))
    return out


def make_linear(weight: Tensor, bias: Tensor | None, quantization: str) -> LinearBackend:
    """The backend for a weight [out, in] in the compute dtype.

    `quantization` is nf4, int8, bf16 or fp32. An nf4 weight that no kernel can serve here is
    quantized, dequantized once and kept dense: the same values, more bytes.
    """
    if quantization == "nf4":
        if Nf4Linear.serves((weight.shape[0], weight.shape[1]), weight.dtype, weight.device):
            return Nf4Linear.quantized(weight, bias)
        return DenseLinear(nf4_roundtrip(weight), bias)
    if quantization == "int8":
        return Int8Linear.quantized(weight, bias)
    return DenseLinear(weight, bias)


def restored_linear(kind: str, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearBackend:
    """The backend, of a class named `kind`, that gave these tensors. Raises KeyError."""
    return {"Nf4Linear": Nf4Linear.restored, "Int8Linear": Int8Linear.restored}[kind](tensors, bias)
