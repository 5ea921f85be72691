"""ModelBuilder: builds the base with our linears and hooks, from a checkpoint or a saved base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model import select
from adaplex.model.base.architecture import Probe, is_linear, output_layer, probe
from adaplex.model.base.read_weights import read_weights
from adaplex.model.base.saved_base import Contents, SavedBase
from adaplex.model.imports.light_imports import import_meta_kernels
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.linear.native import NativeLinear, native_linear
from adaplex.model.linear.native_int4 import NativeInt4Linear, int4_linear
from adaplex.model.linear.products import Products
from adaplex.model.modules import attention, moe
from adaplex.model.modules.hooks import (
    AdaptedLinear,
    base_bias,
    install_hooks,
    oriented_weight,
)
from adaplex.model.progress import Progress
from adaplex.model.step.step_context import StepContext
from adaplex.model.weights.int4_group import INT4_GROUP
from adaplex.model.weights.nf4 import NF4_BLOCK

LIBRARIES = ("bitsandbytes", "torch", "transformers")
"""Libraries that decide which modules a model has, and how weights are stored."""
BackendFor = Callable[[str, nn.Module, bool], LinearBackend]
"""(name of a linear, the linear, True for the output layer) -> the backend that replaces it."""


@dataclass(frozen=True)
class ModelBuilder:
    """Builds a base whose weights are kept in one format on one device."""

    quantization: str
    dtype: torch.dtype
    """Compute dtype."""
    device: torch.device
    kernels: NativeKernels | None
    """C kernels, which then run the linears that have panels."""
    products: Products
    """Products of the other linears."""
    step: StepContext
    group_size: int = 0
    """Inputs that share a scale in int4-group."""

    @property
    def depends_on(self) -> dict[str, object]:
        """Everything but the checkpoint on which a built model depends, in JSON's types."""
        return {
            "quantization": self.quantization,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "native": None if self.kernels is None else self.kernels.instructions.name,
            "fused_nf4": self.kernels is None and self._fuses_nf4(),
            "versions": {name: version(name) for name in LIBRARIES},
            **({"group_size": self.group_size} if self.quantization == INT4_GROUP else {}),
        }

    def build(
        self,
        directory: Path,
        config: PretrainedConfig,
        saved: SavedBase | None,
        progress: Progress,
    ) -> tuple[nn.Module, Probe]:
        """Returns the model on its device, and the findings of the probe: from `saved` if it has
        them, else from the checkpoint in `directory`, which is then saved. Raises ModelError.
        """
        restored = None if saved is None else self._restore(saved, config, progress)
        model, found = restored or self.from_checkpoint(directory, config, progress)
        _report_fallbacks(model, self.quantization, progress)
        nn.Module.to(model, self.device)
        if restored is None and saved is not None:
            _save(saved, model, found, progress)
        return model, found

    def _restore(
        self, saved: SavedBase, config: PretrainedConfig, progress: Progress
    ) -> tuple[nn.Module, Probe] | None:
        """Returns the model as it was saved; None if it was not saved, or cannot be restored."""
        try:
            contents = saved.read()
            if contents is None:
                return None
            progress(f"mapping the {self.quantization} weights of an earlier start")
            return self.from_saved(contents, config)
        except Exception as error:  # a damaged file raises any kind; the checkpoint serves then
            progress(f"{saved.path} cannot be used and is replaced: {error}")
            return None

    def from_checkpoint(
        self, directory: Path, config: PretrainedConfig, progress: Progress
    ) -> tuple[nn.Module, Probe]:
        """Reads, probes and quantizes a checkpoint. Raises ModelError."""
        progress(f"reading {directory}")
        import_meta_kernels()  # transformers initializes modules without data in any way
        model = read_weights(directory, config, self.dtype, progress)
        self._prepare(model)
        found = probe(model)
        progress(f"quantizing {len(found.sites)} modules to {self.quantization}")
        self._replace_modules(model, found.sites, self._quantized)
        return model, found

    def from_saved(self, saved: Contents, config: PretrainedConfig) -> tuple[nn.Module, Probe]:
        """Fills an empty model with the tensors of `saved`. Raises errors of any kind for tensors
        that are not those of this model.
        """
        try:
            model = self._empty(config)
        except NotImplementedError:  # an operation has no kernel in C++
            import_meta_kernels()
            model = self._empty(config)
        self._prepare(model)

        def restored(name: str, linear: nn.Module, _is_head: bool) -> LinearBackend:
            kind, tensors = saved.linear(name)
            tensors = {part: tensor.to(self.device) for part, tensor in tensors.items()}
            bias = tensors.pop("bias", None)
            rows, columns = oriented_weight(linear).shape
            return self._backend(kind, tensors, (rows, columns), bias)

        self._replace_modules(model, saved.found.sites, restored)
        saved.fill(model)
        return model, saved.found

    def _empty(self, config: PretrainedConfig) -> nn.Module:
        """Returns the model without data, as from_pretrained makes it before it reads weights."""
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=attention.IMPLEMENTATION
            )
        return model

    def _prepare(self, model: nn.Module) -> None:
        """Makes a model of transformers serve: no training, no batch-mates among experts, and no
        padding token, since a model that has one looks for it in every step, to warn of it, and so
        waits for the device.
        """
        model.eval().requires_grad_(False)
        model.config.pad_token_id = None  # type: ignore[union-attr]
        moe.install_experts(model, self.products.dense)

    def _replace_modules(
        self, model: nn.Module, sites: list[BaseModule], backend_for: BackendFor
    ) -> None:
        """Replaces attention and every linear, and installs hooks at the other sites."""
        attend = select.paged_attend(self.device)
        attention.install(model, attention.PagedAttention(self.step, attend))
        head = output_layer(model)
        for name, module in list(model.named_modules()):
            if is_linear(module):
                is_head = module is head
                backend = backend_for(name, module, is_head)
                replacement = AdaptedLinear(name, backend, self.step, is_head=is_head)
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, replacement)
        for site in sites:
            owner = site.name.rpartition(".")[0] if site.kind == "experts" else site.name
            install_hooks(model.get_submodule(owner), site, self.step)

    def _quantized(self, _name: str, linear: nn.Module, is_head: bool) -> LinearBackend:
        """Returns the backend of one linear; the output layer is not quantized."""
        weight, bias = oriented_weight(linear).to(self.device), base_bias(linear)
        bias = None if bias is None else bias.to(self.device)
        quantization = "" if is_head else self.quantization
        if quantization == INT4_GROUP:
            return int4_linear(self.kernels, self.products, weight, bias, self.group_size)
        if self.kernels is not None and quantization != "int8":
            native = native_linear(self.kernels, weight, bias, nf4=quantization == "nf4")
            if native is not None:
                return native
        from adaplex.model.linear.bitsandbytes_linear import make_linear  # slow to import

        return make_linear(weight, bias, quantization, self.products)

    def _backend(
        self, kind: str, tensors: dict[str, Tensor], shape: tuple[int, int], bias: Tensor | None
    ) -> LinearBackend:
        """Returns the backend, of the class named `kind`, that gave these tensors. Raises KeyError
        for an unknown class or a missing tensor.
        """
        for native in (NativeLinear, NativeInt4Linear):
            if self.kernels is not None and kind == native.__name__:
                return native.restored(self.kernels, tensors, shape, bias)
        if kind == DenseLinear.__name__:
            return DenseLinear.restored(tensors, bias, self.products.dense)
        if kind == Int4GroupLinear.__name__:
            return Int4GroupLinear.restored(tensors, bias, self.products.int4)
        from adaplex.model.linear.bitsandbytes_linear import restored_linear  # slow to import

        return restored_linear(kind, tensors, bias, self.products)

    def _fuses_nf4(self) -> bool:
        """True if a kernel multiplies by nf4 weights without C kernels."""
        from adaplex.model.linear.bitsandbytes_linear import Nf4Linear  # slow to import

        return Nf4Linear.serves((32, NF4_BLOCK), self.dtype, self.products.nf4)


def _save(saved: SavedBase, model: nn.Module, found: Probe, progress: Progress) -> None:
    """Saves the model for the next start, which quantizes again if that fails."""
    try:
        saved.write(model, found)
    except (OSError, KeyError) as error:
        progress(f"the quantized weights cannot be saved for the next start: {error}")


def _report_fallbacks(model: nn.Module, quantization: str, progress: Progress) -> None:
    """Reports in one line that 4-bit weights are kept dense, since that costs the memory that they
    should save.
    """
    linears = [m for m in model.modules() if isinstance(m, AdaptedLinear) and not m.is_head]
    dense = sum(_is_dense(m.backend) for m in linears)
    if quantization == "nf4" and dense:
        progress(
            f"{dense} of {len(linears)} linears have no nf4 kernel for their shape on this device: "
            "their nf4 values are kept dense"
        )
    if quantization == INT4_GROUP and dense:
        progress(
            f"{dense} of {len(linears)} linears have a width that the group size does not divide: "
            "their int4 values are kept dense"
        )


def _is_dense(backend: LinearBackend) -> bool:
    return isinstance(backend, DenseLinear) or (
        isinstance(backend, NativeLinear) and backend.scales is None
    )
