"""Loading the base: resolve, read, check, quantize. It is never touched again afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from adaplex.adapters.files import file_sha256
from adaplex.adapters.program import BaseModule, BaseSpec
from adaplex.model import attention, experts
from adaplex.model.adapted import AdaptedLinear, AdaptedNorm, base_bias, oriented_weight
from adaplex.model.architecture import check_supported, is_linear, output_layer, probe
from adaplex.model.errors import UnsupportedModel
from adaplex.model.kernels.native.kernels import NativeKernels, native_kernels
from adaplex.model.kv_cache import LayerShape
from adaplex.model.linear import DenseLinear, LinearBackend, make_linear
from adaplex.model.native_linear import NativeLinear, native_linear
from adaplex.model.source import default_cache, resolve_model
from adaplex.model.step import StepContext

QUANTIZATIONS = ("nf4", "int8", "bf16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def silent(_message: str) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class BaseModel:
    """The resident base: module, tokenizer, and what others need to know of it."""

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    step: StepContext
    shapes: tuple[LayerShape, ...]
    quantization: str
    dtype: torch.dtype
    device: torch.device
    max_positions: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    weight_bytes: int
    kernels: NativeKernels | None = None
    """Those of the CPU, when they run the linears."""

    @property
    def backends(self) -> dict[str, LinearBackend]:
        """Module name -> linear backend, for every site."""
        return {
            module.name: module.backend
            for module in self.module.modules()
            if isinstance(module, AdaptedLinear)
        }

    def kv_block_bytes(self, block_tokens: int) -> int:
        """Bytes of one KV block over all layers."""
        return block_tokens * sum(s.elements for s in self.shapes) * self.dtype.itemsize


@torch.inference_mode()
def load_base(
    model: str,
    *,
    quantization: str = "nf4",
    dtype: str = "auto",
    device: str = "auto",
    cache: Path | None = None,
    native: bool = True,
    progress: Callable[[str], None] = silent,
) -> BaseModel:
    """Loads a base model and quantizes it.

    `model` is a hub id, a directory of safetensors, a GGUF file or the default's name;
    `quantization` is one of QUANTIZATIONS; `dtype` is auto, bf16 or fp32 (the compute dtype);
    `device` is auto, cpu or cuda; without `native` a CPU computes by torch alone.
    Raises ModelSourceError or UnsupportedModel.
    """
    if quantization not in QUANTIZATIONS:
        raise UnsupportedModel(
            f"quantization: {quantization!r} is not one of {', '.join(QUANTIZATIONS)}"
        )
    directory = resolve_model(model, cache=cache, progress=progress)
    compute = _compute_dtype(quantization, dtype)
    where = torch.device(_device(device))
    progress(f"reading {model}")
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(directory)
    check_supported(config)
    module = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=compute, attn_implementation=attention.IMPLEMENTATION
    )
    module.eval().requires_grad_(False)
    _use_row_invariant_experts(module)
    found = probe(module)
    step = StepContext()
    attention.install(module, attention.PagedAttention(step, attention.paged_kernel(where)))
    biases = {
        site.name: bias.float().clone()
        for site in found.sites
        if (bias := base_bias(module.get_submodule(site.name))) is not None
    }
    fingerprint = _fingerprint(directory)
    progress(f"quantizing {len(found.sites)} modules to {quantization}")
    kernels = (
        native_kernels(compute, where, cache=cache or default_cache(), progress=progress)
        if native
        else None
    )
    _adapt(
        module,
        found.sites,
        step,
        partial(_backend, quantization=quantization, kernels=kernels, device=where),
    )
    _tell_of_fallbacks(module, quantization, progress)
    nn.Module.to(module, where)
    return BaseModel(
        module=module,
        tokenizer=AutoTokenizer.from_pretrained(directory),
        spec=BaseSpec(
            name=Path(model).name if Path(model).exists() else model,
            digest=_digest(fingerprint, quantization, compute),
            model_type=str(config.model_type),
            modules={site.name: site for site in found.sites},
            biases=biases,
            fingerprint=fingerprint,
            aliases=_aliases(config, model),
            heads=int(getattr(config, "num_attention_heads", 0) or 0),
            kv_heads=int(getattr(config, "num_key_value_heads", 0) or 0),
        ),
        step=step,
        shapes=tuple(found.shapes),
        quantization=quantization,
        dtype=compute,
        device=where,
        max_positions=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
        eos_token_ids=_eos_token_ids(directory, module),
        weight_bytes=_weight_bytes(module),
        kernels=kernels,
    )


def _compute_dtype(quantization: str, dtype: str) -> torch.dtype:
    """fp32 for an fp32 base, bf16 otherwise, unless asked for."""
    if dtype == "auto":
        return torch.float32 if quantization == "fp32" else torch.bfloat16
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if quantization in DTYPES and quantization != dtype:
        raise UnsupportedModel(f"dtype: {dtype} does not fit quantization {quantization}")
    return DTYPES[dtype]


def _device(device: str) -> str:
    """The first of cuda and cpu that is there, unless asked for."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel("device: cuda was asked for and is not available")
    return device


