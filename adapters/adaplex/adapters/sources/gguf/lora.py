"""Converts llama.cpp's LoRA files to adapter directories as PEFT writes them.

Sources: llama.cpp's convert_lora_to_gguf.py, which writes these files, and src/llama-adapter.*,
which reads them: y += B(Ax) * alpha / rank, with each pair's own rank, or B(Ax) if alpha is 0.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR
from safetensors.torch import save_file
from torch import Tensor

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, Refusal
from adaplex.adapters.formats.lowering_context import PREFIX
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.sources.gguf.file import GgufFile, GgufTensor, read_gguf

ARCHITECTURES: Mapping[str, str] = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
"""Hugging Face's model_type -> general.architecture, where llama.cpp stores linears unchanged, but
for ROTARY_ROWS. It transposes the pairs of GPT-2, for example, and cannot apply them itself.
"""
ROTARY_ROWS = frozenset(["granite", "llama", "olmo", "smollm3"])
"""Architectures whose query and key rows llama.cpp stores with each head's halves interleaved."""

ALPHA = "adapter.lora.alpha"
EXPECTED = {"general.type": "adapter", "adapter.type": "lora"}
INVOCATION = "adapter.alora.invocation_tokens"
SHIFTED_NORMS = ("gemma", "gemma2", "gemma3")
"""Architectures whose norm weights llama.cpp stores one larger."""
HALVES = {".weight.lora_a": "a", ".weight.lora_b": "b"}


@dataclass(frozen=True)
class _Target:
    """A module of the base; `heads` is set if llama.cpp interleaves its rows."""

    module: BaseModule
    heads: int | None


@dataclass(frozen=True)
class _Pair:
    """The two tensors of one module."""

    target: _Target
    a: GgufTensor  # [rank, in_features], of an embedding [vocabulary, rank]
    b: GgufTensor  # [out_features, rank]

    @property
    def rank(self) -> int:
        """Rank of this pair."""
        return self.b.shape[-1]


def convert_gguf_lora(
    file: Path,
    into: Path,
    base: BaseSpec,
    limits: AdapterLimits,
    *,
    heads: int,
    kv_heads: int,
) -> None:
    """Writes the LoRA of a GGUF file as adapter_config.json and adapter_model.safetensors.

    `heads` and `kv_heads` are the base's numbers of query and key heads. `into` is made if absent.
    Raises AdapterInvalid with every refusal, or AdapterTooLarge, before it writes anything.
    """
    source = read_gguf(file, limits)
    alpha = _check_metadata(source, base)
    targets = _targets(base, heads, kv_heads)
    norms = {
        name: target.module
        for name, tensor in source.tensors.items()
        if (target := targets.get(name.removesuffix(".weight"))) and target.module.kind == "norm"
    }
    pairs = _find_pairs(source, targets, norms.keys())
    _check_limits(pairs, file.name, limits)
    tensors = {key: tensor for pair in pairs for key, tensor in _read(source, pair)}
    shift = 1.0 if ARCHITECTURES[base.model_type] in SHIFTED_NORMS else 0.0
    tensors |= {
        f"{PREFIX}{module.name}.weight": source.read(source.tensors[name]).float() - shift
        for name, module in norms.items()
    }
    into.mkdir(parents=True, exist_ok=True)
    save_file(tensors, into / WEIGHTS, {"format": "pt"})
    config = _config(source, pairs, alpha)
    if norms:
        config["modules_to_save"] = sorted(module.name for module in norms.values())
    (into / CONFIG).write_text(json.dumps(config, indent=2))


def _check_metadata(source: GgufFile, base: BaseSpec) -> float:
    """Returns the adapter's alpha, 0 if it has none. Raises AdapterInvalid."""
    metadata, refusals = source.metadata, []
    architecture = ARCHITECTURES.get(base.model_type)
    if architecture is None:
        reason = f"the base has type {base.model_type}; GGUF adapters need one of: "
        raise AdapterInvalid.because(source.path.name, reason + ", ".join(ARCHITECTURES))
    for key, expected in (EXPECTED | {"general.architecture": architecture}).items():
        if metadata.get(key) != expected:
            refusals.append(Refusal(key, f"is {metadata.get(key)!r:.40}, expected {expected!r}"))
    if INVOCATION in metadata and not _invocation(source):
        refusals.append(Refusal(INVOCATION, "must be a list of token ids"))
    alpha = metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0:
        refusals.append(Refusal(ALPHA, f"is {alpha!r:.40}, must be a finite float of 0 or more"))
    if refusals:
        raise AdapterInvalid(refusals)
    assert isinstance(alpha, float)
    return alpha


def _invocation(source: GgufFile) -> list[int]:
    """Returns the invocation tokens of activated LoRA; empty if there are none, or not of ids."""
    tokens = source.metadata.get(INVOCATION)
    ids = list(tokens) if isinstance(tokens, tuple) else []
    return [t for t in ids if type(t) is int] if all(type(t) is int for t in ids) else []


