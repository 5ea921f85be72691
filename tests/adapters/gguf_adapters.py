"""GGUF files with LoRA as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import WEIGHTS, read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.sources.gguf.lora import convert_gguf_lora

LIMITS = AdapterLimits()
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
F32, F16, BF16, Q8_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(module: str) -> str:
    """Returns llama.cpp's name of a module of a llama-shaped model."""
    if module == "lm_head":
        return "output"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def interleaved(rows: Tensor) -> Tensor:
    """Moves row i of half h of each head to its row 2i + h."""
    made, half = torch.empty_like(rows), HEAD_SIZE // 2
    for row in range(len(rows)):
        head, within = divmod(row, HEAD_SIZE)
        h, i = divmod(within, half)
        made[head * HEAD_SIZE + 2 * i + h] = rows[row]
    return made


def pairs_of(directory: Path, architecture: str) -> dict[str, Tensor]:
    """Returns a PEFT adapter's tensors with llama.cpp's names and order of rows."""
    made = {}
    for key, tensor in load_file(directory / WEIGHTS).items():
        module, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        rotary = architecture == "llama" and module.endswith(("q_proj", "k_proj"))
        if rotary and half.startswith("B"):
            tensor = interleaved(tensor)
        made[f"{gguf_name(module)}.weight.lora_{half[0].lower()}"] = tensor
    return made


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    kind: GGMLQuantizationType = F32,
    *,
    architecture: str = "llama",
    alpha: float | None = 8.0,
    general_type: str = "adapter",
    adapter_type: str = "lora",
    invocation: list[int] | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """Writes a file as convert_lora_to_gguf.py does; rows without whole blocks stay F16."""
    writer = GGUFWriter(path, architecture, endianess=endian)
    writer.add_type(general_type)
    writer.add_string("adapter.type", adapter_type)
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/tiny")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if invocation is not None:
        writer.add_array("adapter.alora.invocation_tokens", invocation)
    for name, tensor in tensors.items():
        stored = F16 if kind is Q8_0 and tensor.shape[-1] % 32 else kind
        writer.add_tensor(name, quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(file: Path, into: Path, base: BaseSpec, limits: AdapterLimits = LIMITS) -> Path:
    convert_gguf_lora(file, into, base, limits, heads=HEADS, kv_heads=KV_HEADS)
    return into


def lowered(directory: Path, base: BaseSpec) -> dict[str, LowRank]:
    program = formats.lower(read_checkpoint(directory, LIMITS), base, LIMITS)
    pairs = {module.module: module.low_rank for module in program.modules}
    assert pairs
    return {name: pair for name, pair in pairs.items() if pair is not None}


def pair(name: str = "blk.0.attn_v.weight", rank: int = 4) -> dict[str, Tensor]:
    return {f"{name}.lora_a": torch.ones(rank, 64), f"{name}.lora_b": torch.ones(32, rank)}
