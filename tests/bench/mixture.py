"""Adapters of every family for one base, random but not idle, as PEFT and AdapterHub save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
VIRTUAL = 16
HOULSBY = {
    "mh_adapter": True,
    "output_adapter": True,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
}
"""AdapterHub's config `houlsby`."""
SIZE = 0.02
"""Standard deviation of the random weights, small enough for finite logits."""


def _low_rank(kind: Any, **fields: Any) -> peft.PeftConfig:
    return kind(task_type="CAUSAL_LM", r=RANK, target_modules=LINEARS, **fields)  # type: ignore[no-any-return]


CONFIGS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: _low_rank(peft.LoraConfig),
    "dora": lambda: _low_rank(peft.LoraConfig, use_dora=True),
    "loha": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEARS),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj"]),
    "ln-tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "prompt-tuning": lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL
    ),
    "prefix-tuning": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL
    ),
}


def save_mixture(model: Path, folder: Path, count: int) -> list[tuple[str, Path]]:
    """Saves `count` adapters, of the families in turn; returns pairs of family and directory."""
    families = [*CONFIGS, "bottleneck"]
    made = []
    for number in range(count):
        family = families[number % len(families)]
        into = folder / f"{number}-{family}"
        if family == "bottleneck":
            _save_bottleneck(model, into, number)
        else:
            _save(model, into, CONFIGS[family](), number)
        made.append((family, into))
    return made


def _save_bottleneck(model: Path, folder: Path, seed: int) -> None:
    """Saves Houlsby adapters after attention and MLP of every layer."""
    config = AutoConfig.from_pretrained(model)
    rng, hidden, width = torch.Generator().manual_seed(seed), config.hidden_size, RANK
    shapes = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    tensors = {
        f"model.layers.{layer}.{block}_adapters.adapters.bench.{name}": (
            SIZE * torch.randn(shape, generator=rng)
        ).bfloat16()
        for layer in range(config.num_hidden_layers)
        for block in ("attention", "output")
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter.safetensors")
    saved = {"config": HOULSBY | {"reduction_factor": hidden / width}, "hidden_size": hidden}
    saved |= {"model_type": config.model_type, "name": "bench", "version": "adapters.1.3.0"}
    (folder / "adapter_config.json").write_text(json.dumps(saved))


@torch.no_grad()
def _save(model: Path, folder: Path, config: peft.PeftConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tuned: Any = peft.get_peft_model(base, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter + SIZE * torch.randn_like(parameter)).bfloat16()
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder
