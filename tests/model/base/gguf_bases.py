"""Writes a tiny llama as llama.cpp's GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "ĠĠ", "ĠĠĠ"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def for_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head of q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(
    path: Path, model: LlamaForCausalLM, writer_type: type[GGUFWriter] = GGUFWriter
) -> Path:
    config = model.config
    writer = writer_type(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, weight: torch.Tensor, heads: int = 0) -> None:
        values = weight.detach().float().numpy()
        writer.add_tensor(name, for_rope(values, heads) if heads else values)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        attention, mlp, block = layer.self_attn, layer.mlp, f"blk.{index}"
        add(f"{block}.attn_q.weight", attention.q_proj.weight, config.num_attention_heads)
        add(f"{block}.attn_k.weight", attention.k_proj.weight, config.num_key_value_heads)
        add(f"{block}.attn_v.weight", attention.v_proj.weight)
        add(f"{block}.attn_output.weight", attention.o_proj.weight)
        add(f"{block}.ffn_gate.weight", mlp.gate_proj.weight)
        add(f"{block}.ffn_up.weight", mlp.up_proj.weight)
        add(f"{block}.ffn_down.weight", mlp.down_proj.weight)
        add(f"{block}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"{block}.ffn_norm.weight", layer.post_attention_layernorm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