def _use_row_invariant_experts(model: nn.Module) -> None:
    """Routes fused mixture-of-experts layers through adaplex.model.experts."""
    for module in model.modules():
        if getattr(module, "has_gate", False) and not getattr(
            module, "has_post_expert_norm", False
        ):
            config = module.config
            config._experts_implementation = experts.IMPLEMENTATION  # type: ignore[union-attr]


def _adapt(
    model: nn.Module,
    sites: list[BaseModule],
    step: StepContext,
    backend_for: Callable[..., LinearBackend],
) -> None:
    """Replaces every linear, quantized but for the output layer, and every norm with a bias."""
    head = output_layer(model)
    names = {site.name for site in sites}
    for name, module in list(model.named_modules()):
        replacement: nn.Module
        if is_linear(module):
            backend = backend_for(
                oriented_weight(module), base_bias(module), is_head=module is head
            )
            replacement = AdaptedLinear(name, backend, step, is_head=module is head)
        elif name in names:
            replacement = AdaptedNorm(name, module, step)
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)


def _backend(
    weight: Tensor,
    bias: Tensor | None,
    *,
    is_head: bool,
    quantization: str,
    kernels: NativeKernels | None,
    device: torch.device,
) -> LinearBackend:
    """The backend of one linear; the output layer is kept as it is."""
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    kept = "" if is_head else quantization
    if kernels is not None and kept != "int8":
        native = native_linear(kernels, weight, bias, nf4=kept == "nf4")
        if native is not None:
            return native
    return make_linear(weight, bias, kept)


def _tell_of_fallbacks(
    model: nn.Module, quantization: str, progress: Callable[[str], None]
) -> None:
    """One line when nf4 weights are kept dense, since that costs the memory nf4 should save."""
    linears = [m for m in model.modules() if isinstance(m, AdaptedLinear) and not m.is_head]
    dense = sum(_is_dense(m.backend) for m in linears)
    if quantization == "nf4" and dense:
        progress(
            f"{dense} of {len(linears)} linears have no nf4 kernel for their shape on this device: "
            "their nf4 values are kept dense"
        )


def _is_dense(backend: LinearBackend) -> bool:
    return isinstance(backend, DenseLinear) or (
        isinstance(backend, NativeLinear) and backend.scales is None
    )


def _fingerprint(directory: Path) -> str:
    """SHA-256 of config and weights: the base, however it is kept."""
    total = hashlib.sha256(b"adaplex-base-v1")
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        total.update(file_sha256(path).encode())
    return f"sha256:{total.hexdigest()}"


def _digest(fingerprint: str, quantization: str, dtype: torch.dtype) -> str:
    """SHA-256 of the base and of how it is kept: what a KV block depends on."""
    kept = json.dumps([fingerprint, quantization, str(dtype)])
    return f"sha256:{hashlib.sha256(kept.encode()).hexdigest()}"


def _aliases(config: PretrainedConfig, model: str) -> tuple[str, ...]:
    """What else adapters may call the base: the name its config was saved under, and a hub id
    without its revision.
    """
    saved = str(getattr(config, "_name_or_path", "") or "")
    return tuple(dict.fromkeys(name for name in (saved, model.partition("@")[0]) if name))


def _eos_token_ids(directory: Path, model: nn.Module) -> frozenset[int]:
    """End-of-sequence tokens of the generation config, else of the model config."""
    try:
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:
        eos = model.config.eos_token_id  # type: ignore[union-attr]
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset([int(eos)])


def _weight_bytes(model: nn.Module) -> int:
    """Bytes of every weight as kept; a tied tensor counts once."""
    kept = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    linears = sum(m.backend.nbytes for m in model.modules() if isinstance(m, AdaptedLinear))
    return sum(kept.values()) + linears
