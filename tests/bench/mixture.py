"""Adapters of every family for one base, random but not idle, as HF PEFT saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
VIRTUAL = 16
SIZE = 0.02
"""Of the random weights, so that answers stay finite."""


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
    """(family, directory) of so many adapters, families in turn."""
    families = list(CONFIGS)
    return [
        (family, _save(model, folder / f"{number}-{family}", CONFIGS[family](), number))
        for number in range(count)
        if (family := families[number % len(families)])
    ]


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
