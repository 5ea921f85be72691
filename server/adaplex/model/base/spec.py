"""The BaseSpec of a loaded base: the facts by which adapters are checked and lowered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.model.base.architecture import Probe
from adaplex.model.modules.hooks import AdaptedLinear
from adaplex.model.weights.int4_group import INT4_GROUP

STEADY_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies do not depend on the length."""


def spec_of(
    module: nn.Module,
    found: Probe,
    config: PretrainedConfig,
    *,
    model: str,
    fingerprint: str,
    quantization: str,
    group_size: int,
    dtype: torch.dtype,
) -> BaseSpec:
    """Returns the spec of a built base. `model` is the name or path that it was loaded by, `dtype`
    the compute dtype.
    """
    return BaseSpec(
        name=Path(model).name if Path(model).exists() else model,
        digest=_digest(fingerprint, _grid(quantization, group_size), dtype),
        model_type=str(config.model_type),
        modules=_as_defined(module, found.sites),
        biases=_biases(module, found),
        fingerprint=fingerprint,
        aliases=_aliases(config, model),
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
        kv_heads=int(getattr(config, "num_key_value_heads", 0) or 0),
        kv_shapes=tuple((s.kv_heads, s.key_dim, s.value_dim) for s in found.shapes),
        rotary=_rotary(module),
        tied=bool(config.tie_word_embeddings),
        idle=_idle(module, found.sites),
        quantization=quantization,
        weight=partial(_weight, module),
    )


def _as_defined(model: nn.Module, sites: Iterable[BaseModule]) -> dict[str, BaseModule]:
    """Returns sites by name, in the order in which the model defines them, by which PEFT numbers
    modules.
    """
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}

    def index(site: BaseModule) -> int:  # a parameter of experts has the place of its module
        return place.get(site.name, place.get(site.name.rpartition(".")[0], len(place)))

    return {site.name: site for site in sorted(sites, key=index)}


def _idle(model: nn.Module, sites: Iterable[BaseModule]) -> tuple[str, ...]:
    """Returns the parts with weights, one or two levels deep, in which a probe run of text found no
    site.
    """
    used = {".".join(site.name.split(".")[:depth]) for site in sites for depth in (1, 2, 3)}
    return tuple(
        name
        for name, module in model.named_modules()
        if 1 <= len(name.split(".")) <= 2
        and name not in used
        and name.partition(".")[0] in used
        and any(isinstance(m, AdaptedLinear) or m._parameters for m in module.modules())
    )


def _biases(model: nn.Module, found: Probe) -> dict[str, Tensor]:
    """Returns a copy of each site's bias, fp32 on the CPU, for the sites that have one."""
    biases = {}
    for site in found.sites:
        if not site.has_bias:
            continue
        module: Any = model.get_submodule(site.name)
        bias: Any = module.backend.bias if isinstance(module, AdaptedLinear) else module.bias
        biases[site.name] = bias.float().cpu().clone()
    return biases


def _weight(model: nn.Module, name: str) -> Tensor:
    """See BaseSpec.weight."""
    try:
        module: Any = model.get_submodule(name)
        weight: Tensor = module.weight
    except AttributeError:
        raise KeyError(name) from None
    return weight.detach().float()


def _rotary(module: Any) -> Tensor | None:
    """See BaseSpec.rotary."""
    embedding = getattr(module.base_model, "rotary_emb", None)
    if getattr(embedding, "rope_type", None) not in STEADY_ROTARY:
        return None
    return embedding.inv_freq.detach().float().cpu().clone()  # type: ignore[union-attr, no-any-return]


def _aliases(config: PretrainedConfig, model: str) -> tuple[str, ...]:
    """Returns other names of the base that adapters may use: the name under which its config was
    saved, and a hub id without its revision.
    """
    saved = str(getattr(config, "_name_or_path", "") or "")
    return tuple(dict.fromkeys(name for name in (saved, model.partition("@")[0]) if name))


def _grid(quantization: str, group_size: int) -> str:
    """Returns the quantization with all that the values of linears depend on."""
    return f"{quantization}:{group_size}" if quantization == INT4_GROUP else quantization


def _digest(fingerprint: str, quantization: str, dtype: torch.dtype) -> str:
    """Returns the SHA-256 of all that a KV block depends on: base, quantization and dtype."""
    parts = json.dumps([fingerprint, quantization, str(dtype)])
    return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"
