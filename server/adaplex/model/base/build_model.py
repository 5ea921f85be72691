"""ModelBuilder: builds the base with our linears and norms, from a checkpoint or a saved base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.base.architecture import Probe, is_linear, output_layer, probe
from adaplex.model.base.saved_base import Contents, SavedBase
from adaplex.model.kernels.native.kernels import NF4_BLOCK, NativeKernels
from adaplex.model.linear.backend import DenseLinear, LinearBackend
from adaplex.model.linear.int4_group import INT4_GROUP, Int4GroupLinear
from adaplex.model.linear.native import NativeLinear, native_linear
from adaplex.model.linear.native_int4 import NativeInt4Linear, int4_linear
from adaplex.model.modules import attention, moe
from adaplex.model.modules.hooks import AdaptedLinear, adapt, base_bias, oriented_weight
from adaplex.model.step.step_context import StepContext

LIBRARIES = ("bitsandbytes", "torch", "transformers")
"""They decide what modules there are, and how weights are kept."""
Progress = Callable[[str], None]
BackendFor = Callable[[str, nn.Module, bool], LinearBackend]
"""Name of a linear, the linear, and whether it is the output layer -> what replaces it."""


@dataclass(frozen=True)
class ModelBuilder:
    """How the parts of a base are kept."""

    quantization: str
    dtype: torch.dtype
    device: torch.device
    kernels: NativeKernels | None
    step: StepContext
    group_size: int = 0
    """Of int4-group."""

    @property
    def depends_on(self) -> dict[str, object]:
        """What an assembled model depends on besides its checkpoint, in JSON's types."""
        return {
            "quantization": self.quantization,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "native": self.kernels is not None,
            "fused_nf4": self.kernels is None and self._fuses_nf4(),
            "versions": {name: version(name) for name in LIBRARIES},
            **({"group_size": self.group_size} if self.quantization == INT4_GROUP else {}),
        }

    def assemble(
        self,
        directory: Path,
        config: PretrainedConfig,
        saved: SavedBase | None,
        progress: Progress,
    ) -> tuple[nn.Module, Probe]:
        """The model on its device, and what the probe found: as `saved` has it, else from the
        checkpoint in `directory`, and then saved. Raises UnsupportedModel.
        """
        assembled = None if saved is None else self._restore(saved, config, progress)
        made = assembled is None
        model, found = assembled or self.from_checkpoint(directory, config, progress)
        _tell_of_fallbacks(model, self.quantization, progress)
        nn.Module.to(model, self.device)
        if made and saved is not None:
            _save(saved, model, found, progress)
        return model, found

    def _restore(
        self, saved: SavedBase, config: PretrainedConfig, progress: Progress
    ) -> tuple[nn.Module, Probe] | None:
        """The model as it was saved; None where it was not, or what was saved is of no use."""
        try:
            contents = saved.read()
            if contents is None:
                return None
            progress(f"mapping the {self.quantization} weights of an earlier start")
            return self.from_saved(contents, config)
        except Exception as error:  # of all kinds, as files are damaged; the checkpoint is there
            progress(f"{saved.path} is of no use and made anew: {error}")
            return None

    def from_checkpoint(
        self, directory: Path, config: PretrainedConfig, progress: Progress
    ) -> tuple[nn.Module, Probe]:
        """Reads, tries and quantizes. Raises UnsupportedModel."""
        progress(f"reading {directory}")
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=self.dtype,
            attn_implementation=attention.IMPLEMENTATION,
        )
        _only_serve(model)
        found = probe(model)
        progress(f"quantizing {len(found.sites)} modules to {self.quantization}")
        self._adapt(model, found.sites, self._quantized)
        return model, found

    def from_saved(self, saved: Contents, config: PretrainedConfig) -> tuple[nn.Module, Probe]:
        """Puts the tensors of `saved` into a model that has none. Raises what they lead to when
        they are not those of this model.
        """
        with torch.device("meta"):  # as from_pretrained makes it before it has read the weights
            model = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=attention.IMPLEMENTATION
            )
        _only_serve(model)

        def restored(name: str, linear: nn.Module, _is_head: bool) -> LinearBackend:
            kind, tensors = saved.linear(name)
            tensors = {part: tensor.to(self.device) for part, tensor in tensors.items()}
            bias = tensors.pop("bias", None)
            rows, columns = oriented_weight(linear).shape
            return self._backend(kind, tensors, (rows, columns), bias)

        self._adapt(model, saved.found.sites, restored)
        saved.fill(model)
        return model, saved.found

    def _adapt(self, model: nn.Module, sites: list[BaseModule], backend_for: BackendFor) -> None:
        """Replaces attention and every linear; lets adapters change what the other sites give."""
        kernel = attention.paged_kernel(self.device)
        attention.install(model, attention.PagedAttention(self.step, kernel))
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
            adapt(model.get_submodule(owner), site, self.step)

    def _quantized(self, _name: str, linear: nn.Module, is_head: bool) -> LinearBackend:
        """The backend of one linear; the output layer is kept as it is."""
        weight, bias = oriented_weight(linear).to(self.device), base_bias(linear)
        bias = None if bias is None else bias.to(self.device)
        kept = "" if is_head else self.quantization
        if kept == INT4_GROUP:
            return int4_linear(self.kernels, weight, bias, self.group_size)
        if self.kernels is not None and kept != "int8":
            native = native_linear(self.kernels, weight, bias, nf4=kept == "nf4")
            if native is not None:
                return native
        from adaplex.model.linear.bitsandbytes_linear import make_linear  # slow to import

        return make_linear(weight, bias, kept)

    def _backend(
        self, kind: str, tensors: dict[str, Tensor], shape: tuple[int, int], bias: Tensor | None
    ) -> LinearBackend:
        """The backend, of a class named `kind`, that gave these tensors."""
        for native in (NativeLinear, NativeInt4Linear):
            if self.kernels is not None and kind == native.__name__:
                return native.restored(self.kernels, tensors, shape, bias)
        for plain in (DenseLinear, Int4GroupLinear):
            if kind == plain.__name__:
                return plain.restored(tensors, bias)
        from adaplex.model.linear.bitsandbytes_linear import restored_linear  # slow to import

        return restored_linear(kind, tensors, bias)

    def _fuses_nf4(self) -> bool:
        """Whether the device has bitsandbytes' nf4 kernels."""
        from adaplex.model.linear.bitsandbytes_linear import Nf4Linear  # slow to import

        return Nf4Linear.serves((32, NF4_BLOCK), self.dtype, self.device)


def _only_serve(model: nn.Module) -> None:
    """No training, no batch-mates among experts, and no padding: a model that looks for it in every
    step, to warn of it, waits for the device.
    """
    model.eval().requires_grad_(False)
    model.config.pad_token_id = None  # type: ignore[union-attr]
    _use_row_invariant_experts(model)


def _use_row_invariant_experts(model: nn.Module) -> None:
    """Routes fused mixture-of-experts layers through adaplex.model.modules.moe."""
    for module in model.modules():
        if getattr(module, "has_gate", False) and not getattr(
            module, "has_post_expert_norm", False
        ):
            config = module.config
            config._experts_implementation = moe.IMPLEMENTATION  # type: ignore[union-attr]


def _save(saved: SavedBase, model: nn.Module, found: Probe, progress: Progress) -> None:
    """Saves the model for the next start, which quantizes again where that fails."""
    try:
        saved.write(model, found)
    except (OSError, KeyError) as error:
        progress(f"the quantized weights cannot be saved for the next start: {error}")


def _tell_of_fallbacks(model: nn.Module, quantization: str, progress: Progress) -> None:
    """One line when 4-bit weights are kept dense, since that costs the memory they should save."""
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