def _targets(base: BaseSpec, heads: int, kv_heads: int) -> dict[str, _Target]:
    """Returns llama.cpp's tensor name -> linear, norm or embedding of the base, where it has one.

    Raises AdapterInvalid if the rows are interleaved and the number of heads is unknown.
    """
    architecture = ARCHITECTURES[base.model_type]
    if architecture in ROTARY_ROWS and not (heads and kv_heads):
        reason = (
            f"is {architecture}, and the base's config has no number of heads to reorder its rows"
        )
        raise AdapterInvalid.because("general.architecture", reason)
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    kinds = ("linear", "norm", "embedding")
    modules = [module for module in base.modules.values() if module.kind in kinds]
    layers = [int(part) for m in modules for part in m.name.split(".") if part.isdecimal()]
    names = gguf.get_tensor_name_map(arch, max(layers, default=-1) + 1)
    rows = {MODEL_TENSOR.ATTN_Q: heads, MODEL_TENSOR.ATTN_K: kv_heads}
    rotary = rows if architecture in ROTARY_ROWS else {}
    return {
        found[1]: _Target(module, rotary.get(found[0]))
        for module in modules
        if (found := names.get_type_and_name(module.name)) is not None
    }


def _find_pairs(
    source: GgufFile, targets: Mapping[str, _Target], norms: Collection[str]
) -> list[_Pair]:
    """Returns the file's pairs in order; `norms` are the tensors of norms. Raises AdapterInvalid
    with every unusable tensor.
    """
    refusals: list[Refusal] = []
    halves: dict[str, dict[str, GgufTensor]] = {}
    for name, tensor in source.tensors.items():
        if name in norms:
            continue
        suffix = next((suffix for suffix in HALVES if name.endswith(suffix)), "")
        module = name.removesuffix(suffix)
        if (problem := _name_problem(module, suffix, targets)) is not None:
            refusals.append(Refusal(name, problem))
        else:
            halves.setdefault(module, {})[HALVES[suffix]] = tensor
    pairs = []
    for module, found in halves.items():
        missing = [suffix for suffix, half in HALVES.items() if half not in found]
        if missing:
            refusals.append(Refusal(f"{module}{missing[0]}", "half of a pair is missing"))
            continue
        pair = _Pair(targets[module], **found)
        refusals += _shape_problems(pair)
        pairs.append(pair)
    if refusals:
        raise AdapterInvalid(refusals)
    if not pairs:
        raise AdapterInvalid.because(source.path.name, "has no tensor")
    return pairs


def _name_problem(module: str, suffix: str, targets: Mapping[str, _Target]) -> str | None:
    """Returns why a tensor cannot be used, None if it can."""
    if not suffix:
        return "is not a tensor of LoRA, and not the weight of a norm of the base"
    target = targets.get(module)
    fits = target is not None and target.module.kind != "norm"
    return None if fits else "the base has no such linear or embedding"


def _shape_problems(pair: _Pair) -> Iterator[Refusal]:
    """Yields a refusal for each shape that does not fit the base or the other half."""
    module, rank = pair.target.module, pair.rank
    table = module.kind == "embedding"
    for tensor, expected in (
        (pair.a, (module.in_features, rank) if table else (rank, module.in_features)),
        (pair.b, (module.out_features, rank)),
    ):
        if _matrix(tensor) != expected:
            shape = list(tensor.shape)
            yield Refusal(tensor.name, f"has shape {shape}, expected {list(expected)}")


def _matrix(tensor: GgufTensor) -> tuple[int, ...]:
    """Returns the 2-D shape; ggml may leave out a leading 1."""
    return (1, *tensor.shape) if len(tensor.shape) == 1 else tensor.shape


def _check_limits(pairs: list[_Pair], name: str, limits: AdapterLimits) -> None:
    """Raises AdapterTooLarge for a rank, or for the bytes of all tensors in memory."""
    for pair in pairs:
        if pair.rank > limits.max_rank:
            raise AdapterTooLarge(
                f"{pair.b.name} has rank {pair.rank}, the limit is {limits.max_rank}", field="r"
            )
    total = sum(pair.a.read_bytes + pair.b.read_bytes for pair in pairs)
    if total > limits.max_adapter_bytes:
        raise AdapterTooLarge(
            f"the tensors of {name} take {total} bytes, the limit is {limits.max_adapter_bytes}",
            field=name,
        )


def _read(source: GgufFile, pair: _Pair) -> Iterator[tuple[str, Tensor]]:
    """Yields the two tensors of a pair under PEFT's keys."""
    a, b = source.read(pair.a), source.read(pair.b)
    if pair.target.heads is not None:
        b = _halves_first(b, pair.target.heads)
    name = f"{PREFIX}{pair.target.module.name}"
    if pair.target.module.kind == "embedding":
        yield f"{name}.lora_embedding_A", a.reshape(_matrix(pair.a)).T.contiguous()
        yield f"{name}.lora_embedding_B", b.contiguous()
        return
    yield f"{name}.lora_A.weight", a.reshape(_matrix(pair.a)).contiguous()
    yield f"{name}.lora_B.weight", b.contiguous()


def _halves_first(rows: Tensor, heads: int) -> Tensor:
    """[out_features, rank] -> the same shape, with llama.cpp's order of rotary rows undone.

    Row 2i + h of a head becomes row i of its half h.
    """
    assert rows.shape[0] % (2 * heads) == 0, f"{rows.shape[0]} rows are not {heads} rotary heads"
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _config(source: GgufFile, pairs: list[_Pair], alpha: float) -> dict[str, Any]:
    """Returns an adapter_config.json that gives each module its rank and llama.cpp's scale."""
    usual = Counter(pair.rank for pair in pairs).most_common(1)[0][0]
    ranks = {re.escape(p.target.module.name): p.rank for p in pairs if p.rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.metadata.get("general.base_model.0.repo_url"),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": alpha or usual,
        "rank_pattern": ranks,
        "alpha_pattern": {} if alpha else ranks,
        "target_modules": sorted(pair.target.module.name for pair in pairs),
        "bias": "none",
        "alora_invocation_tokens": _invocation(source) or None,
    }
