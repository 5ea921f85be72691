"""Loads the base: resolves, reads, checks and quantizes it. Afterwards it is never written to."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.model import huge_pages, select
from adaplex.model.base.architecture import check_supported
from adaplex.model.base.build_model import ModelBuilder
from adaplex.model.base.cache_folder import CacheFolder, Use
from adaplex.model.base.checkpoint_files import check_model_folder, left_out, weight_files
from adaplex.model.base.saved_base import SavedBase
from adaplex.model.base.source import default_cache, resolve_model
from adaplex.model.base.spec import spec_of
from adaplex.model.errors import UnsupportedModel, errors_as_unsupported
from adaplex.model.file_hashes import HASHES, FileHashes
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kv_cache import LayerShape
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.native import dense_linear
from adaplex.model.linear.products import Products
from adaplex.model.modules.hooks import AdaptedLinear
from adaplex.model.progress import Progress, silent
from adaplex.model.step.step_context import StepContext
from adaplex.model.weights.int4_group import GROUP_SIZES, INT4_GROUP
from adaplex.model.weights.integer_weight import INT8_BLOCK

QUANTIZATIONS = ("nf4", "int8", INT4_GROUP, "bf16", "fp32")
ACTIVATIONS = ("float", "int8")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseModel:
    """The resident base: its module, its tokenizer, and facts about it."""

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    step: StepContext
    shapes: tuple[LayerShape, ...]
    quantization: str
    group_size: int
    """Inputs that share a scale in int4-group; 0 for other quantizations."""
    dtype: torch.dtype
    """Compute dtype."""
    device: torch.device
    max_positions: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    weight_bytes: int
    products: Products
    """Products of linears that the C kernels do not run."""
    kernels: NativeKernels | None = None
    """C kernels of the CPU, if they run the linears."""
    cache_use: Use | None = None
    """Lease of the files of the cache that this base was made from."""

    @property
    def backends(self) -> dict[str, LinearBackend]:
        """Linear backends of all modules, by name."""
        return {
            module.name: module.backend
            for module in self.module.modules()
            if isinstance(module, AdaptedLinear)
        }

    @property
    def layer_backends(self) -> dict[str, LinearBackend]:
        """Linear backends of the modules that text reaches but the output layer, by name."""
        layers = {name for name, module in self.spec.modules.items() if not module.is_head}
        return {name: b for name, b in self.backends.items() if name in layers}

    def kv_block_bytes(self, block_tokens: int) -> int:
        """Returns the bytes of one KV block over all layers."""
        return block_tokens * sum(s.elements for s in self.shapes) * self.dtype.itemsize

    def dense_linear(self, weight: Tensor, bias: Tensor | None) -> LinearBackend:
        """Returns a dense backend of this device for a weight [out, in] in the compute dtype."""
        return dense_linear(self.kernels, self.products, weight, bias)


@torch.inference_mode()
def load_base(
    model: str,
    *,
    quantization: str = "nf4",
    group_size: int = 32,
    dtype: str = "auto",
    device: str = "auto",
    cpu_activations: str = "float",
    cache: Path | None = None,
    native: bool = True,
    build_patience: float = math.inf,
    saved: Path | None = None,
    cache_limit: int | None = None,
    progress: Progress = silent,
) -> BaseModel:
    """Loads a base model and quantizes it.

    `model` is a hub id, a directory of safetensors, a GGUF file or the default's name;
    `quantization` is one of QUANTIZATIONS, `group_size`, for int4-group, one of GROUP_SIZES;
    `dtype`, the compute dtype, is auto, bf16 or fp32;
    `device` is auto, cpu or cuda; without `native` a CPU computes in torch alone,
    also where the C kernels are not built within `build_patience` seconds;
    `cpu_activations` is one of ACTIVATIONS;
    `saved` is a folder in which the quantized base is saved for the next start;
    `cache_limit` is the limit in bytes of what starts make in the cache, None for no limit.
    Raises ModelSourceError or UnsupportedModel.
    """
    if quantization not in QUANTIZATIONS:
        raise UnsupportedModel(
            f"quantization: {quantization!r} is not one of {', '.join(QUANTIZATIONS)}"
        )
    if group_size not in GROUP_SIZES:
        raise UnsupportedModel(
            f"group_size: {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}"
        )
    cache = cache or default_cache()
    directory = resolve_model(model, cache=cache, progress=progress)
    check_model_folder(model, directory)
    if unread := left_out(directory):
        progress(f"not part of the base, and not read: {', '.join(unread)} in {directory}")
    progress("reading config and tokenizer")
    compute = _compute_dtype(quantization, dtype)
    where = torch.device(_device(device))
    products = select.products(where)
    int8 = _int8_activations(cpu_activations, quantization, group_size, compute, where)
    transformers_logging.disable_progress_bar()
    with errors_as_unsupported(f"model {model!r}: its config"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    check_supported(config)
    with errors_as_unsupported(f"model {model!r}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
    fingerprint = _fingerprint(directory, FileHashes(cache / HASHES))
    kernels = None
    if native:
        progress("loading the kernels, which a first start builds")
        kernels = select.native_kernels(
            compute,
            where,
            cache=cache,
            progress=progress,
            patience=build_patience,
            int8_activations=int8,
        )
    if int8 and kernels is None:
        raise UnsupportedModel(
            "cpu_activations: int8 needs the C kernels, which are not there: install a C compiler "
            "or set float"
        )
    step = StepContext()
    builder = ModelBuilder(quantization, compute, where, kernels, products, step, group_size)
    parts = {"fingerprint": fingerprint, **builder.depends_on}
    saved_base = None if saved is None else SavedBase(saved, parts)
    with huge_pages.shared_chunks():
        module, found = builder.build(directory, config, saved_base, progress)
    use = _use_cache(CacheFolder(cache), saved_base, directory, cache_limit, progress)
    return BaseModel(
        module=module,
        tokenizer=tokenizer,
        spec=replace(
            spec_of(
                module,
                found,
                config,
                model=model,
                fingerprint=fingerprint,
                quantization=quantization,
                group_size=group_size,
                dtype=compute,
            ),
            chat_template=str(tokenizer.chat_template or ""),
            tokens=tokenizer.get_vocab(),
        ),
        step=step,
        shapes=tuple(found.shapes),
        quantization=quantization,
        group_size=group_size if quantization == INT4_GROUP else 0,
        dtype=compute,
        device=where,
        max_positions=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
        eos_token_ids=_eos_token_ids(directory, module),
        weight_bytes=_weight_bytes(module),
        products=products,
        kernels=kernels,
        cache_use=use,
    )


def _use_cache(
    folder: CacheFolder,
    saved: SavedBase | None,
    directory: Path,
    limit: int | None,
    progress: Progress,
) -> Use:
    """Marks the files of the cache that this base uses, then removes others beyond the limit."""
    used = {*folder.mapped(), *([] if saved is None else [saved.path])}
    if directory.parent == folder.root / "models":
        used |= set(weight_files(directory))
    use = Use(sorted(used))
    removed = [] if limit is None else folder.trim(limit)
    if removed:
        size = sum(entry.size for entry in removed)
        progress(f"removed {len(removed)} files, {size} bytes, that the cache had beyond its limit")
    return use


def _compute_dtype(quantization: str, dtype: str) -> torch.dtype:
    """Returns the type that `dtype` names; for auto fp32 for an fp32 base, bf16 otherwise."""
    if dtype == "auto":
        return torch.float32 if quantization == "fp32" else torch.bfloat16
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if quantization in DTYPES and quantization != dtype:
        raise UnsupportedModel(f"dtype: {dtype} does not fit quantization {quantization}")
    return DTYPES[dtype]


def _int8_activations(
    activations: str, quantization: str, group_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Returns whether activations are rounded to 8 bits. Raises UnsupportedModel for settings that
    they do not fit.
    """
    if activations not in ACTIVATIONS:
        raise UnsupportedModel(
            f"cpu_activations: {activations!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    if activations == "float":
        return False
    reason = None
    if device.type != "cpu":
        reason = f"device {device.type}: it is for CPUs"
    elif quantization not in ("nf4", INT4_GROUP):
        reason = f"quantization {quantization}: it multiplies 4-bit weights, nf4 and {INT4_GROUP}"
    elif quantization == "nf4" and dtype != torch.bfloat16:
        reason = "dtype fp32 with nf4, whose values are bf16"
    elif quantization == INT4_GROUP and group_size < INT8_BLOCK:
        reason = f"group_size {group_size}: it needs at least {INT8_BLOCK} inputs a group"
    if reason:
        raise UnsupportedModel(f"cpu_activations: int8 does not fit {reason}; set float")
    return True


def _device(device: str) -> str:
    """Returns the device; for auto cuda if there is one, else cpu."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel("device: cuda is not available")
    return device


def _fingerprint(directory: Path, hashes: FileHashes) -> str:
    """Returns the SHA-256 of config and weights, which does not depend on the quantization."""
    total = hashlib.sha256(b"adaplex-base-v1")
    for path in [directory / "config.json", *weight_files(directory)]:
        total.update(hashes.sha256(path).encode())
    return f"sha256:{total.hexdigest()}"


def _eos_token_ids(directory: Path, model: nn.Module) -> frozenset[int]:
    """Returns the end-of-sequence tokens of the generation config, else of the model config."""
    try:
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:
        eos = model.config.eos_token_id  # type: ignore[union-attr]
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset([int(eos)])


def _weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of all weights as stored; a tied tensor counts once."""
    stored = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    linears = sum(m.backend.nbytes for m in model.modules() if isinstance(m, AdaptedLinear))
    return sum(stored.values()) + linears
