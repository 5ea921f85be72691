"""A LoRA checkpoint of random weights, written without torch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from adaplex.client.types import AdaptableModule

WEIGHTS = "adapter_model.safetensors"
_EXPONENT = bytes(0x3C | (byte & 0x80) for byte in range(256))
"""For the high byte of a bf16: any sign, and a magnitude of 2**-7 to 2**-5."""


def linears(modules: Sequence[AdaptableModule]) -> list[AdaptableModule]:
    """What PEFT's `all-linear` means. ValueError when the server names none."""
    found = [module for module in modules if module.kind == "linear" and not module.is_head]
    if not found:
        raise ValueError("the server names no module that an adapter may change")
    return found


def write_checkpoint(
    directory: Path, modules: Sequence[AdaptableModule], rank: int, seed: int
) -> Path:
    """Writes a LoRA of the rank on all linears, as PEFT lays it out, in bf16. The directory."""
    dice = random.Random(seed)
    targets = linears(modules)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.name.rpartition(".")[2] for module in targets}),
    }
    header: dict[str, object] = {}
    offset = 0
    for module in targets:
        shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
        for part, shape in shapes.items():
            end = offset + 2 * shape[0] * shape[1]
            header[f"base_model.model.{module.name}.lora_{part}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": (offset, end),
            }
            offset = end
    data = bytearray(dice.randbytes(offset))
    data[1::2] = data[1::2].translate(_EXPONENT)
    directory.mkdir(parents=True, exist_ok=True)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + data)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def renew(directory: Path, dice: random.Random) -> None:
    """Makes it another adapter by the last bits of its last four weights: cheap, under load."""
    with (directory / WEIGHTS).open("r+b") as file:
        for place in (-8, -6, -4, -2):  # low bytes: no exponent changes by more than one
            file.seek(place, 2)
            file.write(dice.randbytes(1))
