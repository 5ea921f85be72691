"""Random LoRA adapters as HF PEFT saves them, which change the output, and PEFT as their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

ATTENTION = {
    "gpt2": ["c_attn", "attn.c_proj"],
    "phi3": ["qkv_proj"],
}
EVERYTHING = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}

EXTRAS: dict[str, dict[str, Any]] = {
    "lora-bias": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "both-ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "both-ends-tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "one-norm": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.input_layernorm"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-ends": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-ends-tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "saved-linear": {
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["1.mlp", "k_proj"],
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 250, 3]},
    "tokens-by-layer": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [9, 5, 11]},
    },
    "same-tokens-by-layer": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [9, 4]},
    },
    "head-tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [9, 5, 11]},
    },
    "parameter-of-a-linear": {
        "target_modules": [],
        "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"],
        "rank_pattern": {"q_proj.weight": 3},
    },
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora-table": {"target_modules": ["embed_tokens", "up_proj"], "use_dora": True},
    "dora-bias": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "bias": "lora_only"},
}
"""LoRA configs with more than low-rank pairs of linears, for llama-shaped models."""
EXPERTS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "up-of-one-layer": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "both-and-attention": {
        "target_modules": ["q_proj", "embed_tokens"],
        "target_parameters": ["down_proj", "gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"gate_up_proj": 3},
        "use_rslora": True,
    },
}
"""LoRA configs of the fused parameters of experts."""
ELSEWHERE: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "dora": {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True},
        "dora-bias": {"target_modules": ["c_attn"], "use_dora": True, "bias": "all"},
        "lora-bias": {"target_modules": ["c_fc"], "lora_bias": True},
        "table": {"target_modules": ["wte", "c_fc"]},
        "saved": {"target_modules": ["c_fc"], "modules_to_save": ["h.1.attn.c_attn", "ln_f"]},
        "saved-bias": {"target_modules": ["c_fc"], "modules_to_save": ["ln_1"], "bias": "all"},
        "tokens": {"target_modules": ["c_fc"], "trainable_token_indices": [7, 4]},
    },
    "gemma2": {
        "table": {"target_modules": ["embed_tokens", "q_proj"]},
        "dora-table": {"target_modules": ["embed_tokens"], "use_dora": True},
        "norms": {"target_modules": ["q_proj"], "modules_to_save": ["layernorm"]},
        "saved-table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 4]},
    },
    "gpt_oss": {
        "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "down": {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]},
    },
}
"""LoRA configs for architectures whose modules are named, scaled or transposed in another way."""


def attention(architecture: str) -> list[str]:
    """Returns the names of the attention projections that LoRA targets by default."""
    return ATTENTION.get(architecture, ["q_proj", "v_proj"])


def everything(architecture: str) -> list[str]:
    """Returns the names of every projection that LoRA can target."""
    mlp = ["gate_proj", "up_proj", "down_proj"]
    return EVERYTHING.get(architecture, ["q_proj", "k_proj", "v_proj", "o_proj", *mlp])


def spread(architecture: str) -> dict[str, dict[str, Any]]:
    """Returns LoRA configs that differ in rank, scale, targets and bias."""
    first, every = attention(architecture)[0], everything(architecture)
    layer = "h" if architecture == "gpt2" else "layers"
    return {
        "r2": {"r": 2, "lora_alpha": 4, "target_modules": attention(architecture)},
        "r4-rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": every},
        "r8-patterns": {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": every,
            # PEFT sorts patterns when it saves, and the first match wins
            "rank_pattern": dict(sorted({first: 3, f"{layer}.1.*": 5}.items())),
            "alpha_pattern": {first: 6},
        },
        "r16-regex": {
            "r": 16,
            "lora_alpha": 8,
            "target_modules": rf".*\.{layer}\.[02]\..*({'|'.join(every)})",
        },
        "bias-all": {"r": 4, "lora_alpha": 8, "bias": "all", "target_modules": [first]},
        "bias-lora": {"r": 4, "lora_alpha": 8, "bias": "lora_only", "target_modules": every},
        "layer-1": {
            "r": 6,
            "lora_alpha": 12,
            "target_modules": every,
            "layers_to_transform": [1],
            "layers_pattern": layer,
        },
    }


def load_plain(model: Path) -> PreTrainedModel:
    """Loads the base in fp32 with eager attention."""
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    return plain.eval()


def save_adapter(
    base: PreTrainedModel, directory: Path, *, seed: int = 0, size: float = 0.1, **fields: Any
) -> Path:
    """Saves a LoRA with random weights for `base`, and removes it from the base."""
    torch.manual_seed(seed)
    kept = {name: p.detach().clone() for name, p in base.named_parameters() if "bias" in name}
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, size)
        elif parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * size
    tuned.save_pretrained(directory)
    tuned.unload()
    for name, parameter in base.named_parameters():
        if name in kept:
            parameter.data = kept[name]
            parameter.requires_grad_(False)
    return directory


_resolve_variant = Linear.resolve_lora_variant


def resolve_with_qalora(linear: Any, *, config: LoraConfig, **more: Any) -> Any:
    """Stands in for `Linear.resolve_lora_variant`, with QA-LoRA for all linears.

    PEFT has it for GPTQ's linears only.
    """
    if config.use_qalora:
        return QALoraLinearVariant()
    return _resolve_variant(linear, config=config, **more)


def pool_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives all of PEFT's linears QA-LoRA until the test ends."""
    monkeypatch.setattr(Linear, "resolve_lora_variant", resolve_with_qalora)


class Oracle:
    """PEFT with one adapter on its own base, or the base alone."""

    def __init__(self, base: PreTrainedModel, adapter: Path | None) -> None:
        self.model: Any = base if adapter is None else PeftModel.from_pretrained(base, adapter)
        self.model.eval()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """Returns logits [vocabulary] after the last token."""
        out: Tensor = self.model(torch.tensor([tokens])).logits[0, -1]
        return out.float()

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Returns the next `count` tokens."""
        ids = torch.tensor([tokens])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        return out[0, len(tokens) :].tolist()  # type: ignore[no-any-return]
