"""Configs of the PEFT types that are served merged only, small enough for tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import PreTrainedModel

CONFIGS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4, "rank_pattern": {"q_proj": 6, "layers.1..*down_proj": 3}},
    "FOURIERFT": {"n_frequency": 50, "n_frequency_pattern": {"v_proj": 20}},
    "GLORA": {"r": 3, "config_A_B": "lora", "config_C": "lora", "config_D_E": "vector"},
    "GRALORA": {"r": 8, "gralora_k": 2, "hybrid_r": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4, "apply_GS": True},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8, "use_cayley_neumann": True},
    "OSF": {"effective_rank": 24},
    "PEANUT": {"r": 4, "depth": 2},
    "PSOFT": {"r": 8},
    "PVERA": {"r": 4, "d_initial": 0.1},
    "RANDLORA": {"r": 8, "randlora_alpha": 16},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2, "random_seed": 1},
    "SUPERTUNING": {"sparsity": 0.9, "r": 3, "lora_alpha": 6},
    "TINYLORA": {"r": 2, "u": 4, "weight_tying": 0.5},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 64, "proportional_parameters": True},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = list(range(3, 40))


def save_kind(
    base: PreTrainedModel, directory: Path, kind: str, *, size: float = 0.3, **fields: Any
) -> Tensor:
    """Saves a random adapter of the type and returns PEFT's logits [vocabulary] after TOKENS, with
    the adapter unmerged. The base cannot be used afterwards.
    """
    torch.manual_seed(3)
    fields = {"target_modules": TARGETS, **CONFIGS[kind], **fields}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM", **fields)
    tuned: Any = get_peft_model(base, config).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * size
    tuned.save_pretrained(directory)
    with torch.no_grad():
        logits: Tensor = tuned(torch.tensor([TOKENS])).logits[0, -1]
    return logits.float()
