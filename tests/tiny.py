"""Tiny random models of real architectures, saved as Hugging Face model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
VOCAB = 320

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {
        "sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
    },
    "phi3": {
        "partial_rotary_factor": 0.75,
        "rope_parameters": {
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "sliding_window": 24,
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 2048},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer of 256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(architecture: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model of the architecture and its tokenizer; returns the directory."""
    torch.manual_seed(seed)
    fields = _SHARED | ARCHITECTURES[architecture] | changes
    config = AutoConfig.for_model(architecture, **fields)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.12 if parameter.dim() > 1 else 0.3)
        if parameter.dim() == 1:
            parameter.data += 0.7
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
