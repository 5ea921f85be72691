"""Linear backends of bitsandbytes.

Importing bitsandbytes takes a second, since it prepares torch's compiler; so this module is
imported only where a weight is quantized or multiplied by bitsandbytes, within functions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor

from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.products import Nf4Product, Products
from adaplex.model.weights.nf4 import NF4_BLOCK, Nf4Weight


class Nf4Linear(LinearBackend):
    """nf4, multiplied by a product of the device, else by bitsandbytes' fused kernel for CPUs with
    AVX512-BF16.

    bitsandbytes' own kernels for CUDA devices give a row other bits among other numbers of rows.
    """

    def __init__(
        self, data: Tensor, state: Any, bias: Tensor | None, product: Nf4Product | None = None
    ) -> None:
        """`data` and `state` as `quantize_nf4` returns them, nested for a `product`."""
        super().__init__((state.shape[0], state.shape[1]), bias)
        self._product = product
        if product is None:
            data, state = bnb_functional._convert_weight_packed_for_cpu(data, state)
        self._data, self._state = data, state
        self._weight = None if product is None else Nf4Weight.of(data, state)

    @classmethod
    def quantized(
        cls, weight: Tensor, bias: Tensor | None, product: Nf4Product | None = None
    ) -> Nf4Linear:
        """Quantizes a weight [out, in]."""
        return cls(*quantize_nf4(weight, nested=product is not None), bias, product)

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], bias: Tensor | None, product: Nf4Product | None = None
    ) -> Nf4Linear:
        """Makes the backend that gave these tensors."""
        packed = dict(tensors)
        data = packed.pop("data")
        state = bnb_functional.QuantState.from_dict(packed, data.device)
        return cls(data, state, bias, product)

    @staticmethod
    def serves(shape: tuple[int, int], dtype: torch.dtype, product: Nf4Product | None) -> bool:
        """True if a kernel multiplies by a weight [out, in]: the product of the device, or the one
        of bitsandbytes for CPUs.
        """
        rows, columns = shape
        if columns % NF4_BLOCK:
            return False
        if product is not None:
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

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return int(self._data.nbytes + self._state.absmax.nbytes)

    def _as_quantized(self) -> tuple[Tensor, Any]:
        """Returns data and a copy of the state, as they were before the constructor packed them."""
        data, state = self._data, copy.copy(self._state)
        if getattr(state, "packing_format_for_cpu", False):
            data, state = bnb_functional._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = state.absmax.T.reshape(-1).float()
        return data, state


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
        """Makes the backend that gave these tensors."""
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
    """Returns bitsandbytes' codes and state of a weight [out, in]; `nested` quantizes the maxima
    of blocks too.
    """
    codes, state = bnb_functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=nested
    )
    return codes, state


def nf4_roundtrip(weight: Tensor) -> Tensor:
    """Returns a weight [out, in] quantized and dequantized, in its own type: for shapes without a
    kernel.
    """
    out: Tensor = bnb_functional.dequantize_4bit(*quantize_nf4(weight))
    return out


def make_linear(
    weight: Tensor, bias: Tensor | None, quantization: str, products: Products
) -> LinearBackend:
    """Returns the backend for a weight [out, in] in the compute dtype.

    `quantization` is nf4 or int8; with any other the weight is kept dense. An nf4 weight that no
    kernel can serve here is quantized, dequantized once and kept dense: the same values, more
    bytes.
    """
    if quantization == "nf4":
        shape = (weight.shape[0], weight.shape[1])
        if Nf4Linear.serves(shape, weight.dtype, products.nf4):
            return Nf4Linear.quantized(weight, bias, products.nf4)
        return DenseLinear(nf4_roundtrip(weight), bias, products.dense)
    if quantization == "int8":
        return Int8Linear.quantized(weight, bias)
    return DenseLinear(weight, bias, products.dense)


def restored_linear(
    kind: str, tensors: Mapping[str, Tensor], bias: Tensor | None, products: Products
) -> LinearBackend:
    """Returns the backend, of the class named `kind`, that gave these tensors. Raises KeyError."""
    if kind == "Nf4Linear":
        return Nf4Linear.restored(tensors, bias, products.nf4)
    return {"Int8Linear": Int8Linear.restored}[kind](tensors, bias)
